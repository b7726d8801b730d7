"""What a step costs: against Hugging Face, against the machine's matrix rate, on eight ranks, and for its data.

Everything is measured in turn within one run, so that a busy machine slows both sides of a ratio.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from course_lib import launch
from course_lib.planning import closed_forms
from tests import bench

__all__ = ["compare", "course_run", "in_one_rank"]

LEFT_OUT = 3
"""First steps that are not counted."""

SOURCES, VOCAB_SIZE = ("prose", "code"), 8192

SEQUENCES = 8
"""The global batch size."""

MATRICES = 8
"""Products that are timed between two steps."""

COURSE = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 2, "num_query_groups": 2}
COURSE |= {"ffn_hidden_size": 768, "seq_length": 256}
LARGER = {"num_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 8}
LARGER |= {"ffn_hidden_size": 1408, "seq_length": 256}


def in_one_rank(config: Path, *, threads: int, limit_seconds: float = 900.0) -> dict[str, list[float]]:
    """Run :func:`compare` in one warm rank.

    Args:
        config: A `config.yaml` of Bridge's with a layout for one rank.
        threads: Threads of the rank's matrix products.
        limit_seconds: Give up after so long.

    Returns:
        Seconds of each step: `bridge`, `hugging face`, `data` (waiting for the data loader, part of `bridge`), and
        FLOP/s of the machine beside it: `matrix`.

    Raises:
        RunFailed: If the rank failed; names the cause.
    """
    job = "tests.bench.step:compare"
    (seconds,) = launch.call(job, str(config), ranks=1, device="cpu", threads=threads, limit_seconds=limit_seconds)
    return seconds


def compare(config: str) -> dict[str, list[float]]:
    """In one rank: after each Bridge step, a step of a Hugging Face Llama of the same size, and a few products.

    Bridge's step is everything from the end of the products to the start of the next Hugging Face step: data, forward,
    backward, gradient reduction, clipping, AdamW, logging.  Hugging Face's is forward, backward, clipping and AdamW on
    ready data.
    """
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from course_lib.ranks import train
    from course_lib.reading import throughput
    from course_lib.stack import devices

    cfg = train.read_config(Path(config))
    devices.apply(cfg)
    seconds: dict[str, list[float]] = {"bridge": [], "hugging face": [], "data": [], "matrix": []}
    waited = 0.0

    def timed(batches: Iterator[Any]) -> Iterator[Any]:
        nonlocal waited
        begin = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - begin
        yield batch

    def step(state: Any, batches: Iterator[Any], model: Any, **options: Any) -> Any:
        return forward_step(state, timed(batches), model, **options)

    class Interleave(Callback):
        since = 0.0

        def on_train_start(self, context: object) -> None:
            rows = next(p.shape[0] for name, p in context.model[0].named_parameters() if "word_embeddings" in name)
            self.step_of_hugging_face = _hugging_face(cfg, vocab_size=rows)

        def on_train_step_start(self, context: object) -> None:
            nonlocal waited
            if self.since:
                seconds["bridge"].append(time.perf_counter() - self.since)
                seconds["data"].append(waited)
            begin = time.perf_counter()
            self.step_of_hugging_face()
            seconds["hugging face"].append(time.perf_counter() - begin)
            # The fastest of them would be held against a median step: this is a median too.
            products = [throughput.machine_flops_per_second(repeats=1) for _ in range(MATRICES)]
            seconds["matrix"].append(statistics.median(products))
            waited, self.since = 0.0, time.perf_counter()

    pretrain(cfg, step, callbacks=[Interleave()])
    return {name: rows[LEFT_OUT:] for name, rows in seconds.items()}


def _hugging_face(cfg: Any, *, vocab_size: int) -> Any:
    """One optimizer step of a Llama as large as `cfg`'s, on as many tokens in as many micro-batches."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    m = cfg.model
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=m.hidden_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_attention_heads,
            num_key_value_heads=m.num_query_groups or m.num_attention_heads,
            intermediate_size=m.ffn_hidden_size,
            max_position_embeddings=m.seq_length,
            tie_word_embeddings=m.share_embeddings_and_output_weights is not False,
        )
    )
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, fused=False)
    tokens = torch.randint(0, vocab_size, (cfg.train.micro_batch_size, m.seq_length))
    micro_batches = cfg.train.global_batch_size // cfg.train.micro_batch_size

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(micro_batches):
            (reference(input_ids=tokens, labels=tokens).loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()

    return step


def course_run(work: Path) -> list[bench.Figure]:
    """Lesson 08's run: its share of the machine's matrix rate on one rank, what eight ranks keep of that, its data.

    A second, larger model is measured beside it: the first is small because a few minutes must be enough to learn
    something, and then attention, norms and the loss over 8,192 ids weigh more beside the matrix products.

    Args:
        work: An empty directory.
    """
    files = _text(work)
    figures = []
    for name, shape in (("course run", COURSE), ("28M parameters", LARGER)):
        one = _config(files, shape, work / f"{name}.one.yaml", ranks=1)
        eight = _config(files, shape, work / f"{name}.eight.yaml", ranks=8)
        figures += _compared(name, one, eight)
    return figures


def _compared(name: str, one: Path, eight: Path) -> list[bench.Figure]:
    from course_lib.ranks import train
    from course_lib.reading import throughput

    cfg = train.read_config(one)
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    flops = tokens * closed_forms.flops_per_token(cfg.model, vocab_size=VOCAB_SIZE)
    shares, against, data, kept = [], [], [], []

    def step_ms(config: Path, ranks: int) -> float:
        run = launch.run(config, ranks=ranks, name="step", show=None)
        return float(throughput.steady(run, skip=LEFT_OUT).elapsed_ms.median())

    for _ in range(bench.REPEATS):
        rows = in_one_rank(one, threads=len(os.sched_getaffinity(0)))
        step_seconds = statistics.median(rows["bridge"])
        shares.append(flops / step_seconds / statistics.median(rows["matrix"]))
        against.append(step_seconds / statistics.median(rows["hugging face"]))
        data.append(sum(rows["data"]) / sum(rows["bridge"]))
        kept.append(step_ms(one, 1) / step_ms(eight, 8))
    return [
        bench.figure(f"{name}: FLOP/s of 1 rank / matrix rate", shares, "x", "at least 0.65", "0.8", "both medians"),
        bench.figure(f"{name}: 1-rank step / Hugging Face", against, "x", "at most 1.1", "1", "same size, interleaved"),
        bench.figure(f"{name}: rate of 8 ranks / 1 rank", kept, "x", "at least 0.75", "0.9", "TP=2 DP=4"),
        bench.figure(f"{name}: data / step", data, "x", "under 0.05", "0", "waiting for the loader, 1 rank"),
    ]


def _text(work: Path) -> Path:
    """The course's corpus as ids, prose and code apart, with the tokenizer beside them."""
    from course_lib import stack
    from course_lib.text import corpus, indexed, tokenizers

    stack.prepare_imports()
    built = corpus.python_library(work / "corpus")
    texts = {source: list(built.texts(source, "train")) for source in SOURCES}
    tokenizers.train_bpe(sum(texts.values(), []), work / "tokenizer", vocab_size=VOCAB_SIZE)
    encoder = tokenizers.load(work / "tokenizer")
    for source in SOURCES:
        indexed.write_texts(texts[source], work / source, tokenizer=encoder)
    return work


def _config(files: Path, shape: dict[str, int], path: Path, *, ranks: int) -> Path:
    """A run of a few steps on text; eight ranks take TP=2 and split the same global batch four ways."""
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    from course_lib import recipes

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    recipes.shrink(cfg, **shape)
    cfg.tokenizer = TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(files / "tokenizer"), use_tokenizer_vocab_size=True
    )
    cfg.dataset.split = None
    cfg.dataset.blend_per_split = [([str(files / source) for source in SOURCES], None), None, None]
    cfg.model.tensor_model_parallel_size = 2 if ranks == 8 else 1
    cfg.train.train_iters, cfg.train.global_batch_size = LEFT_OUT + 8, SEQUENCES
    cfg.train.micro_batch_size = SEQUENCES // (4 if ranks == 8 else 1)
    cfg.scheduler.lr_warmup_iters, cfg.validation.eval_iters, cfg.logger.log_interval = 2, 0, 1
    cfg.checkpoint.save = cfg.checkpoint.load = cfg.logger.tensorboard_dir = None
    cfg.to_yaml(str(path))
    return path

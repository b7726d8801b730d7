"""What the lessons after pretraining start from: a base model and a fine-tuned one, trained once and found again.

A checkpoint is found by content: configuration, data, versions and the code that ranks execute.  The run directory gets
its mark only after a whole checkpoint is in it, so that an interrupted run is never found, and a torn checkpoint is
looked through again each time.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib import launch, recipes, runs, stack
from course_lib.common import files
from course_lib.common.project import LIBRARY
from course_lib.common.screen import Line
from course_lib.common.units import MiB, duration
from course_lib.experiments import export, sweep
from course_lib.planning import memory
from course_lib.runs import checkpoints
from course_lib.text import corpus, indexed, tasks, tokenizers

if TYPE_CHECKING:
    import pandas as pd
    from megatron.bridge.training.config import ConfigContainer

__all__ = [
    "Text",
    "adapter",
    "base",
    "exported",
    "fine_tuned",
    "fine_tuning",
    "packed",
    "pretraining",
    "states",
    "text",
    "trained",
]

VOCAB_SIZE = 2048
BASE_STEPS, TUNING_STEPS = 240, 150
RANKS = 2
"""TP=2: more ranks would share a laptop's cores, and a model of this size would train no faster."""
PROCESSOR_SECONDS = {"base": 0.27, "fine-tuned": 0.26}
"""Of one step, both ranks together, at the sizes below, their start included: measured for seed 1 on two quiet cores."""
SIZES = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 384}
SEQUENCE = 256
MAKERS = ("corpus", "indexed", "sources", "tasks", "tokenizers")
"""Modules of `text/` that decide what the text is."""
JSONL = {"train": "training", "validation": "validation", "test": "test"}
"""Bridge's names for the files of each split; Source: megatron-bridge `data/builders/gpt_sft.py` @ 0.6.2."""


@dataclass(frozen=True)
class Text:
    """All that the stages read.

    Attributes:
        directory: Corpus, tokenizer, `.bin` and `.idx` of prose and code, and the pairs.
    """

    directory: Path

    @property
    def built(self) -> corpus.Built:
        """The corpus, whose split all stages share."""
        return corpus.Built(self.directory / "corpus")

    @property
    def tokenizer(self) -> Path:
        """A BPE that saw the training part alone."""
        return self.directory / "tokenizer"

    @property
    def pairs(self) -> Path:
        """The folder with `training.jsonl`, `validation.jsonl` and `test.jsonl`; Bridge writes indices beside them."""
        return self.directory / "pairs"

    def prefix(self, source: str, split: str) -> Path:
        """Where Megatron finds the ids of `"prose"` or `"code"` in `"train"` or `"validation"`."""
        return self.directory / f"{source}-{split}"

    def read(self, split: str) -> list[tasks.Pair]:
        """The pairs of one split, in the order of the file."""
        lines = (self.pairs / f"{JSONL[split]}.jsonl").read_text(encoding="utf-8").splitlines()
        return [tasks.Pair(**json.loads(line)) for line in lines]


def text() -> Text:
    """Corpus, tokenizer, ids and pairs of this Python; made in some seconds, and found again as long as nothing changes."""
    made, place = Text(runs.directory() / "stages-text"), Line()
    with _one_at_a_time("text", place):
        if _made_of(made) != _sources():
            place.say("making corpus, tokenizer and pairs, some 20 seconds", now=True)
            with files.replacing_folder(made.directory) as half:
                _write(Text(half))
                runs.write_json(half / "made_of.json", _sources())
            place.close("corpus, tokenizer and pairs are made")
    return made


def pretraining(data: Text, *, steps: int = BASE_STEPS, seed: int = 1) -> ConfigContainer:
    """Stage 0: NVIDIA's recipe for Llama 3.2 1B, shrunk to a million parameters, on docstrings and code at TP=2."""
    stack.prepare_imports()
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    splits = corpus.SPLITS[:2]
    blends = [([str(data.prefix(source, split)) for source in ("prose", "code")], [0.5, 0.5]) for split in splits]
    cfg.dataset.blend_per_split, cfg.dataset.split = [*blends, None], None
    cfg.dataset.random_seed = seed
    cfg.train.global_batch_size = cfg.train.micro_batch_size = 8
    cfg.optimizer.lr = 4e-3
    return _small(cfg, data, steps=steps, seed=seed)


def fine_tuning(data: Text, start: runs.Run, *, steps: int = TUNING_STEPS, seed: int = 1) -> ConfigContainer:
    """Stage 1: Bridge's `finetune()` of a base model on pairs of signature and docstring, at TP=2.

    Args:
        start: The run whose last checkpoint is tuned.
    """
    stack.prepare_imports()
    from megatron.bridge.data.builders import GPTSFTDatasetConfig, PromptCompletionSFTPreprocessingConfig

    cfg = pretraining(data, steps=steps, seed=seed)
    cfg.dataset = GPTSFTDatasetConfig(
        dataset_root=str(data.pairs),
        seq_length=SEQUENCE,
        seed=seed,
        do_test=False,
        dataloader_type="batch",
        preprocessing=PromptCompletionSFTPreprocessingConfig(
            prompt_column="input", completion_column="output", separator=tasks.SEPARATOR, loss_mode="completion"
        ),
    )
    cfg.train.global_batch_size = cfg.train.micro_batch_size = 16
    cfg.optimizer.lr = 1e-3
    cfg.checkpoint.pretrained_checkpoint = str(checkpoints.root(start))
    return cfg


def packed(cfg: ConfigContainer, *, steps: int = 3) -> ConfigContainer:
    """The same fine-tuning with several pairs in a row, on a copy of the pairs, because Bridge writes its packs beside them.

    Args:
        cfg: As `fine_tuning` makes it.
        steps: Optimizer steps.
    """
    from megatron.bridge.data.packing import PackedSequenceSpecs

    place, pairs = runs.directory() / "packed-pairs", Path(cfg.dataset.dataset_root)
    place.mkdir(parents=True, exist_ok=True)
    for name in ("training.jsonl", "validation.jsonl"):
        files.write_text(place / name, (pairs / name).read_text(encoding="utf-8"))
    cfg = copy.deepcopy(cfg)
    cfg.dataset.dataset_root = str(place)
    cfg.dataset.enable_offline_packing = True
    cfg.dataset.offline_packing_specs = PackedSequenceSpecs(packed_sequence_size=SEQUENCE)
    cfg.train.micro_batch_size, cfg.train.global_batch_size = 1, 8  # packed rows come one at a time
    cfg.train.train_iters, cfg.validation.eval_iters = steps, 0
    return cfg


def states(cfgs: Mapping[str, ConfigContainer]) -> pd.DataFrame:
    """What a rank holds for each of these runs beside activations, planned for 8 GPUs in bf16: a row a kind, in MiB."""
    import pandas as pd

    planned = {}
    for name, cfg in cfgs.items():
        sized = copy.deepcopy(cfg)
        sized.tokenizer.use_tokenizer_vocab_size = False  # only a rank reads the tokenizer
        sized.model.vocab_size = sized.tokenizer.vocab_size = VOCAB_SIZE
        sized.train.micro_batch_size = 1  # no matter for states, and any number of copies can share the batch
        planned[name] = vars(memory.states(sized, ranks=8)[0])
    rows = {"weights_bytes": "weights, MiB", "gradients_bytes": "gradients, MiB", "optimizer_bytes": "optimizer, MiB"}
    return (pd.DataFrame(planned).loc[list(rows)] / MiB).rename(index=rows).round(3)


def base(*, steps: int = BASE_STEPS, seed: int = 1) -> runs.Run:
    """The base model of the stages: found, or pretrained now."""
    seconds = PROCESSOR_SECONDS["base"] * steps
    return trained(pretraining(text(), steps=steps, seed=seed), name="stage-base", processor_seconds=seconds)


def fine_tuned(*, steps: int = TUNING_STEPS, seed: int = 1) -> runs.Run:
    """The fine-tuned model of the stages, from the base of the same seed: found, or trained now, its base included."""
    cfg = fine_tuning(text(), base(seed=seed), steps=steps, seed=seed)
    return trained(cfg, name="stage-tuned", processor_seconds=PROCESSOR_SECONDS["fine-tuned"] * steps)


def trained(
    cfg: ConfigContainer,
    *,
    name: str,
    processor_seconds: float,
    ranks: int = RANKS,
    show: str | None = "live",
) -> runs.Run:
    """The run of this configuration with a whole checkpoint: found, or trained now by `launch.run(cfg, save=True)`.

    Args:
        cfg: Bridge's `ConfigContainer`; `finetune()` runs it if it has a `checkpoint.pretrained_checkpoint`.
        name: Beginning of the run directory's name.
        processor_seconds: What it will take on CPU ranks, all of them together, for the words before it starts.
        ranks: World size.
        show: As for `launch.run`.

    Raises:
        RunFailed: As `launch.run()`; whatever was saved by then is not found later.
    """
    wanted, line = sweep.digest(cfg, ranks), Line()
    with _one_at_a_time(wanted[:16], line):
        if (run := sweep.find(wanted, where=_is_whole)) is not None:
            line.close(f"{name}: found in {run.name}, trained before with the same configuration, data and code")
            return run
        line.close(f"{name}: {cfg.train.train_iters} steps, {_estimate(processor_seconds, ranks)}; kept for next time")
        run = launch.run(cfg, ranks=ranks, name=name, save=True, show=show)
        checkpoints.require(run)
        sweep.note(run, digest=wanted, seed=cfg.rng.seed)
        return run


def exported(run: runs.Run) -> Path:
    """The Hugging Face folder of a stage's model, in its run directory: found, or written now by `export.model`."""
    folder = run.path / f"hugging-face-{_code('experiments/export.py')[:8]}"
    with _one_at_a_time(f"export-{run.name}", Line()):
        return folder if folder.is_dir() else export.model(run, folder).folder


def adapter(run: runs.Run, base: runs.Run) -> Path:
    """The folder of a LoRA adapter in PEFT's format, in its run directory: found, or written now by `export.adapter`.

    Args:
        run: A run with `cfg.peft`.
        base: The run of which the adapter was trained.
    """
    folder = run.path / f"adapter-{_code('experiments/export.py')[:8]}"
    beneath = exported(base)
    with _one_at_a_time(f"export-{run.name}", Line()):
        return folder if folder.is_dir() else export.adapter(run, folder, base=beneath).folder


def _code(*files_: str) -> str:
    return hashlib.sha256(b"".join((LIBRARY / file).read_bytes() for file in files_)).hexdigest()


def _small(cfg: ConfigContainer, data: Text, *, steps: int, seed: int) -> ConfigContainer:
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    recipes.shrink(cfg, **SIZES, seq_length=SEQUENCE)
    cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(data.tokenizer))
    cfg.tokenizer.use_tokenizer_vocab_size = True
    cfg.model.tensor_model_parallel_size = 2
    cfg.train.train_iters, cfg.rng.seed = steps, seed
    cfg.optimizer.min_lr = 0.0
    cfg.scheduler.lr_warmup_iters = max(1, steps // 10)
    cfg.validation.eval_interval, cfg.validation.eval_iters = steps, 4
    cfg.logger.log_interval = 10
    cfg.checkpoint.save_interval = steps
    return cfg


def _write(half: Text) -> None:
    built = corpus.python_library(half.directory / "corpus")
    learned = [each for source in ("prose", "code") for each in built.texts(source, "train")]
    tokenizers.train_bpe(learned, half.tokenizer, vocab_size=VOCAB_SIZE)
    encoder = tokenizers.load(half.tokenizer)
    for source in ("prose", "code"):
        for split in corpus.SPLITS[:2]:
            indexed.write_texts(built.texts(source, split), half.prefix(source, split), tokenizer=encoder)
    for split, pairs in tasks.docstring_pairs(built).items():
        tasks.write(pairs, half.pairs / f"{JSONL[split]}.jsonl")


def _sources() -> dict[str, str]:
    """What the text is made of: this Python's library, the tokenizer's trainer, and the code that makes it."""
    return {
        "python": sys.version,
        "tokenizers": version("tokenizers"),
        "code": _code(*(f"text/{name}.py" for name in MAKERS)),
        "vocab_size": str(VOCAB_SIZE),
    }


def _made_of(made: Text) -> dict[str, str] | None:
    place = made.directory / "made_of.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None


def _is_whole(run: runs.Run) -> bool:
    try:
        checkpoints.require(run)
    except (checkpoints.NoCheckpoint, checkpoints.WrongCheckpoint):
        return False
    return True


def _estimate(processor_seconds: float, ranks: int) -> str:
    if stack.device(ranks) == "cuda":
        return "no estimate for GPUs"
    cores = min(len(os.sched_getaffinity(0)), ranks)
    return f"about {duration(processor_seconds / cores, rough=True)} on {cores} cores that have nothing else to do"


@contextmanager
def _one_at_a_time(what: str, line: Line) -> Iterator[None]:
    """Whoever comes second waits, and then finds what the first one made; a process that dies lets go."""
    runs.directory().mkdir(parents=True, exist_ok=True)
    with (runs.directory() / f".stages-{what}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            line.say("waiting for another notebook or test that makes the same", now=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

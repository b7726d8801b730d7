"""What a laptop leaves for a GPU to go on from: real text as tokens, a run on one CPU rank, its losses and a checkpoint.

It is made where the bundle is made, so that the GPU's losses stand beside those of another machine on the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from course_lib import launch, recipes, stack
from course_lib.common import files, project
from course_lib.common.config import assign
from course_lib.runs import checkpoints
from course_lib.stack import devices
from course_lib.text import corpus, indexed, tokenizers

DONE = "reference.json"
"""Written last: a folder without it is not whole."""

STEPS, SAVE_INTERVAL = 16, 8
DRY_STEPS, DRY_SAVE_INTERVAL = 4, 2


def shrink(cfg: Any) -> None:
    """The model of lesson 03, on 1,024 ids."""
    recipes.shrink(cfg, num_layers=4, hidden_size=128, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=256,
                   seq_length=128, vocab_size=1024)  # fmt: skip


def few_steps(cfg: Any, *, steps: int, global_batch_size: int, micro_batch_size: int) -> None:
    """A short run, every step in the log, nothing saved and no evaluation."""
    cfg.train.train_iters = steps
    cfg.train.global_batch_size = global_batch_size
    cfg.train.micro_batch_size = micro_batch_size
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_decay_iters = 2, None
    cfg.validation.eval_interval, cfg.validation.eval_iters = 1000, 0
    cfg.logger.log_interval, cfg.logger.tensorboard_dir = 1, None
    cfg.checkpoint.save = cfg.checkpoint.load = None
    cfg.dataset.num_workers = min(2, cfg.dataset.num_workers)
    cfg.dataset.persistent_workers = bool(cfg.dataset.num_workers)


def config(folder: Path, steps: int) -> Any:
    """Lesson 03's run on real text, for one rank, with the files of this folder.

    Args:
        folder: Where `make` has written tokens and tokenizer.
    """
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    shrink(cfg)
    few_steps(cfg, steps=steps, global_batch_size=32, micro_batch_size=4)
    cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer"))
    cfg.tokenizer.use_tokenizer_vocab_size = True
    cfg.dataset.blend_per_split = [([str(folder / name)], None) for name in ("train", "validation")] + [None]
    cfg.dataset.split = None
    cfg.optimizer.lr, cfg.optimizer.min_lr = 4e-3, 4e-4
    return cfg


def set_fp32(cfg: Any) -> None:
    """Train in fp32 on a GPU as well: the number formats of a CPU rank, in place; kernels stay the GPU's."""
    formats = ("mixed_precision", "bf16", "fp16")
    for one in devices.differences(cfg, "cpu"):
        name = one.field.rpartition(".")[2]
        if name in formats or name.endswith("dtype"):
            assign(cfg, {one.field: one.in_ranks})
    cfg.optimizer.use_precision_aware_optimizer = False


def make(folder: Path, *, dry: bool = False) -> None:
    """Tokens of Python's language reference, and a run on one CPU rank that saves a checkpoint half-way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = corpus.language_reference()
    tokenizers.train_bpe(parts.train, folder / "tokenizer", vocab_size=1024)
    encoder = tokenizers.load(folder / "tokenizer")
    end = encoder.token_to_id(tokenizers.END_OF_DOCUMENT)
    for name in ("train", "validation"):
        ids = [encoder.encode(text).ids for text in getattr(parts, name)]
        indexed.write(ids, folder / name, vocab_size=1024, end_of_document=end)
    steps, interval = (DRY_STEPS, DRY_SAVE_INTERVAL) if dry else (STEPS, SAVE_INTERVAL)
    cfg = config(folder, steps)
    cfg.checkpoint.save_interval = interval
    with _on_cpu():
        run = launch.run(cfg, ranks=1, name="laptop", save=True, show=None)
    losses = dict(zip(map(int, run.metrics.step), run.metrics.loss, strict=True))
    shutil.move(run.path, folder / "run")
    shutil.rmtree(checkpoints.at(folder / "run" / "checkpoints", steps).path)  # the one half-way is what goes on
    kept = {"steps": steps, "save_interval": interval, "versions": stack.versions(), "losses": losses}
    files.write_text(folder / DONE, json.dumps(kept))


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Launch CPU ranks, whatever the machine has."""
    before = project.variable("COURSE_DEVICE")
    os.environ["COURSE_DEVICE"] = "cpu"
    try:
        yield
    finally:
        os.environ.pop("COURSE_DEVICE")
        os.environ |= {"COURSE_DEVICE": before} if before else {}


def read(folder: Path) -> dict[str, Any]:
    """What `make` left: `steps`, `save_interval`, `versions`, `losses` by step, and the path of the `checkpoint`.

    Raises:
        FileNotFoundError: If the folder is not whole.
    """
    kept = json.loads((folder / DONE).read_text(encoding="utf-8"))
    kept["losses"] = {int(step): loss for step, loss in kept["losses"].items()}
    return kept | {"checkpoint": checkpoints.at(folder / "run" / "checkpoints", kept["save_interval"]).path}

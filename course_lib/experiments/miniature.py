"""The stages of nano3 in miniature: what each makes in the folder that `lineage.Store.stage` gives it; for lesson 20.

The configurations of Bridge stay in the lesson: `trained` only runs one, and goes on where a killed attempt had saved.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import launch, runs, stack
from course_lib.common import files
from course_lib.experiments import export, preferences
from course_lib.experiments.lineage import Artifact
from course_lib.runs import checkpoints
from course_lib.text import corpus, indexed, ladder, microscope, tasks, tokenizers

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from nemo_curator.stages.text.filters import DocumentFilter

__all__ = [
    "aligned",
    "attempts",
    "blends",
    "checklist",
    "curated",
    "exported",
    "killing",
    "pairs",
    "prefix",
    "raw",
    "read",
    "scheduled",
    "settings",
    "size",
    "tokens",
    "trained",
]

SOURCES, SPLITS = ("prose", "code"), corpus.SPLITS[:2]
VOCAB_SIZE = 2048
JSONL = {"train": "training", "validation": "validation", "test": "test"}
"""Bridge's names for the files of each split; Source: megatron-bridge `data/builders/gpt_sft.py` @ 0.6.2."""


def raw(folder: Path) -> Path:
    """What this Python carries: prose and code, cleaned and split by module, one JSONL a source and split."""
    return corpus.python_library(folder / "corpus").directory


def curated(text: Path, folder: Path, filters: Sequence[DocumentFilter]) -> Path:
    """What NeMo Curator's filters keep, source by source; `kept.json` says how many after each."""
    import pandas as pd
    from nemo_curator.stages.text.filters import ScoreFilter
    from nemo_curator.tasks import DocumentBatch

    built, kept = corpus.Built(text), {}
    for source in SOURCES:
        for split in SPLITS:
            frame = pd.DataFrame(built.documents(source, split))
            batch = DocumentBatch(dataset_name=source, data=frame)
            counts = [len(frame)]
            for each in filters:
                found = ScoreFilter(each).process(batch)
                batch = found or DocumentBatch(dataset_name=source, data=frame.iloc[:0])
                counts.append(len(batch.to_pandas()))
            left = batch.to_pandas()
            left.to_json(folder / f"{source}.{split}.jsonl", orient="records", lines=True, force_ascii=False)
            kept[f"{source}.{split}"] = counts
    runs.write_json(folder / "kept.json", kept)
    return folder


def tokens(text: Path, folder: Path, weights: Mapping[str, float]) -> Path:
    """A BPE that saw the training part alone, `.bin` and `.idx` of each source and split, and the blend."""

    def texts(source: str, split: str) -> list[str]:
        lines = (text / f"{source}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    known = {(source, split): texts(source, split) for source in SOURCES for split in SPLITS}
    learned = [each for (_, split), some in known.items() if split == "train" for each in some]
    tokenizers.train_bpe(learned, folder / "tokenizer", vocab_size=VOCAB_SIZE)
    encoder, count = tokenizers.load(folder / "tokenizer"), {}
    for (source, split), some in known.items():
        count[f"{source}-{split}"] = indexed.write_texts(some, prefix(folder, source, split), tokenizer=encoder).tokens
    blend = {split: [[share, f"{source}-{split}"] for source, share in weights.items()] for split in SPLITS}
    runs.write_json(folder / "blend.json", blend)
    runs.write_json(folder / "tokens.json", count)
    return folder


def prefix(folder: Path, source: str, split: str) -> Path:
    """Where Megatron finds the ids of one source and split."""
    return folder / f"{source}-{split}"


def blends(folder: Path) -> list[Any]:
    """Megatron's `blend_per_split` of what `tokens` left in a folder: prefixes and weights of each split, and no test data."""
    made = json.loads((folder / "blend.json").read_text())
    mixed = [([str(folder / name) for _, name in made[split]], [share for share, _ in made[split]]) for split in SPLITS]
    return [*mixed, None]


def size(folder: Path) -> tuple[int, int]:
    """How many tokens the training part of such a folder has, and how many ids its tokenizer."""
    train, *_ = blends(folder)
    count = sum(int(microscope.read(Path(place)).lengths.sum()) for place in train[0])
    return count, tokenizers.load(folder / "tokenizer").get_vocab_size()


def pairs(text: Path, folder: Path) -> Path:
    """Signature and docstring of each short function, one JSONL a split, under Bridge's names."""
    for split, some in tasks.docstring_pairs(corpus.Built(text)).items():
        tasks.write(filter(ladder.short, some), folder / f"{JSONL[split]}.jsonl")
    return folder


def read(folder: Path, *splits: str) -> list[tasks.Pair]:
    """The pairs of some splits, in the order of their files."""
    lines = [line for split in splits for line in (folder / f"{JSONL[split]}.jsonl").read_text().splitlines()]
    return [tasks.Pair(**json.loads(line)) for line in lines]


def scheduled(cfg: ConfigContainer, steps: int, rate: float, *, saves: int, seed: int) -> ConfigContainer:
    """The configuration with so many steps, this peak rate that ends at 0, and its last save kept; it is changed in place."""
    cfg.train.train_iters, cfg.rng.seed = steps, seed
    cfg.optimizer.lr, cfg.optimizer.min_lr = rate, 0.0
    cfg.scheduler.lr_warmup_iters = max(1, steps // 10)
    cfg.validation.eval_interval, cfg.validation.eval_iters = steps, 2
    cfg.logger.log_interval = 1
    cfg.checkpoint.save_interval, cfg.checkpoint.most_recent_k = saves, 1
    return cfg


def settings(cfg: ConfigContainer) -> dict[str, Any]:
    """What a training stage depends on besides its inputs, for `lineage.Store.stage`."""
    return {
        "steps": cfg.train.train_iters,
        "seed": cfg.rng.seed,
        "rate": cfg.optimizer.lr,
        "saves": cfg.checkpoint.save_interval,
        "pattern": cfg.model.hybrid_layer_pattern,
    }


def checklist(todo: Mapping[str, bool], plan: Mapping[str, float]) -> str:
    """A line for each thing to be done, with a box that is open or crossed, and one for each planned number.

    Example:
        >>> print(checklist({"it fits": True, "the corpus is long": False}, {"days": 2}))
        [x] it fits
        [ ] the corpus is long
        days: 2.00
    """
    lines = [f"[{'x' if done else ' '}] {what}" for what, done in todo.items()]
    return "\n".join([*lines, *(f"{what}: {value:,.2f}" for what, value in plan.items())])


def trained(
    cfg: ConfigContainer,
    folder: Path,
    *,
    name: str,
    ranks: int = stack.LESSON_RANKS,
    watch: Callable[[runs.Run], object] | None = None,
) -> Path:
    """The checkpoint of this configuration; a killed attempt is gone on with, from its last whole save.

    Args:
        folder: Where the attempts are written down.
        name: Of the run directory.
        watch: As for `launch.run`.
    """
    place = folder / "attempts.json"
    earlier = [path for path in _attempts(place) if (path / "launch.json").is_file()]
    saved = None
    for path in reversed(earlier):
        with contextlib.suppress(checkpoints.NoCheckpoint, checkpoints.WrongCheckpoint):
            saved = checkpoints.require(runs.Run(path)).path
            print(f"{name}: going on with what {path.name} had saved")
            break

    def noted(run: runs.Run) -> None:
        if run.path not in earlier:
            earlier.append(run.path)
            runs.write_json(place, [str(path) for path in earlier])
        if watch:
            watch(run)

    run = launch.run(cfg, ranks=ranks, name=name, save=True, load=saved, show=None, watch=noted)
    return checkpoints.require(run).path.parent


def killing(*, rank: int, after_steps: int) -> Callable[[runs.Run], None]:
    """A `watch` that sends SIGKILL to one rank once so many steps are done."""

    def watch(run: runs.Run) -> None:
        if len(run.metrics) >= after_steps:
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.ranks()[rank]["pid"], signal.SIGKILL)

    return watch


def attempts(model: Artifact) -> list[runs.Run]:
    """The runs that led to a model, the killed ones first."""
    folder = Path(model.metadata["folder"]) if "folder" in model.metadata else None
    if folder is None:
        raise ValueError(f"{model.ref} was not made by a stage: nobody wrote down its attempts")
    return [runs.Run(path) for path in _attempts(folder / "attempts.json")]


def _attempts(place: Path) -> list[Path]:
    return [Path(path) for path in json.loads(place.read_text())] if place.is_file() else []


def exported(checkpoint: Path, folder: Path) -> Path:
    """The Hugging Face folder of a checkpoint, whose logits transformers computes as Bridge does."""
    return export.model(checkpoint, folder / "hugging-face").folder


def aligned(start: Path, rows: Path, folder: Path, *, seed: int, **dpo: Any) -> Path:
    """What TRL's DPO makes of a Hugging Face folder, on docstrings before the same with one fault.

    Args:
        start: The fine-tuned model.
        rows: The folder of pairs.
        seed: Of the faults and of the order.
        dpo: Arguments of TRL's `DPOConfig`.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    preferences.quiet()
    some = preferences.preferences(read(rows, "train"), seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None  # the prompts end with the separator already
    common = {"output_dir": str(folder / "trl"), "save_strategy": "no", "report_to": "none", "seed": seed}
    common |= {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    data = Dataset.from_list([asdict(row) for row in some])
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each step of the way
        trainer = DPOTrainer(
            export.loaded(start), args=DPOConfig(**common | dpo), train_dataset=data, processing_class=tokenizer
        )
        with preferences.recorded(trainer, name="miniature-dpo", show=None) as run:
            trainer.train()
    with files.replacing_folder(folder / "hugging-face") as half:
        trainer.save_model(str(half))
        AutoTokenizer.from_pretrained(start).save_pretrained(half)  # with its own padding and template
        runs.write_json(half / "run.json", run.name)
    return folder / "hugging-face"

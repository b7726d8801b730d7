"""Lesson 13: the rank of an adapter, an adapter for attention alone, and pairs whose index is that of others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from course_lib import stack
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.runs import Run, checkpoints
from course_lib.text import microscope

__all__ = ["attention_alone", "largest_rank", "mended_pairs", "rewritten_pairs"]

ATTENTION = {"linear_qkv", "linear_proj"}
SHARE = 0.05


def largest_rank(answer: int, parameters: int, parameters_per_rank: float) -> Verdict:
    """Which is the largest rank whose adapter has less than 5% of the model's parameters?"""
    limit = SHARE * parameters / parameters_per_rank
    largest = int(limit) - (limit == int(limit))
    return value(
        answer,
        largest,
        why="an adapter grows with its rank, so the limit is 5% of the model over what one rank costs, rounded down.",
        otherwise="What does one rank cost? The adapter's weights are printed above; divide them by its rank.",
        hints=[
            (largest + 1, "That is the first rank above 5%."),
            (limit, "A rank is a whole number: how many columns can a matrix have?"),
        ],
    )


def attention_alone(answer: Run | str, base: Run) -> Verdict:
    """Has this run trained an adapter on attention's two matrices and on nothing else, from this base?"""
    run = own_run(answer)
    peft = run.config.get("peft") or {}
    if not peft:
        return wrong("This run trained every weight: its configuration has no `peft`.")
    if Path(run.config["checkpoint"].get("pretrained_checkpoint") or "") != checkpoints.root(base):
        return wrong("This run started from another checkpoint than the base: look at `pretrained_checkpoint`.")
    adapted = set(peft["target_modules"])
    if adapted != ATTENTION:
        more = sorted(adapted - ATTENTION)
        return wrong(
            f"This adapter is also on {', '.join(more)}; which field of LoRA names the matrices?"
            if more
            else f"This adapter is on {', '.join(sorted(adapted))} alone, and attention has two matrices."
        )
    return right("the adapter is on attention's two matrices, and the feed-forward part is as the base has it.")


def rewritten_pairs(pairs: Path, folder: Path) -> Path:
    """A folder of pairs whose index of lines was made before the pairs were written again.

    Args:
        pairs: Folder with good `training.jsonl` and `validation.jsonl`.
        folder: Where the broken one goes; what stands there is written over.
    """
    stack.prepare_imports()
    from megatron.bridge.data.datasets.utils import build_index_files

    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.idx.*"):
        left.unlink()
    for name in ("training", "validation"):
        lines = (pairs / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with stack.quietly():
            build_index_files([str(folder / f"{name}.jsonl")], ord("\n"), workers=1)
        (folder / f"{name}.jsonl").write_text("\n".join(map(_cleaned, lines)) + "\n", encoding="utf-8")
    return folder


def _cleaned(line: str) -> str:
    row: dict[str, Any] = json.loads(line)
    row["input"] = row["input"].partition(": ")[2] or row["input"]
    return json.dumps(row)


def mended_pairs(answer: Path | str) -> Verdict:
    """Are the pairs in this folder the cleaned ones, and is no index left that is not theirs?"""
    if not isinstance(answer, str | os.PathLike):
        raise Unfit(f"a folder is asked for, a path; yours is of type {type(answer).__name__}")
    place = Path(answer)
    text = place / "training.jsonl"
    if not text.is_file():
        return wrong("There is no training.jsonl: the pairs themselves were good.")
    first = json.loads(text.read_text(encoding="utf-8").splitlines()[0])
    if not first["input"].startswith("def "):
        return wrong("These are last week's pairs: the cleaned ones begin with the signature itself.")
    try:
        microscope.require({"dataset": {"dataset_root": str(place)}, "model": {}})
    except microscope.ForeignFile as error:
        return wrong(f"An index is left that was made of other lines. {error}")
    return right("Bridge finds no index and makes one of the lines that are there.")

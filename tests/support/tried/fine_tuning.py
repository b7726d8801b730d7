"""Answers to the exercises of lesson 13."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_lib.lesson.exercises import fine_tuning
from support import tried
from support.tried import Tried


def largest_rank(folder: Path) -> Tried:
    """One rank too many, and a fraction of one."""
    return Tried(
        6,
        [(7, "first rank above"), (0.05 * 1_000_000 / 8_000, "whole number"), (4, "one rank cost")],
        [1_000_000, 8_000],
    )


def attention_alone(folder: Path) -> Tried:
    """All four matrices, no adapter, half of attention, and another base."""
    base = tried.run(folder, "base")
    checkpoint = {"pretrained_checkpoint": str(base.path / "checkpoints")}

    def trained(name: str, targets: list[str] | None, start: dict[str, str] = checkpoint) -> Any:
        return tried.run(folder, name, config={"peft": targets and {"target_modules": targets}, "checkpoint": start})

    attention = ["linear_qkv", "linear_proj"]
    wrong = [
        (trained("four", [*attention, "linear_fc1", "linear_fc2"]), "also on linear_fc1, linear_fc2"),
        (trained("full", None), "trained every weight"),
        (trained("half", attention[:1]), "attention has two matrices"),
        (trained("other", attention, {"pretrained_checkpoint": "elsewhere"}), "another checkpoint than the base"),
    ]
    return Tried(trained("mine", attention), wrong, [base])


def mended_pairs(folder: Path) -> Tried:
    """Nothing done, the old pairs put back, and everything thrown away."""
    good = folder / "good"
    good.mkdir()
    rows = [{"input": f"json.f{n}: def f{n}(a)", "output": "Return a."} for n in range(3)]
    for name in ("training", "validation"):
        (good / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken, empty = fine_tuning.rewritten_pairs(good, folder / "broken"), folder / "empty"
    empty.mkdir()
    mended = fine_tuning.rewritten_pairs(good, folder / "mended")
    for left in mended.glob("*.idx.*"):
        left.unlink()
    wrong = [(broken, "An index is left"), (good, "last week's pairs"), (str(empty), "no training.jsonl")]
    return Tried(mended, wrong)

"""Answers to the exercises of lesson 14."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from course_lib import runs
from course_lib.experiments import preferences
from course_lib.lesson.exercises import alignment
from course_lib.text import tasks
from support.tried import Tried, run

ROWS = preferences.preferences(
    [tasks.Pair(f"m.f{n}: def f{n}(x)", f"Return the number {'x' * n} of things.", "m") for n in range(1, 30)], seed=1
)


def aligned(folder: Path, name: str, *, chosen: float, share: float = 0.95, loss: str = "sigmoid") -> runs.Run:
    """A DPO run with beta 0.1 and an evaluation at its end."""
    made = run(
        folder, name, config={"trainer": {"beta": 0.1, "loss_type": [loss]}}, launch={"trainer": "DPOTrainer"},
        rewards_chosen=[0.0, -4.0, chosen],
    )  # fmt: skip
    row = {"step": 3, "loss": 0.4, "rewards_accuracies": share, "rewards_chosen": chosen}
    (made.path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    return runs.Run(made.path)


def lowest_chosen(folder: Path) -> Tried:
    """The reward itself, the sign, and the last step."""
    one = aligned(folder, "alone", chosen=-3.0)
    wrong = [(4.0, "beta times nats"), (-40.0, "a positive number"), (30.0, "the last step"), (0.4, "divide by it")]
    return Tried(40.0, wrong, [one])


def gentler_run(folder: Path) -> Tried:
    """The same run again, one that hardly learned, one with a second term, and no DPO run at all."""
    alone = aligned(folder, "alone", chosen=-3.0)
    wrong = [
        (alone, "lose 30.0 nats, of 15.0 at most"),
        (aligned(folder, "hardly", chosen=-0.1, share=0.6), "60% of the pairs"),
        (aligned(folder, "mended", chosen=-0.2, loss="sft"), "without a second term"),
        (run(folder, "other"), "a DPO run with an evaluation"),
    ]
    return Tried(aligned(folder, "early", chosen=-1.0), wrong, [alone])


def mended_rows(folder: Path) -> Tried:
    """Nothing done, answers alone put right, rows thrown away, and a prompt emptied."""
    broken = alignment.mixed_up(ROWS, 1)
    pairs = zip(broken, ROWS, strict=True)
    half = [dataclasses.replace(one, chosen=row.chosen, rejected=row.rejected) for one, row in pairs]
    emptied = [dataclasses.replace(ROWS[0], prompt=""), *ROWS[1:]]
    wrong = [(broken, "have a fault still"), (half, "the separator twice"), (ROWS[:9], "none has to go")]
    return Tried(list(ROWS), [*wrong, (emptied, "what else was changed"), ("rows", "a list of preferences")], [broken])

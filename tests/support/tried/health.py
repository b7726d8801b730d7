"""Answers to the exercises of lesson 08."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from course_lib.common.units import GiB, MiB
from course_lib.lesson.exercises import health
from course_lib.reading import health as signs
from support import tried
from support.tried import Tried


def steps_until_full(folder: Path) -> Tried:
    """GB for GiB, and the growth of one rank shared by all."""
    return Tried(128, [(119, "10**9"), (16, "nobody shares"), (64, "same unit")], [2 * GiB, 16 * MiB])


def tamed(folder: Path) -> Tried:
    """The hot rate once more, a second change, one that still jumps, and one that hardly moves."""

    def run(name: str, rate: float, losses: list[float], steps: int = 16) -> Any:
        config = {"optimizer": {"lr": rate}, "train": {"train_iters": steps}, "model": {"hidden_size": 256}}
        return tried.run(folder, name, losses=losses, config=config)

    falling = [9.0 - step / 10 for step in range(16)]
    jumping = [9.0, 8.0, 8.5] + [9.0 + step for step in range(13)]
    wrong = [
        (run("same", 0.4, falling), "peak learning rate is 0.4"),
        (run("two", 0.1, falling, steps=20), "train.train_iters"),
        (run("lower", 0.2, jumping), "lower yet"),
        (run("still", 1e-6, [9.0] * 16), "too small"),
    ]
    return Tried(run("yours", 2e-3, falling), wrong, [run("hot", 0.4, [9.0] * 15 + [8.9])])


def diagnoses(folder: Path) -> Tried:
    """Two exchanged, all the same, and one left out; what the signs of the lesson say of each run is what it has."""
    found = health.sick_runs(folder)
    looks = {
        name: [
            sign for sign, row in signs.symptoms(run, vocab_size=health.VOCABULARY).iterrows() if row.verdict == "look"
        ]
        for name, run in found.items()
    }
    assert [len(each) for each in looks.values()] == [1, 2, 1], looks
    right = dict(health.SICK)
    wrong = [
        (right | {"run-a": right["run-b"], "run-b": right["run-a"]}, "run-a: hold its very first loss"),
        (dict.fromkeys(right, "one rank keeps memory"), "run-a: hold its very first loss"),
        (right | {"run-b": "steps are skipped"}, "lowest point"),
        (right | {"run-c": "learning rate too high"}, "what each rank holds"),
        ({"run-a": right["run-a"]}, "Not judged"),
    ]
    return Tried(right, wrong)

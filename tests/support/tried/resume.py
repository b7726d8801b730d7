"""Answers to the exercises of lesson 10."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

from course_lib.lesson.exercises import resume
from course_lib.runs import checkpoints
from support import tried
from support.tried import Tried


def end_of_the_decay(folder: Path) -> Tried:
    """The field that moves the end, the end where it lies by itself, and the warm-up."""
    cfg = Some(train=Some(train_iters=24))
    wrong = [
        (("train_iters", 30), "field of `cfg.train`"),
        (("lr_decay_iters", 30), "by itself"),
        (("lr_warmup_iters", 0), "warm-up lies behind"),
        (("lr_decay_iters", 18), "where did their decay end"),
    ]
    return Tried(("lr_decay_iters", 24), wrong, [cfg, 6])


def longer_run(folder: Path) -> Tried:
    """A run from the beginning, one that is too short, and one whose decay moved."""

    def run(name: str, first: int, last: int, *, shift: float = 0.0) -> Any:
        steps = range(first, last + 1)
        found = tried.run(folder, name, losses=[7 - step / 10 + (step > 6) * shift for step in steps])
        file = found.path / "metrics.jsonl"
        lines = file.read_text().splitlines()
        moved = [
            line.replace(f'"step": {number}', f'"step": {step}', 1)
            for number, (step, line) in enumerate(zip(steps, lines, strict=True), 1)
        ]
        file.write_text("\n".join(moved) + "\n")
        return found

    wrong = [
        (run("anew", 1, 12), "begins with step 1"),
        (run("short", 4, 9), "ends with step 9"),
        (run("decay", 4, 12, shift=1e-3), "other learning rates"),
    ]
    return Tried(run("yours", 4, 12), wrong, [run("whole", 1, 9), 3, 3])


def tracker_that_works(folder: Path) -> Tried:
    """Nothing mended, an older whole one, and the torn one deleted with the tracker left."""
    from torch.distributed.checkpoint.metadata import Metadata

    for step in (6, 12, 23):
        place = folder / "saved" / f"iter_{step:07d}"
        place.mkdir(parents=True)
        for name in ("metadata.json", "common.pt"):
            (place / name).write_text("{}")
        if step != 23:
            (place / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))

    def directory(name: str, tracker: int | None = None) -> Path:
        place = resume.misled(folder / "saved", folder / name)
        if tracker is not None:
            (place / checkpoints.TRACKERS[1]).write_text(str(tracker))
        return place

    deleted = directory("deleted")
    (deleted / "iter_0000023" / "metadata.json").unlink()
    (deleted / "iter_0000023" / "common.pt").unlink()
    (deleted / "iter_0000023").rmdir()
    wrong = [
        (directory("same"), "which is torn"),
        (directory("older", 6), "12 is whole as well"),
        (deleted, "which is not there"),
    ]
    return Tried(directory("mended", 12), wrong)

"""Answers to the exercises of lesson 10."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

from course_lib.lesson.exercises import resume
from course_lib.runs import checkpoints
from support import tried
from support.tried import Tried


def last_step(folder: Path) -> Tried:
    """As many steps as before, half of all, and those that are left."""
    cfg = Some(train=Some(train_iters=24))
    wrong = [(24, "twice as many sequences"), (12, "only the rest is halved"), (9, "goes on counting"), (3, "are left")]
    return Tried(15, wrong, [cfg, 6])


def doubled_batch(folder: Path) -> Tried:
    """The old batch, a run from the beginning, one that reads too much, and one whose decay was counted in steps."""

    def run(name: str, first: int, last: int, *, batch: int = 16, rate: Callable[[int], float]) -> Any:
        steps = range(first, last + 1)
        cfg = {"train": {"global_batch_size": batch}}
        losses = [7 - step / 10 for step in steps]
        return tried.run(folder, name, losses=losses, config=cfg, step=[*steps], learning_rate=[*map(rate, steps)])

    def by_sequences(step: int) -> float:
        return 1e-3 - 1e-5 * (48 + 16 * (step - 6))

    whole = run("whole", 1, 24, batch=8, rate=lambda step: 1e-3 - 1e-5 * 8 * step)
    wrong = [
        (run("small", 7, 24, batch=8, rate=by_sequences), "16 were asked for"),
        (run("anew", 1, 15, rate=by_sequences), "begins with step 1"),
        (run("long", 7, 24, rate=by_sequences), "336 sequences are read, and 192"),
        (run("decay", 7, 15, rate=lambda step: 1e-3 - 1e-5 * 8 * step), "After step 7 the learning rate"),
    ]
    return Tried(run("yours", 7, 15, rate=by_sequences), wrong, [whole, 6])


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

"""Answers to the exercises of lesson 09."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace as Some

from course_lib.lesson.exercises import comparison
from course_lib.runs import Run
from support import tried
from support.tried import Tried


def steps_at_equal_tokens(folder: Path) -> Tried:
    """As many steps as before, and twice as many."""
    cfg = Some(train=Some(train_iters=30, global_batch_size=16))
    return Tried(15, [(30, "may be the text's"), (60, "other way round"), (8, "keep that product")], [cfg, 32])


def fair_batches(folder: Path) -> Tried:
    """Twice the text, one seed, another batch, and a second change."""

    def group(
        name: str, batch: int, steps: int, *, rate: float = 1e-3, losses: tuple[float, ...] = (6.0, 6.1, 6.2)
    ) -> list[Run]:
        config = {"train": {"global_batch_size": batch, "train_iters": steps}, "optimizer": {"lr": rate}}
        found = []
        for seed, loss in enumerate(losses):
            run = tried.run(folder, f"{name}-seed{seed}", config=config)
            (run.path / "validation.jsonl").write_text(json.dumps({"step": steps, "loss": loss}) + "\n")
            found.append(run)
        return found

    wrong = [
        (group("long", 32, 30), "was it the batch, or the text"),
        (group("one", 32, 15, losses=(6.0,)), "a single seed"),
        (group("same", 16, 30), "The batch is 16"),
        (group("two", 32, 15, rate=2e-3), "optimizer.lr"),
    ]
    return Tried(group("yours", 32, 15), wrong, [group("base", 16, 30), 32])


def verdicts_of_a_report(folder: Path) -> Tried:
    """All as the colleague says, all by the means, and nothing believed."""
    report = comparison.colleagues_report()
    right = {
        "longer warm-up": "no difference beyond noise",
        "wider feed-forward": "better",
        "another initialization": "no verdict",
    }
    said = {name: words for name, (_, _, words) in report.items()}
    believing = right | {"another initialization": "better"}
    nothing = dict.fromkeys(report, "no difference beyond noise")
    wrong = [
        (said, "that interval contains zero"),
        (believing, "one seed has no spread"),
        (nothing, "that interval does not contain zero"),
        ({"longer warm-up": "better"}, "Not judged"),
    ]
    return Tried(right, wrong, [report])

"""Answers to the exercises of lesson 12."""

from __future__ import annotations

import json
from pathlib import Path

from course_lib.lesson.exercises import schedules
from course_lib.reading import pipeline
from course_lib.runs import Run
from support import tried
from support.tried import Tried


def one_f_one_b(stages: int, count: int) -> dict[int, list[str]]:
    """The order of Megatron's schedule without interleaving."""
    order = {}
    for stage in range(stages):
        ahead = min(stages - 1 - stage, count)
        passes = [f"F{n}" for n in range(ahead)]
        for n in range(count):
            passes += [f"F{ahead + n}"] * (ahead + n < count) + [f"B{n}"]
        order[stage] = passes
    return order


def microbatches(folder: Path) -> Tried:
    """Twice as many stages, twice as many microbatches; and as many as before."""
    return Tried(24, [(16, "as p does"), (8, "longer to fill"), (30, "the same")], [4, (2, 8)])


def piped(folder: Path, stages: int, count: int, *, recorded: bool = True) -> Run:
    """A run with a timeline of 1F1B."""
    config = {"model": {"pipeline_model_parallel_size": stages}}
    launch = {"ranks": stages, "layout": {"pipeline_model_parallel_size": stages}}
    run = tried.run(folder, f"pp{stages}-m{count}-{recorded}", config=config, launch=launch)
    if recorded:
        rows = pipeline.replay(schedules._rows(one_f_one_b(stages, count)))
        lines = rows.rename(columns={"stage": "rank"}).assign(step=3).to_dict("records")
        (run.path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def longer_pipeline(folder: Path) -> Tried:
    """Too few microbatches, the old number of stages, and no recording."""
    before = piped(folder, 2, 4)
    wrong = [
        (piped(folder, 4, 8), "With 8 microbatches"),
        (piped(folder, 2, 12), "PP is 2"),
        (piped(folder, 4, 12, recorded=False), "record=True"),
    ]
    return Tried(piped(folder, 4, 12), wrong, [4, before])


def one_forward_one_backward(folder: Path) -> Tried:
    """The order that was given, one microbatch at a time, one that waits for ever, and a missing pass."""
    given = schedules.all_forward_first(3, 4)
    alone = {stage: [f"{kind}{n}" for n in range(4) for kind in "FB"] for stage in range(3)}
    stuck = one_f_one_b(3, 4) | {2: ["B0", "F0", "F1", "B1", "F2", "B2", "F3", "B3"]}
    missing = one_f_one_b(3, 4) | {2: ["F0", "B0"]}
    wrong = [
        (given, "Stage 0 keeps the activations of 4"),
        (alone, "several forward passes"),
        (stuck, "wait for each other"),
        (missing, "Stage 2 has to have"),
    ]
    return Tried(one_f_one_b(3, 4), wrong, [given])

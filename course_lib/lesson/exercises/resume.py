"""Lesson 10: the last step of a run, a batch that is doubled on resume, and a tracker that names a torn checkpoint."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from course_lib import runs
from course_lib.common import config
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.runs import checkpoints

BATCH = "train.global_batch_size"


def last_step(answer: int, cfg: Any, save_interval: int) -> Verdict:
    """With which step ends a run that doubles its batch at this one, and reads as many sequences as were planned?

    Args:
        answer: The step.
        cfg: The configuration with the smaller batch.
        save_interval: Step of the checkpoint.
    """
    planned = cfg.train.train_iters
    left = planned - save_interval
    return value(
        answer,
        save_interval + left // 2,
        why="the steps before the checkpoint are done, and half as many of the others read the same sequences.",
        otherwise="How many sequences are left at the checkpoint, and how many does a step read from there on?",
        hints=[
            (planned, "With twice the batch and as many steps the rest of the run reads twice as many sequences."),
            (planned // 2, "The steps before the checkpoint were taken with the small batch: only the rest is halved."),
            (left // 2, "So many steps are left; a run that resumes goes on counting."),
        ],
    )


def doubled_batch(answer: runs.Run | str, whole: runs.Run, save_interval: int) -> Verdict:
    """Which run goes on from the first save of `whole` with twice the batch, its sequences and its learning rates?

    Args:
        answer: A run that loaded the checkpoint.
        whole: The run that saved it.
        save_interval: Step of the checkpoint.
    """
    run = own_run(answer)
    batch, before = (config.value(one.config, BATCH) for one in (run, whole))
    if batch != 2 * before:
        return wrong(f"A step of that run reads {batch} sequences, and {2 * before} were asked for.")
    first, last, end = int(run.metrics.step.min()), int(run.metrics.step.max()), int(whole.metrics.step.max())
    if first != save_interval + 1:
        return wrong(f"It begins with step {first}, and the checkpoint is of step {save_interval}: was it loaded?")
    read = save_interval * before + (last - save_interval) * batch
    if read != end * before:
        return wrong(f"By its end {read} sequences are read, and {end * before} were planned: see exercise 1.")
    theirs = whole.metrics.set_index("step").learning_rate
    for step, rate in run.metrics.set_index("step").learning_rate.items():
        as_far = save_interval + 2 * (step - save_interval)
        if not math.isclose(rate, theirs[as_far], rel_tol=1e-6):
            return wrong(
                f"After step {step} the learning rate is {rate:.3g}, and after as many sequences it was "
                f"{theirs[as_far]:.3g}: `cfg.scheduler` counts its warm-up and its decay in steps, Megatron in sequences."
            )
    return right(f"{last - first + 1} steps read the rest, and the rate falls with the sequences as before.")


def misled(source: Path, folder: Path) -> Path:
    """A copy of a directory of checkpoints whose tracker names the newest one, which is torn.

    Args:
        source: The directory of checkpoints.
        folder: Where the copy goes; what stood there is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    for name in checkpoints.TRACKERS:
        (folder / name).unlink(missing_ok=True)
    newest = max(checkpoints.listing(folder).index)
    (folder / checkpoints.TRACKERS[1]).write_text(str(newest), encoding="utf-8")
    return folder


def tracker_that_works(answer: Path | str) -> Verdict:
    """Does a run that loads this directory begin after the newest whole checkpoint?"""
    if not isinstance(answer, str | os.PathLike):
        raise Unfit("the directory of checkpoints that you mended is asked for")
    table = checkpoints.listing(Path(answer))
    whole = [step for step, missing in table.missing.items() if not missing]
    try:
        found = checkpoints.latest(Path(answer))
    except checkpoints.NoCheckpoint as error:
        return wrong(str(error))
    if found.missing:
        return wrong(f"The tracker names step {found.step}, which is torn: {found.missing[0]}")
    if found.step < max(whole):
        return wrong(
            f"The tracker names step {found.step}; {max(whole)} is whole as well, and fewer steps would be done twice."
        )
    return right(f"a run that loads this directory begins with step {found.step + 1}.")

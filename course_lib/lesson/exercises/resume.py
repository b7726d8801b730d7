"""Lesson 10: where a decay ends, a run that was made longer, and a tracker that names a torn checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from course_lib import runs
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, wrong
from course_lib.runs import checkpoints


def end_of_the_decay(answer: tuple[str, int], cfg: Any, more: int) -> Verdict:
    """Which field of the scheduler keeps the learning rates of a run that is made longer, and with which value?

    Args:
        answer: A field of `cfg.scheduler`, and its value.
        cfg: The configuration of the shorter run.
        more: Steps by which it is made longer.
    """
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != 2:
        raise Unfit('a pair is asked for, a field of `cfg.scheduler` and its value, such as `("lr_warmup_iters", 2)`')
    field, steps = answer
    planned = cfg.train.train_iters
    if field == "train_iters":
        return wrong("That is a field of `cfg.train`, and the one that moves the end of the decay along.")
    if field == "lr_warmup_iters":
        return wrong("The warm-up lies behind a run that resumes; which field says where the decay ends?")
    if field != "lr_decay_iters":
        return wrong("Which field of the scheduler says where the decay of the learning rate ends?")
    if steps == planned + more:
        return wrong(
            "That is where it ends by itself, with the longer `train_iters`; the rates of the steps before then change."
        )
    if steps != planned:
        return wrong(f"The first {planned} steps must get the rates that they had: where did their decay end?")
    return right("the decay ends where it did, and the additional steps get the lowest rate.")


def longer_run(answer: runs.Run | str, whole: runs.Run, more: int, save_interval: int) -> Verdict:
    """Which run goes on from the first save of `whole`, repeats its steps, and takes so many more?

    Args:
        answer: A run that loaded the checkpoint.
        whole: The run that saved it.
        more: Steps that it takes beyond the end of `whole`.
        save_interval: Step of the checkpoint.
    """
    run = own_run(answer)
    first, last = int(run.metrics.step.min()), int(run.metrics.step.max())
    end = int(whole.metrics.step.max())
    if first != save_interval + 1:
        return wrong(f"It begins with step {first}, and the checkpoint is of step {save_interval}: was it loaded?")
    if last != end + more:
        return wrong(f"It ends with step {last}, and {end} + {more} were asked for.")
    distance = runs.difference(run, whole)
    bound = 0.0 if whole.launch["device"] == "cpu" else runs.GPU_ROUNDING
    if not distance <= bound:
        hint = "a longer run has other learning rates, unless the end of the decay is set."
        return wrong(f"Up to step {end}, losses or gradient norms differ by {distance:.1e} of their size: {hint}")
    return right(f"steps {first} to {end} are those of the shorter run, and {more} more follow at the lowest rate.")


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

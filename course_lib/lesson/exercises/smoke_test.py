"""Lesson 03: what a layout leaves for data parallelism, the same training in another layout, and one that is refused."""

from __future__ import annotations

from typing import Any

from course_lib import runs
from course_lib.common import config
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.planning import layout

STAGES = "model.pipeline_model_parallel_size"
BATCH = "train.global_batch_size"


def data_parallel_size(answer: int, tensor_parallel_size: int, ranks: int) -> Verdict:
    """How many copies of the model are there, without a pipeline?"""
    return value(
        answer,
        ranks // tensor_parallel_size,
        why="TP x PP x DP is the world size.",
        otherwise="TP x PP x DP is the world size, and PP is 1.",
        hints=[
            (ranks, "Every rank would hold a whole model then; here each holds a part of one."),
            (tensor_parallel_size, "That is how many ranks share one copy; how many copies are there?"),
        ],
    )


def same_losses(answer: runs.Run | str, before: runs.Run, tensor_parallel_size: int) -> Verdict:
    """Which run trains at this tensor-parallel size what `before` trained at another one?"""
    run = own_run(answer)
    found = run.launch.get("layout", {}).get("tensor_model_parallel_size")
    if found != tensor_parallel_size:
        hint = "`cfg_yours.model.tensor_model_parallel_size` says into how many parts a matrix is cut."
        return wrong(f"TP is {found} in that run: {hint}")
    if run.launch["ranks"] != before.launch["ranks"]:
        return wrong(f"It ran on {run.launch['ranks']} ranks, and the run of above on {before.launch['ranks']}.")
    if len(run.metrics) != len(before.metrics):
        return wrong(f"It has {len(run.metrics)} steps, and the run of above {len(before.metrics)}.")
    distance = runs.difference(run, before)
    if before.launch["device"] == "cpu" and not distance < 1e-4:  # on GPUs the first weights depend on TP
        hint = "something besides the layout was changed; let recipes.diff compare both configurations."
        return wrong(f"Losses or gradient norms differ by {distance:.1e} of their size: {hint}")
    return right(f"TP={found} trains the same, to {distance:.1e} of the size of losses and gradient norms.")


def legal_layout(answer: Any, before: Any, ranks: int) -> Verdict:
    """Which configuration of the same model may start on these ranks, as a pipeline?

    Args:
        answer: The configuration, mended.
        before: The one whose model it has to keep.
        ranks: So many ranks.
    """
    if not config.has(answer, STAGES):
        raise Unfit(f"a configuration is asked for, the mended `cfg_broken`; yours is of type {type(answer).__name__}")
    try:
        sizes = layout.require(answer, ranks)
    except layout.LayoutError as error:
        return wrong(str(error))
    if sizes.pipeline_model_parallel_size == 1:
        return wrong("It may start, and without the pipeline that your colleague wants to try: PP has to be above 1.")
    mine, theirs = config.flatten(answer), config.flatten(before)
    other = sorted(field for field in theirs if mine.get(field) != theirs[field] and field not in (STAGES, BATCH))
    if other:
        return wrong(f"It may start, and it is another training: {', '.join(other[:3])} changed as well.")
    return right(
        f"{sizes} divides the {ranks} ranks, the layers and the batch of {config.value(answer, BATCH)} sequences."
    )

"""Who sends what to whom: what a recorded run sent, and the closed form that says it beforehand.

Sizes are those of the whole that an operation moves: the output of an all-gather, the input of a reduce-scatter, the
tensor of an all-reduce.  `messages.sent_bytes` turns them into what one rank has to send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_lib.common.config import Fields
from course_lib.planning.closed_forms import has_experts
from course_lib.planning.messages import KEY, expected
from course_lib.reading import experts

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["compare", "recorded"]


def recorded(run: Run, *, rank: int = 0, step: int | None = None) -> pd.DataFrame:
    """What one rank took part in during one step, equal operations counted together.

    Args:
        run: A run that was launched with `record=True`.
        step: The step; the last one by default.

    Returns:
        Rows `phase, operation, group, group_size, bytes, count`: `bytes` is the size of one operation.

    Raises:
        ValueError: If the run was not recorded, or has no such rank or step.
    """
    rows = run.collectives
    if not len(rows):
        raise ValueError(f"run {run.name!r} has no collectives: launch it with launch.run(..., record=True)")
    step = int(rows.step.max()) if step is None else step
    rows = rows[(rows["rank"] == rank) & (rows.step == step)]
    if not len(rows):
        raise ValueError(f"run {run.name!r} recorded nothing of rank {rank} in step {step}")
    return rows.groupby(KEY, sort=False).size().rename("count").reset_index()


def compare(run: Run, *, rank: int = 0, step: int | None = None) -> pd.DataFrame:
    """The recorded operations of one step beside the closed form, of fp32 in CPU ranks and of bf16 on GPUs.

    The closed form is that of CPU ranks.  On GPUs the recipe's loss is one kernel, and gradients and parameters travel
    while layers work, so there its rows of the loss and of data parallelism differ in operation and phase.

    Args:
        run: A run that was launched with `record=True`.
        step: The step; the last one by default.

    Returns:
        Rows `phase, operation, group, group_size, bytes, expected, recorded, why`; the two counts are equal if the
        closed form holds.
    """
    element_bytes = 2 if run.launch.get("device") == "cuda" else 4
    fields, ranks = Fields.of(run.config), run.launch["ranks"]
    if element_bytes == 4 and fields.model("moe_token_dispatcher_type") == "flex":  # as CPU ranks replace it
        fields = Fields(run.config, {"model.moe_token_dispatcher_type": "alltoall"})
    routed = has_experts(fields) and fields.model("moe_token_dispatcher_type") == "alltoall"
    arriving = experts.arriving(run, rank=rank, step=step) if routed else None
    planned = expected(fields, ranks=ranks, rank=rank, element_bytes=element_bytes, arriving=arriving)
    found = recorded(run, rank=rank, step=step)
    planned = planned.groupby(KEY, sort=False).agg(expected=("count", "sum"), why=("why", "first")).reset_index()
    both = planned.merge(found.rename(columns={"count": "recorded"}), on=KEY, how="outer", sort=False)
    both[["expected", "recorded"]] = both[["expected", "recorded"]].fillna(0).astype(int)
    return both[[*KEY, "expected", "recorded", "why"]].fillna({"why": "not in the closed form"})

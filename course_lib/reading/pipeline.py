"""When does each pipeline stage work, and how much of a step does it wait?

A recorded run has real timestamps.  On a machine whose ranks share cores those show the sharing too, so `replay` puts the
same passes, in the same order and each with the median processor time of its kind, on cores of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_lib.planning.layout import rank_grid
from course_lib.planning.layout.sizes import Layout

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["bubble_share", "idle_share", "one_forward_one_backward", "passes", "replay"]


def bubble_share(stages: int, microbatches: int, *, chunks: int = 1) -> float:
    """Which share of a step does a stage wait, if all passes of a kind take equally long and transfers take no time?

    Args:
        chunks: Model chunks v of each stage; more than 1 is interleaving.

    Returns:
        (p - 1) / (v m + p - 1).

    Raises:
        ValueError: If a number is below 1.

    Source: Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM" (2021),
    section 2.2, which divides the waiting by the work; this is the waiting as a share of the whole step.

    >>> bubble_share(2, 4), round(bubble_share(4, 8), 3), bubble_share(2, 4, chunks=2) < bubble_share(2, 4)
    (0.2, 0.273, True)
    """
    if min(stages, microbatches, chunks) < 1:
        raise ValueError(f"stages={stages}, microbatches={microbatches} and chunks={chunks} must be at least 1")
    return (stages - 1) / (chunks * microbatches + stages - 1)


def one_forward_one_backward(stages: int, microbatches: int, *, backward: float = 1.0) -> pd.DataFrame:
    """The passes of a step in the order 1F1B, for `replay`: a forward pass takes 1, a backward pass `backward`.

    A stage does as many forward passes ahead as there are stages after it, and alternates then.

    Source: megatron-core 0.19.2, `forward_backward_pipelining_without_interleaving` in `pipeline_parallel/schedules.py`.

    >>> replay(one_forward_one_backward(2, 1)).end.tolist()
    [1.0, 4.0, 2.0, 3.0]
    """
    import pandas as pd

    rows = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, microbatches)
        order = [("forward", number) for number in range(ahead)]
        for number in range(microbatches):
            order += [("forward", number + ahead)] if number + ahead < microbatches else []
            order.append(("backward", number))
        lasts = {"forward": 1.0, "backward": backward}
        rows += [(stage, kind, number, 0, 0.0, 0.0, lasts[kind]) for kind, number in order]
    return pd.DataFrame(rows, columns=["stage", "kind", "microbatch", "chunk", "begin", "end", "busy_seconds"])


def passes(run: Run, *, step: int | None = None) -> pd.DataFrame:
    """The forward and backward passes of one step, in the pipeline that rank 0 belongs to.

    Args:
        run: A run that was launched with `record=True`.
        step: The step; by default the one that took the median time, without the first two.

    Returns:
        Rows `stage, kind, microbatch, chunk, begin, end, busy_seconds`, in the order of begin: `begin` and `end` are
        seconds since the first pass began, `busy_seconds` is the processor time of the pass.

    Raises:
        ValueError: If the run was not recorded.
    """
    rows = run.timeline
    if not len(rows):
        raise ValueError(f"run {run.name!r} has no timeline: launch it with launch.run(..., record=True)")
    if step is None:
        spans = rows.groupby("step").agg(begin=("begin", "min"), end=("end", "max"))
        order = (spans.end - spans.begin).loc[min(3, int(spans.index.max())) :].sort_values()
        step = int(order.index[len(order) // 2])
    pipeline = rank_grid(Layout.from_config(run.config, ranks=run.launch["ranks"]))["pp"][0]
    rows = rows[(rows.step == step) & rows["rank"].isin(pipeline)].sort_values("begin", ignore_index=True)
    start = rows.begin.min()
    rows = rows.assign(stage=rows["rank"].map(pipeline.index), begin=rows.begin - start, end=rows.end - start)
    return rows[["stage", "kind", "microbatch", "chunk", "begin", "end", "busy_seconds"]]


def replay(rows: pd.DataFrame, *, equal_stages: bool = False) -> pd.DataFrame:
    """The same passes with a core for each stage and transfers that take no time.

    Each stage keeps its recorded order.  A forward pass waits for the previous stage's of the same microbatch, a backward
    pass for the next stage's.  A pass takes the median processor time of its kind, stage and chunk.

    Args:
        rows: What `passes` returned.
        equal_stages: Whether a pass takes the median of its kind over all stages and chunks instead.  What is waited for
            then follows from the order alone, and no clock can change it.

    Returns:
        The same columns, with new `begin` and `end`.

    >>> import pandas as pd
    >>> order = [(0, "forward", 0), (1, "forward", 0), (1, "backward", 0), (0, "backward", 0)]
    >>> rows = pd.DataFrame(order, columns=["stage", "kind", "microbatch"]).assign(chunk=0, busy_seconds=1.0)
    >>> replay(rows.assign(begin=[0, 2, 4, 6], end=[1, 3, 5, 7])).end.tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    alike = ["kind"] if equal_stages else ["kind", "stage", "chunk"]
    took = rows.groupby(alike).busy_seconds.transform("median")
    stages = int(rows.stage.max()) + 1
    last_place = stages * (int(rows.chunk.max()) + 1) - 1
    free = dict.fromkeys(range(stages), 0.0)
    done: dict[tuple[str, int, int], float] = {}
    waiting = {stage: list(group.index) for stage, group in rows.groupby("stage")}
    times: dict[int, tuple[float, float]] = {}
    while any(waiting.values()):
        before = len(times)
        for stage, queue in waiting.items():
            while queue:
                row = rows.loc[queue[0]]
                place = row.chunk * stages + stage
                forward = row.kind == "forward"
                needed = [("forward", place - 1)] if forward and place else []
                needed += (
                    [] if forward else [("forward", place), ("backward", place + 1)][: 2 if place < last_place else 1]
                )
                ends = [done.get((kind, where, row.microbatch)) for kind, where in needed]
                if None in ends:
                    break
                begin = max([free[stage], *ends])
                end = begin + took[queue[0]]
                free[stage] = done[row.kind, place, row.microbatch] = end
                times[queue.pop(0)] = (begin, end)
        if len(times) == before:
            raise ValueError("these passes wait for each other: the recording is not of one whole step")
    return rows.assign(begin=[times[i][0] for i in rows.index], end=[times[i][1] for i in rows.index])


def idle_share(rows: pd.DataFrame) -> float:
    """Which share of the time between the first begin and the last end do the stages wait, on average?

    Args:
        rows: What `passes` or `replay` returned.

    Returns:
        A share between 0 and 1.
    """
    span = rows.end.max() - rows.begin.min()
    return float(1 - (rows.end - rows.begin).sum() / (span * rows.stage.nunique()))

"""Which experts the routers of a run chose: the load of each expert, and what it makes a rank receive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_lib.planning.layout import Layout, rank_grid
from course_lib.ranks import routing

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["arriving", "imbalance", "load", "starved"]


def load(run: Run) -> pd.DataFrame:
    """How many tokens chose each expert, summed over ranks and microbatches.

    Args:
        run: A run of a MoE model that was launched with `record="router"` or `record=True`.

    Returns:
        A row a step and layer, a column an expert.  A row sums to tokens x top-k.

    Raises:
        ValueError: If the run was not recorded, with the reason.
    """
    import pandas as pd

    rows = _recorded(run)
    index = pd.MultiIndex.from_frame(rows[["step", "layer"]])
    counts = pd.DataFrame(rows.tokens.tolist(), index=index).rename_axis(columns="expert")
    return counts.groupby(level=["step", "layer"]).sum()


def imbalance(load: pd.DataFrame) -> pd.DataFrame:
    """How many times the mean load has the busiest expert: a row a step, a column a layer.

    1 is perfect balance; experts / top-k is the most, where all tokens choose the same experts.

    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_tuples([(1, 1), (2, 1)], names=["step", "layer"])
    >>> imbalance(pd.DataFrame([[4, 4, 4, 4], [8, 8, 0, 0]], index=index))[1].tolist()
    [1.0, 2.0]
    """
    return (load.max(axis=1) / load.mean(axis=1)).unstack("layer")


def starved(load: pd.DataFrame, *, share: float = 0.1) -> pd.DataFrame:
    """How many experts get less than a share of the mean load: a row a step, a column a layer.

    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_tuples([(1, 1)], names=["step", "layer"])
    >>> int(starved(pd.DataFrame([[40, 30, 29, 1]], index=index)).loc[1, 1])
    1
    """
    return load.lt(share * load.mean(axis=1), axis=0).sum(axis=1).unstack("layer")


def arriving(run: Run, *, rank: int = 0, step: int | None = None) -> list[int]:
    """How many choices arrive at a rank's experts from the routers of its EP group, one number a layer and microbatch.

    Args:
        run: As for `load`.
        rank: Global rank.
        step: The step; the last one by default.

    Raises:
        ValueError: If the run was not recorded, with the reason.
    """
    rows = _recorded(run)
    layout = Layout.from_config(run.config, ranks=run.launch["ranks"])
    group = next(group for group in rank_grid(layout)["ep"] if rank in group)
    share = run.config["model"]["num_moe_experts"] // len(group)
    mine = slice(group.index(rank) * share, (group.index(rank) + 1) * share)
    rows = rows[rows["rank"].isin(group) & (rows.step == (rows.step.max() if step is None else step))]
    arrived = rows.assign(arrived=[sum(tokens[mine]) for tokens in rows.tokens])
    return arrived.groupby(["layer", "microbatch"]).arrived.sum().tolist()


def _recorded(run: Run) -> pd.DataFrame:
    if len(run.router):
        return run.router
    unasked = "it was not asked to: launch it with launch.run(..., record='router')"
    reason = routing.unrecorded(run.config, run.launch["device"]) or unasked
    raise ValueError(f"run {run.name!r} recorded no choices of its routers: {reason}")

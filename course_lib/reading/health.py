"""Is a run healthy?  Six signs, read from its run directory, each with a limit.

The limits are conventions of this course, wide enough for short runs; a sign beyond its limit asks for a look, and
says nothing about the cause.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from course_lib.common.units import MiB
from course_lib.reading import baselines

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["memory_growth", "smoothed", "symptoms"]

SPIKE_NATS = 1.0
"""The average of ten losses may lie this far above its lowest value so far; single batches differ more."""

GRADIENT_RATIO = 5.0
"""The average of ten gradient norms may be this many times the norm of step 1; runs get over a single jump."""

START_NATS = 0.25
"""The first loss may lie so far from `baselines.first_loss`, in nats/token."""

FALL_NATS = 0.1
"""The average of the last ten losses must lie this far below the loss of step 1, or the run has learned nothing."""

GROWTH_BYTES = MiB
"""A rank's memory may grow by this much in a step, over the second half of the run; how much it holds is no excuse."""

_POINTS = 200  # a line through more of them is no better, and the pairs of points grow with the square


def smoothed(values: pd.Series, *, window: int = 10) -> pd.Series:
    """The average of each value and those before it, at most `window` together.

    >>> import pandas as pd
    >>> smoothed(pd.Series([4.0, 2.0, 3.0]), window=2).tolist()
    [4.0, 3.0, 2.5]
    """
    return values.rolling(window, min_periods=1).mean()


def memory_growth(run: Run) -> pd.DataFrame:
    """How fast the memory of each rank grows over the second half of the run.

    Allocators keep what they once had, so every run grows at first, and sometimes by a jump later; a leak goes on.
    The slope is the median of those between all pairs of steps (Theil and Sen), which a jump hardly moves.

    Args:
        run: A run with `memory` of at least four steps.

    Returns:
        One row a rank, indexed by it: `bytes_per_step`, and `at_least`, the lower end of its 95% interval.

    Raises:
        ValueError: If there are too few steps for a line.
    """
    import numpy as np
    import pandas as pd
    from scipy.stats import theilslopes

    steps = run.memory["step"]
    frame = run.memory[steps > (steps.min() + steps.max()) / 2]  # a resumed run does not begin at step 0
    if frame["step"].nunique() < 2:
        raise ValueError(f"run {run.name!r} is too short to see memory grow: train at least four steps")
    rows = {}
    for rank, one in frame.groupby("rank"):
        few = one.iloc[np.unique(np.linspace(0, len(one) - 1, _POINTS).astype(int))]
        line = theilslopes(few["memory_bytes"].astype(float), few["step"].astype(float))
        rows[int(rank)] = {"bytes_per_step": line.slope, "at_least": line.low_slope}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("rank")


def symptoms(run: Run, *, vocab_size: int | None) -> pd.DataFrame:
    """Hold each sign of a run against its limit: a table of measured value, limit, and `"ok"` or `"look"`.

    Args:
        vocab_size: Rows of the output layer, for the loss of fresh weights; `None` for a run that began with other
            weights, whose first loss says nothing.

    Returns:
        One row a sign, indexed by its name: `measured`, `limit`, `unit`, `where`, `verdict`.

    Raises:
        ValueError: If the run has no step, or too few to see memory grow; or if `vocab_size` is given and the run's
            configuration does not say how its first weights were drawn, as another trainer's.
    """
    import pandas as pd

    metrics = run.metrics
    if metrics.empty:
        raise ValueError(f"run {run.name!r} has no step to look at; outcome.json says how it ended, if it did")
    losses, unit = metrics["loss"].astype(float), run.loss_unit
    calm = smoothed(losses)
    above = calm - calm.cummin()
    raw_norms = metrics["grad_norm"].astype(float)  # without clipping Megatron computes none
    norms = smoothed(raw_norms) / raw_norms.iloc[0]
    growth = memory_growth(run)
    worst = growth["at_least"].idxmax()
    broken = ~losses.map(math.isfinite) | (~raw_norms.map(math.isfinite) & raw_norms.notna().any())
    unusable = int((metrics["skipped"].astype(bool) | broken).sum())
    rows = []
    if vocab_size is not None:
        model = run.config.get("model", {})
        if absent := {"hidden_size", "init_method_std"} - set(model):
            raise ValueError(
                f"the configuration of run {run.name!r} has no model.{' and no model.'.join(sorted(absent))}, so nobody knows "
                "the loss of its fresh weights: give vocab_size=None"
            )
        expected = baselines.first_loss(vocab_size, model["hidden_size"], model["init_method_std"])
        start = abs(losses.iloc[0] - expected)
        rows.append((f"first loss away from {expected:.2f}", start, START_NATS, "nats/token", "step 1"))
    rows += [
        ("loss, average of 10, above its lowest", above.max(), SPIKE_NATS, unit, _step(metrics, above)),
        ("gradient norm, average of 10, against step 1", norms.max(), GRADIENT_RATIO, "times", _step(metrics, norms)),
        ("steps skipped or not a number", unusable, 0, "steps", ""),
        (
            "loss, average of the last 10, above step 1",
            losses.iloc[-10:].mean() - losses.iloc[0],
            -FALL_NATS,
            unit,
            "",
        ),
        (
            "memory growth of one rank, at least",
            growth["at_least"].max() / MiB,
            GROWTH_BYTES / MiB,
            "MiB/step",
            f"rank {worst}, {growth.loc[worst, 'bytes_per_step'] / MiB:.1f} MiB/step",
        ),
    ]
    table = pd.DataFrame(rows, columns=["sign", "measured", "limit", "unit", "where"]).set_index("sign")
    # Written this way round, so that a value that is not a number asks for a look.
    table["verdict"] = [
        "ok" if value <= limit else "look" for value, limit in zip(table.measured, table.limit, strict=True)
    ]
    return table.round({"measured": 3})


def _step(metrics: pd.DataFrame, values: pd.Series) -> str:
    return f"step {int(metrics['step'].loc[values.idxmax()])}" if values.notna().any() else ""

"""Is a run healthy?  Five signs, read from its run directory, each with a limit.

The limits are conventions of this course, wide enough for short runs; a sign beyond its limit asks for a look, and
says nothing about the cause.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from course_lib.units import MiB

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["memory_growth", "smoothed", "symptoms"]

SPIKE_NATS = 1.0
"""The average of ten losses may lie this far above its lowest value so far; single batches differ more."""

GRADIENT_RATIO = 5.0
"""The average of ten gradient norms may be this many times the norm of step 1; runs get over a single jump."""

START_SHARE = 0.05
"""The first loss may differ from ln(vocabulary) by this share."""

GROWTH_SHARE = 0.03
"""A rank's memory may grow by this share of itself in a step, over the second half of the run."""


def smoothed(values: pd.Series, *, window: int = 10) -> pd.Series:
    """The average of each value and those before it, at most `window` together.

    >>> import pandas as pd
    >>> smoothed(pd.Series([4.0, 2.0, 3.0]), window=2).tolist()
    [4.0, 3.0, 2.5]
    """
    return values.rolling(window, min_periods=1).mean()


def memory_growth(run: Run) -> pd.DataFrame:
    """How fast the memory of each rank grows over the second half of the run.

    Allocators keep what they once had, so every run grows at first; a leak goes on.

    Args:
        run: A run with `memory` of at least four steps.

    Returns:
        One row a rank, indexed by it: `bytes_per_step` (slope of a straight line) and `share_per_step` (of its level).

    Raises:
        ValueError: If there are too few steps for a line.
    """
    import numpy as np
    import pandas as pd

    steps = run.memory["step"]
    frame = run.memory[steps > (steps.min() + steps.max()) / 2]  # a resumed run does not begin at step 0
    if frame["step"].nunique() < 2:
        raise ValueError(f"run {run.name!r} is too short to see memory grow: train at least four steps")
    rows = {}
    for rank, one in frame.groupby("rank"):
        slope = np.polyfit(one["step"].astype(float), one["memory_bytes"].astype(float), 1)[0]
        rows[int(rank)] = {"bytes_per_step": slope, "share_per_step": slope / one["memory_bytes"].mean()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("rank")


def symptoms(run: Run, *, vocab_size: int) -> pd.DataFrame:
    """Look at a run as a physician would: a table of signs, measured value, limit, and `"ok"` or `"look"`.

    Args:
        run: A finished run.
        vocab_size: Ids of the tokenizer, for the loss of a model that knows nothing.

    Returns:
        One row a sign, indexed by its name: `measured`, `limit`, `unit`, `where`, `verdict`.
    """
    import pandas as pd

    metrics = run.metrics
    losses = metrics["loss"].astype(float)
    start = abs(losses.iloc[0] / math.log(vocab_size) - 1)
    calm = smoothed(losses)
    above = calm - calm.cummin()
    norms = smoothed(metrics["grad_norm"].astype(float)) / float(metrics["grad_norm"].iloc[0])
    growth = memory_growth(run)
    worst = growth["share_per_step"].idxmax()
    unusable = int(metrics["skipped"].astype(bool).sum() + (~losses.map(math.isfinite)).sum())
    rows = [
        ("first loss away from ln(V)", start, START_SHARE, "share", "step 1"),
        ("loss, average of 10, above its lowest", above.max(), SPIKE_NATS, "nats/token", _step(metrics, above)),
        ("gradient norm, average of 10, against step 1", norms.max(), GRADIENT_RATIO, "times", _step(metrics, norms)),
        ("steps skipped or not a number", unusable, 0, "steps", ""),
        (
            "memory growth of one rank",
            growth["share_per_step"].max(),
            GROWTH_SHARE,
            "share/step",
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

"""Pictures of curation: what share of each kind of document each filter takes, and what curating a text gained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.figures import plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["gains", "shares"]


def shares(table: pd.DataFrame, *, ax: Axes, title: str) -> Axes:
    """Draw a square for each filter and kind, fuller the larger the share that the filter takes of the kind.

    Squares are blue over whatever is behind, so that a dark page stays dark; words are white from a twentieth on.

    Args:
        table: One row a filter, one column a kind, shares from 0 to 1.
    """
    import numpy as np

    values = table.to_numpy(dtype=float)
    look = {"color": plots.COLOURS["blue"], "linewidth": 0}
    for (row, column), share in np.ndenumerate(values):
        full = share >= 0.05
        alpha = 0.8 + 0.2 * share if full else 2 * share
        ax.bar(column, 1, width=1, bottom=row - 0.5, alpha=alpha, **look)
        words = "white" if full else plots.INK
        ax.text(column, row, f"{share:.0%}", ha="center", va="center", color=words)
    ax.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(len(table) - 0.5, -0.5))
    ax.set_xticks(range(len(table.columns)), [name.replace(" ", "\n") for name in table.columns])
    ax.set_yticks(range(len(table)), table.index)
    ax.grid(visible=False)
    sentences = [
        f"{name} takes "
        + (", ".join(f"{share:.0%} of {kind}" for kind, share in row.items() if share >= 0.005) or "nothing")
        for name, row in table.iterrows()
    ]
    plots.finish(ax, x="kind of document", y="filter", title=title, sentences=sentences, whole_x=False)
    return ax


def gains(rows: Sequence[Mapping[str, Any]], *, ax: Axes, title: str) -> Axes:
    """Draw what each curation gained under each seed, as a dot, beside the line of no difference.

    Args:
        rows: Each with `what`, and `before` and `after` in bits per byte, in the same order of seeds.
    """
    ax.axvline(0, color=plots.INK, linewidth=1.5, dashes=[6, 3])
    sentences = []
    for place, row in enumerate(rows):
        within = [before - after for before, after in zip(row["before"], row["after"], strict=True)]
        ax.plot(within, [place] * len(within), "o", markersize=7, color=plots.COLOURS["blue"])
        sentences.append(f"{row['what']}: {statistics.fmean(within):+.3f}, {min(within):+.3f} to {max(within):+.3f}")
    ax.set_yticks(range(len(rows)), [row["what"] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    plots.finish(ax, x="gain (bits per byte, held-out)", y="", title=title, sentences=sentences, whole_x=False)
    return ax

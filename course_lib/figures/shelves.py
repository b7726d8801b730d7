"""A picture of shelves: what belongs to which layer, a row a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.figures import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["stack"]

CHARACTER = 0.075  # of a row's unit, for each letter of a label, at the size below
FONT = 8


def stack(rows: Mapping[str, Sequence[str]], *, ax: Axes, title: str) -> Axes:
    """Draw one shelf a layer, the first at the top, with a label for each thing on it.

    Args:
        rows: What stands on each shelf, by the shelf's name.
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis; its label puts the picture into words.
    """
    reach = 0.0
    for row, names in enumerate(rows.values()):
        left = 0.1
        for name in names:
            ax.text(
                left,
                row,
                name,
                va="center",
                fontsize=FONT,
                color="#FFFFFF",
                bbox={"boxstyle": "round,pad=0.35", "facecolor": plots.COLOURS["blue"], "edgecolor": "none"},
            )
            left += CHARACTER * len(name) + 0.25
        reach = max(reach, left)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks([])
    ax.set_xlim(0, reach)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False)
    sentences = [f"{layer}: {', '.join(names)}" for layer, names in rows.items()]
    plots.finish(ax, x="", y="", title=title, sentences=sentences, whole_x=False)
    return ax

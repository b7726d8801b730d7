"""Figures of a MoE layer: which token goes to which expert, and how the load of the experts moves while a run learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.figures.plots import COLOURS, INK, finish

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["grid", "load", "trend"]


def grid(chosen: Sequence[Sequence[int]], *, experts: int, ranks: int, ax: Axes, title: str = "") -> Axes:
    """Draw what a router cuts: a row a token, a column an expert, a filled cell where a token goes; ranks share the columns.

    Args:
        chosen: The experts of each token.
        experts: Routed experts of the layer.
        ranks: Ranks that share them, each with as many neighbours.
        ax: The axis to draw on.
        title: What the picture shows.
    """
    from matplotlib.patches import Rectangle

    colours, each = list(COLOURS.values()), experts // ranks
    for token, mine in enumerate(chosen):
        for expert in range(experts):
            colour = colours[expert // each % len(colours)]
            look = {"facecolor": colour} if expert in mine else {"facecolor": "none"}
            ax.add_patch(Rectangle((expert + 0.06, token + 0.08), 0.88, 0.84, edgecolor=colour, linewidth=1.2, **look))
    for rank in range(ranks):
        ax.text(
            (rank + 0.5) * each, -0.25, f"rank {rank}", ha="center", va="bottom", color=colours[rank % len(colours)]
        )
    ax.set_xlim(-0.1, experts + 0.1)
    ax.set_ylim(len(chosen) + 0.1, -0.9)
    ax.set_xticks([expert + 0.5 for expert in range(experts)], range(experts))
    ax.set_yticks([token + 0.5 for token in range(len(chosen))], range(len(chosen)))
    arrived = [sum(expert // each == rank for mine in chosen for expert in mine) for rank in range(ranks)]
    told = ", ".join(f"{number} at rank {rank}" for rank, number in enumerate(arrived))
    sentence = f"{len(chosen)} tokens choose {len(chosen[0])} of {experts} experts each; {told}"
    finish(ax, x="expert", y="token", title=title, sentences=[sentence], whole_x=False)
    ax.grid(visible=False)
    return ax


def load(counts: pd.DataFrame, *, layer: int, ax: Axes, title: str = "", limit: float | None = None) -> Axes:
    """Draw the load of every expert of a layer over the steps, as multiples of the mean.

    Args:
        counts: What `reading.experts.load` returned.
        layer: The layer, from 1.
        ax: The axis to draw on.
        title: What the picture shows.
        limit: Multiple at which the colours end; the largest of these by default.
    """
    mine = counts.xs(layer, level="layer")
    share = mine.div(mine.mean(axis=1), axis=0)
    edges = [*(step - 0.5 for step in share.index), share.index[-1] + 0.5]
    columns = [expert - 0.5 for expert in range(len(share.columns) + 1)]
    drawn = ax.pcolormesh(edges, columns, share.T, cmap="cividis", vmin=0, vmax=limit or share.max(axis=None))
    bar = ax.figure.colorbar(drawn, ax=ax)
    bar.set_label("times the mean load", color=INK)
    bar.outline.set_visible(False)
    bar.ax.set_label("")  # no panel of its own for who hears the figure
    last = share.iloc[-1]
    sentence = f"In layer {layer} the busiest expert ends at {last.max():.2g} times the mean and the idlest at {last.min():.2g}"
    finish(ax, x="step", y="expert", title=title, sentences=[sentence])
    ax.grid(visible=False)
    return ax


def trend(imbalances: Mapping[str, pd.Series], *, ax: Axes, most: float, title: str = "") -> Axes:
    """Draw how many times the mean load the busiest expert has, step by step, for several runs.

    Args:
        imbalances: Name of a run to one column of `reading.experts.imbalance`.
        ax: The axis to draw on.
        most: Experts / top-k, the most that can be.
        title: What the picture shows.
    """
    sentences = []
    for name, one in imbalances.items():
        ax.plot(one.index, one, label=name)
        sentences.append(f"{name} ends at {one.iloc[-1]:.2g} after at most {one.max():.2g}")
    ax.axhline(most, color=INK, linewidth=1.5, dashes=[6, 3])
    ax.axhline(1, color=INK, linewidth=1.5, dashes=[2, 2])
    beside = {"textcoords": "offset points", "fontsize": 8}  # of the line, not on it
    ax.annotate("all tokens to the same experts", (0, most), (0, 3), va="bottom", **beside)
    ax.annotate("balance", (0, 1), (0, -4), va="top", **beside)
    finish(ax, x="step", y="busiest expert, times the mean", title=title, sentences=sentences)
    ax.set_ylim(0, most * 1.15)
    ax.legend(loc="best")
    return ax

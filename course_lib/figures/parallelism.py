"""Drawings of a parallel run: who talks to whom, when each stage works, what fills the memory of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from course_lib.common.units import MiB, format_bytes, gib
from course_lib.figures.plots import COLOURS, INK
from course_lib.planning.layout import rank_grid

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from course_lib.planning.ceiling import Gpu
    from course_lib.planning.layout import Layout
    from course_lib.planning.memory import Plan
    from course_lib.planning.usable import Usable

__all__ = ["layer", "messages", "plans", "schedule"]

_SHARES = [i / 24 for i in range(25)]
_BESIDE = {"tp": ("center", "bottom", 0, 3), "cp": ("right", "center", -5, 0), "dp-cp": ("left", "center", 5, 0)}
_BESIDE |= {"pp": ("center", "top", 0, -4)}
"""Where the text of a line stands: horizontal and vertical alignment, and distance from its middle in points."""


def messages(layout: Layout, sent: Mapping[str, float], *, ax: Axes, title: str = "") -> Axes:
    """Draw the ranks as a grid, and the groups that talk to each other as lines with the bytes that a rank sends.

    A column is a place in the tensor-parallel group, a row a copy of the model or a part of its sequences, a block of rows
    a pipeline stage.

    Args:
        sent: Bytes that one rank sends in a step, by kind of group (`tp`, `cp`, `dp-cp`, `pp`).
    """
    tp, dp = layout.tensor_model_parallel_size, layout.data_parallel_size * layout.context_parallel_size
    wide = layout.pipeline_model_parallel_size

    def place(rank: int) -> tuple[float, float]:
        stage, rest = divmod(rank, tp * dp)
        return stage * (tp + 0.8) + rest % tp, -(rest // tp)

    styles = {"tp": ("blue", "-"), "cp": ("purple", ":"), "dp-cp": ("vermilion", "--"), "pp": ("green", "-.")}
    grid, sentences = rank_grid(layout), []
    for kind, (colour, dashes) in styles.items():
        groups = [group for group in grid[kind] if len(group) > 1]
        if not groups or not sent.get(kind):
            continue
        number_of_groups = f"{len(groups)} groups" if len(groups) > 1 else "1 group"
        label = f"{kind}: {number_of_groups} of {len(groups[0])}, {format_bytes(sent[kind])} a rank and step"
        for number, group in enumerate(groups):
            named = {"label": label} if not number else {}
            for (x0, y0), (x1, y1) in pairwise(place(rank) for rank in group):
                # Lines of stages pass below the tensor-parallel ones, those of context parallelism beside the data-parallel.
                wide_x, deep_y = {"cp": (0.3, 0.0), "pp": (0.0, 0.35)}.get(kind, (0.0, 0.0))
                bows = [(t, 4 * t * (1 - t)) for t in _SHARES]
                xs = [x0 + t * (x1 - x0) - wide_x * bow for t, bow in bows]
                ys = [y0 + t * (y1 - y0) - deep_y * bow for t, bow in bows]
                ax.plot(xs, ys, color=COLOURS[colour], linestyle=dashes, linewidth=2.5, **named)
                if named:  # one line of each kind carries the bytes; on all of them they would hide the lines
                    ha, va, x, y = _BESIDE[kind]
                    place_of_text = {"xytext": (x, y), "textcoords": "offset points", "ha": ha, "va": va, "fontsize": 8}
                    middle = len(_SHARES) // 2
                    ax.annotate(
                        format_bytes(sent[kind]), (xs[middle], ys[middle]), color=COLOURS[colour], **place_of_text
                    )
                named = {}
        sentences.append(label)
    for rank in range(layout.world_size):
        x, y = place(rank)
        ax.plot(x, y, marker="o", markersize=21, color=INK, linestyle="none")
        ax.text(x, y, str(rank), ha="center", va="center", color="white", fontweight="bold")
    for stage in range(wide):
        if wide > 1:
            ax.text(stage * (tp + 0.8) + (tp - 1) / 2, 0.55, f"stage {stage}", ha="center", va="bottom")
    ax.set_xlim(-0.6, wide * (tp + 0.8) - 1.2)
    ax.set_ylim(-dp + 0.4, 1.0 if wide > 1 else 0.6)
    ax.set_axis_off()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)
    if title:
        ax.set_title(title, loc="left")
    ax.set_label(". ".join([f"{layout}: {layout.world_size} ranks as a grid", *sentences]))
    return ax


def schedule(rows: pd.DataFrame, *, ax: Axes, title: str = "") -> Axes:
    """Draw passes as bars over time: a line for each stage, forward and backward by colour and hatch.

    Args:
        rows: What `pipeline.passes` or `pipeline.replay` returned.
    """
    styles = {"forward": (COLOURS["blue"], ""), "backward": (COLOURS["vermilion"], "//")}
    for kind, (colour, hatch) in styles.items():
        part = rows[rows.kind == kind]
        ax.barh(
            part.stage,
            (part.end - part.begin) * 1e3,
            left=part.begin * 1e3,
            height=0.8,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.8,
            label=kind,
        )
    span, stages = rows.end.max() - rows.begin.min(), rows.stage.nunique()
    for row in rows.itertuples():
        if row.end - row.begin > 0.035 * span:  # room for two digits
            ax.text(
                (row.begin + row.end) * 5e2,
                row.stage,
                str(row.microbatch),
                ha="center",
                va="center",
                fontsize=8,
                color="white",
                fontweight="bold",
            )
    ax.set_yticks(sorted(rows.stage.unique()))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("time since the first pass began (ms)")
    ax.set_ylabel("pipeline stage")
    if title:
        ax.set_title(title, loc="left")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.08), ncols=2)
    ax.set_label(
        f"{len(rows)} passes on {stages} stages within {span * 1e3:.3g} ms; "
        f"the stages wait {1 - (rows.end - rows.begin).sum() / (span * stages):.0%} of that time"
    )
    return ax


def plans(planned: Mapping[str, Plan], *, gpu: Gpu, ax: Axes, title: str = "", room: Usable | None = None) -> Axes:
    """Draw one horizontal bar a plan, cut into its components, against the memory of a GPU.

    A plan that does not fit has a red, hatched edge, and says so in words.

    Args:
        planned: Plans by their labels.
        room: What a plan may use of it; the rest of what torch sees is a band beside the line.

    Returns:
        The axis, in GiB.
    """
    parts = list(next(iter(planned.values())).components)
    shades = dict(zip(parts, (*COLOURS.values(), INK), strict=True))
    hatches = dict(zip(parts, ("", "//", "..", "\\\\", "xx"), strict=True))
    labels, limit = list(planned), gib(room.usable_bytes if room else gpu.memory_bytes)
    left = [0.0] * len(labels)
    for part in parts:
        widths = [gib(planned[label].components[part]) for label in labels]
        face = {"color": shades[part], "edgecolor": "white", "linewidth": 0.5, "hatch": hatches[part]}
        ax.barh(labels, widths, left=left, label=part, height=0.6, **face)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    right = 1.25 * max([limit, *left])
    for row, total in enumerate(left):
        fits = total <= limit
        if not fits:
            ax.barh(row, total, height=0.72, fill=False, edgecolor="#E0403A", linewidth=2.5, hatch="/")
        note = f" {total:.1f}" + ("" if fits else " does not fit")
        crossing = fits and total + 0.07 * right > limit  # the note would stand across the line
        place = limit + 0.005 * right if crossing else total
        ax.text(place, row, note, va="center", color=INK if fits else "#E0403A", fontsize=9)
    ax.axvline(limit, color=INK, linewidth=1.5, dashes=[6, 3])
    if room:
        ax.axvspan(limit, gib(room.total_bytes), color=INK, alpha=0.15, linewidth=0)
    ax.set_xlim(0, right)
    what = f"what a plan may use, {limit:.1f} GiB" if room else f"{gpu.name}, {limit:.1f} GiB"
    ax.set_xlabel(f"planned memory of the fullest rank (GiB); dashed line: {what}")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8, columnspacing=1.0, handlelength=1.4)
    ax.set_title(title, pad=24)
    totals = "; ".join(f"{label} {total:.1f}" for label, total in zip(labels, left, strict=True))
    has = "A plan may use" if room else "The GPU has"
    ax.set_label(f"Planned GiB of the fullest rank: {totals}. {has} {limit:.1f} GiB")
    return ax


def layer(kept: Mapping[str, Mapping[str, int]], *, ax: Axes, title: str = "") -> Axes:
    """Draw what one layer keeps for the backward pass, one group of bars a tensor, one bar a layout.

    Args:
        kept: For each layout its bytes by tensor, as `activations.one_layer` returns them.

    Returns:
        The axis, in MiB.
    """
    layouts, tensors = list(kept), list(next(iter(kept.values())))
    height = 0.8 / len(layouts)
    for number, (label, colour, hatch) in enumerate(zip(layouts, COLOURS.values(), ("", "//", ".."), strict=False)):
        places = [row + (number - (len(layouts) - 1) / 2) * height for row in range(len(tensors))]
        sizes = [kept[label][tensor] / MiB for tensor in tensors]
        ax.barh(places, sizes, height=height, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
    ax.set_yticks(range(len(tensors)), tensors)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("kept for the backward pass by one layer, of one sequence (MiB)")
    ax.legend(loc="lower right")
    ax.set_title(title)
    totals = "; ".join(f"{label} {sum(kept[label].values()) / MiB:.0f}" for label in layouts)
    ax.set_label(f"MiB that one layer keeps: {totals}. Largest: {max(kept[layouts[0]], key=kept[layouts[0]].get)}")
    return ax

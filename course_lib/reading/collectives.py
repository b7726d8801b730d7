"""Who sends what to whom: what a recorded run sent, and the closed form that says it beforehand.

Sizes are those of the whole that an operation moves: the output of an all-gather, the input of a reduce-scatter, the
tensor of an all-reduce.  `messages.sent_bytes` turns them into what one rank has to send.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from course_lib.common.units import format_bytes
from course_lib.planning.layout import rank_grid
from course_lib.planning.messages import KEY, expected

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from course_lib.planning.layout import Layout
    from course_lib.runs import Run

__all__ = ["compare", "picture", "recorded"]

_SHARES = [i / 24 for i in range(25)]
_BESIDE = {"tp": ("center", "bottom", 0, 3), "cp": ("right", "center", -5, 0), "dp-cp": ("left", "center", 5, 0)}
_BESIDE |= {"pp": ("center", "top", 0, -4)}
"""Where the text of a line stands: horizontal and vertical alignment, and distance from its middle in points."""


def recorded(run: Run, *, rank: int = 0, step: int | None = None) -> pd.DataFrame:
    """What one rank took part in during one step, equal operations counted together.

    Args:
        run: A run that was launched with `record=True`.
        rank: Global rank.
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
        rank: Global rank.
        step: The step; the last one by default.

    Returns:
        Rows `phase, operation, group, group_size, bytes, expected, recorded, why`; the two counts are equal if the
        closed form holds.
    """
    element_bytes = 2 if run.launch.get("device") == "cuda" else 4
    planned = expected(run.config, ranks=run.launch["ranks"], rank=rank, element_bytes=element_bytes)
    found = recorded(run, rank=rank, step=step)
    planned = planned.groupby(KEY, sort=False).agg(expected=("count", "sum"), why=("why", "first")).reset_index()
    both = planned.merge(found.rename(columns={"count": "recorded"}), on=KEY, how="outer", sort=False)
    both[["expected", "recorded"]] = both[["expected", "recorded"]].fillna(0).astype(int)
    return both[[*KEY, "expected", "recorded", "why"]].fillna({"why": "not in the closed form"})


def picture(layout: Layout, sent: Mapping[str, float], *, ax: Axes, title: str = "") -> Axes:
    """Draw the ranks as a grid, and the groups that talk to each other as lines with the bytes that a rank sends.

    A column is a place in the tensor-parallel group, a row a copy of the model or a part of its sequences, a block of rows
    a pipeline stage.

    Args:
        layout: The layout.
        sent: Bytes that one rank sends in a step, by kind of group (`tp`, `cp`, `dp-cp`, `pp`).
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis.
    """
    from course_lib.figures.plots import COLOURS, INK

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

"""Figures that compare runs: signs of trouble, memory over time, and what a change did beside its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.figures import plots
from course_lib.runs import difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from course_lib.experiments.sweep import Comparison
    from course_lib.runs import Run

__all__ = ["curves", "effects", "grouped", "intervals", "memory_by_step", "restarted", "seeds"]


def curves(
    runs: Mapping[str, Run], column: str, *, ax: Axes, unit: str, title: str = "", averaged: int | None = None
) -> Axes:
    """Draw one column of `metrics` against the step for several runs.

    Args:
        runs: Name to run; at most four.
        column: Such as `"loss"` or `"grad_norm"`.
        unit: Unit of the column; empty if it has none.
        averaged: So many steps, whose mean is drawn over a longer curve, because single batches hide its course.
    """
    ends = []
    for name, run in runs.items():
        steps, values = run.metrics["step"], run.metrics[column]
        (line,) = ax.plot(steps, values, label=name)
        how = ""
        if averaged is not None and len(values) > averaged:
            line.set(label="", **plots.FAINT)
            values, how = plots.centred(values, averaged).dropna(), f", as the mean of {averaged} steps"
            ax.plot(steps[values.index], values, color=line.get_color(), linestyle=line.get_linestyle(), label=name)
        highest = f", at most {values.max():.3g}" if values.max() > max(values.iloc[0], values.iloc[-1]) else ""
        ends.append(f"{name} goes from {values.iloc[0]:.3g} to {values.iloc[-1]:.3g}{highest}{how}")
    words = column.replace("_", " ")
    plots.finish(ax, x="step", y=f"{words} ({unit})" if unit else words, title=title, sentences=ends)
    ax.legend()
    return ax


def memory_by_step(run: Run, *, ax: Axes, highlight: int | None = None, title: str = "") -> Axes:
    """Draw the memory of every rank against the step.

    Args:
        run: A run with `memory`.

    Returns:
        The axis, in MiB below one GiB and in GiB above.
    """
    unit, unit_bytes = plots.memory_unit(float(run.memory["memory_bytes"].max()))
    name = "ranks" if highlight is None else "other ranks"
    for rank, one in run.memory.groupby("rank"):
        if rank == highlight:
            look = {"color": plots.COLOURS["vermilion"], "linestyle": "-", "label": f"rank {rank}", "zorder": 3}
        else:
            look = {"color": plots.INK, "linestyle": "-", "linewidth": 1, "label": name}
            name = None  # one entry in the legend for all of them
        ax.plot(one["step"], one["memory_bytes"] / unit_bytes, **look)
    last = run.memory.groupby("rank")["memory_bytes"].last() / unit_bytes
    sentences = [f"At the end the ranks hold between {last.min():.3g} and {last.max():.3g} {unit}"]
    plots.finish(ax, x="step", y=f"memory ({unit})", title=title, sentences=sentences)
    ax.set_ylim(bottom=0)
    ax.legend(loc="lower right" if highlight is None else "best")
    return ax


def restarted(whole: Run, killed: Run, again: Run, *, ax: Axes, title: str = "") -> Axes:
    """Draw the losses of a killed run and of its restart over those of the same run without a break.

    The steps that were done twice are shaded.
    """
    plots.loss(whole, ax=ax, title=title)
    ax.lines[0].set(marker="", label="uninterrupted")
    for name, run, marker, colour in (("killed", killed, "s", "vermilion"), ("restarted", again, "o", "green")):
        look = {"markersize": 8, "fillstyle": "none", "markeredgewidth": 2, "linestyle": "none", "marker": marker}
        ax.plot(run.metrics["step"], run.metrics["loss"], label=name, color=plots.COLOURS[colour], **look)
    death, first = killed.metrics["step"].max(), again.metrics["step"].min()
    ax.axvspan(first - 0.5, death + 0.5, color=plots.INK, alpha=0.2, label="steps done twice")
    apart = max(difference(killed, whole), difference(again, whole))
    words = f"Killed after step {death}, restarted with step {first}"
    ax.set_label(f"{words}; losses and gradient norms differ from the uninterrupted run's by {apart:.0%} at most")
    ax.legend()
    return ax


def seeds(groups: Mapping[str, Sequence[float]], *, ax: Axes, title: str = "") -> Axes:
    """Draw the held-out loss of every seed as a dot, one row a configuration; a band spans the first one.

    Args:
        groups: Name to losses in nats per token; the first is what the others are compared with.
    """
    names, base = list(groups), next(iter(groups.values()))
    ax.axvspan(min(base), max(base), color=plots.INK, alpha=0.25, linewidth=0)
    for row, losses in enumerate(groups.values()):
        ax.plot(losses, [row] * len(losses), "o", markersize=7, color=plots.COLOURS["blue"])
    _rows(ax, names)
    sentences = [f"{name}: {min(losses):.3f} to {max(losses):.3f}" for name, losses in groups.items()]
    plots.finish(ax, x="held-out loss (nats per token)", y="", title=title, sentences=sentences, whole_x=False)
    return ax


def effects(comparisons: Mapping[str, Comparison], *, ax: Axes, title: str = "") -> Axes:
    """Draw what each change did: the difference, its 95% interval, and the line of no difference.

    Args:
        comparisons: Name to comparison.
    """
    ax.axvline(0, color=plots.INK, linewidth=1.5, dashes=[6, 3])
    for row, one in enumerate(comparisons.values()):
        inside = one.verdict.startswith("no")
        look = {"color": plots.COLOURS["blue" if inside else "vermilion"], "fmt": "o" if inside else "D"}
        ax.errorbar(one.difference, row, xerr=one.noise, capsize=5, markersize=7, linewidth=2, linestyle="none", **look)
    _rows(ax, list(comparisons))
    sentences = [
        f"{name}: {one.difference:+.3f} +- {one.noise:.3f}, {one.verdict}" for name, one in comparisons.items()
    ]
    plots.finish(
        ax, x="change of held-out loss (nats per token)", y="", title=title, sentences=sentences, whole_x=False
    )
    return ax


def _rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def intervals(values: Mapping[str, Any], *, ax: Axes, unit: str, title: str = "") -> Axes:
    """Draw a bar for each estimate, with a whisker over its interval.

    Args:
        values: Name to an object with `value`, `low` and `high`, such as `evaluation.Interval`.
        ax: The axis to draw on.
        unit: Of the values.
        title: What the picture shows.
    """
    whiskers = [[one.value - one.low for one in values.values()], [one.high - one.value for one in values.values()]]
    heights = [one.value for one in values.values()]
    look = {"color": plots.COLOURS["blue"], "ecolor": plots.INK, "capsize": 4}
    ax.bar(list(values), heights, yerr=whiskers, width=0.6, **look)
    said = [f"{name} {one.value:.3g}, {one.low:.3g} to {one.high:.3g}" for name, one in values.items()]
    plots.finish(ax, x="", y=unit, title=title, sentences=said, whole_x=False)
    return ax


def grouped(bars: Mapping[str, Mapping[str, float]], *, ax: Axes, unit: str, title: str = "") -> Axes:
    """Draw a group of bars for each name, one bar a part, each part in its own colour and hatch.

    Args:
        bars: Name to the sizes of its parts, the same parts in each; at most four.
        ax: The axis to draw on.
        unit: Of the sizes.
        title: What the picture shows.
    """
    parts = list(next(iter(bars.values())))
    width = 0.8 / len(parts)
    for place, (part, colour, hatch) in enumerate(
        zip(parts, plots.COLOURS.values(), ("", "//", "..", "xx"), strict=False)
    ):
        at = [group + (place - (len(parts) - 1) / 2) * width for group in range(len(bars))]
        drawn = ax.bar(at, [one[part] for one in bars.values()], width, label=part, color=colour, hatch=hatch)
        ax.bar_label(drawn, fmt="%.2f")
    ax.set_xticks(range(len(bars)), list(bars))
    ax.axhline(0, color=plots.INK, linewidth=0.8)
    ax.margins(y=0.15)
    ax.legend()
    said = [f"{name}: " + ", ".join(f"{part} {size:.3g}" for part, size in one.items()) for name, one in bars.items()]
    plots.finish(ax, x="", y=unit, title=title, sentences=said, whole_x=False)
    return ax

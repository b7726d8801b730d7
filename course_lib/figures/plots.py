"""Figures of a run: functions that take a run and an axis and return the axis.

Nothing here touches ``pyplot`` or the global ``rcParams``: a figure is made, drawn and shown inside one ``with`` block.
Its colours stand at the end; a lesson names them by this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from course_lib.common.screen import where
from course_lib.common.units import GiB, MiB

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from course_lib.runs import Run

__all__ = [
    "COLOURS",
    "CSS_PIXELS_PER_INCH",
    "DOTS_PER_INCH",
    "INK",
    "describe",
    "figure",
    "finish",
    "loss",
    "memory",
    "png",
    "stacked",
    "style",
    "throughput",
]

LONG, AVERAGED = 100, 25  # steps: from where on batches are drawn faintly, and how many are averaged
FAINT = {"linewidth": 0.8, "alpha": 0.45}


@contextmanager
def figure(
    title: str = "", *, alt: str | None = None, columns: int = 1, width: float = 7.0, height: float = 3.4
) -> Iterator[Any]:
    """Make a figure, hand over its axes, and show it when the block ends.

    Args:
        title: The finding, as a sentence ("The loss falls below that of a unigram model").
        alt: Text for readers who cannot see the picture. Without it, the text is built from the drawn data.
        columns: How many panels stand side by side.
        width: Width in inches.
        height: Height in inches.

    Yields:
        One axis, or an array of them when ``columns`` is more than 1.
    """
    from matplotlib.figure import Figure

    with style():
        fig = Figure(figsize=(width, height), layout="constrained")
        axes = fig.subplots(1, columns)
        if title:
            fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        yield axes
        _show(fig, alt=alt or describe(fig))


def png(fig: Figure) -> bytes:
    """Draw a figure into PNG bytes with the Agg canvas, whatever backend is in use."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(fig).print_png(buffer)
    return buffer.getvalue()


def describe(fig: Figure | Axes) -> str:
    """Put into words what a figure shows: its title, then one sentence for each panel.

    Args:
        fig: A figure or an axis that the functions of this module drew on.
    """
    axes = getattr(fig, "axes", fig)
    panels = axes if isinstance(axes, list) else [fig]
    heading = fig.get_suptitle() if hasattr(fig, "get_suptitle") else ""
    # An artist's label is free for use on an axis: it is where each drawing function leaves its sentence.
    sentences = [heading, *(text for panel in panels for text in (panel.get_title(loc="left"), panel.get_label()))]
    return (
        " ".join(sentence.rstrip(".") + "." for sentence in sentences if sentence) or "A figure without a description."
    )


def loss(run: Run, *, ax: Axes | None = None, baseline: Mapping[str, float] | None = None, title: str = "") -> Axes:
    """Draw the training loss against the step, with the validation loss and any baselines.

    Batches of a long run hide its course, so beyond 100 steps their average is drawn over them.

    Args:
        run: A run with ``metrics`` (columns ``step``, ``loss``) and, if there is one, ``validation``.
        baseline: Name to loss in nats per token, drawn as level lines, such as ``{"ln(vocabulary)": 6.93}``.
    """
    ax = _axis(ax)
    metrics, unit = run.metrics, loss_unit(run).replace("/", " per ")
    sentences = []
    if len(metrics):
        long = len(metrics) > LONG
        look = {"color": COLOURS["blue"], "marker": "o" if len(metrics) <= 40 else "", "markersize": 4}
        ax.plot(metrics["step"], metrics["loss"], label="training", **look, **(FAINT if long else {}))
        if long:
            average = centred(metrics["loss"], AVERAGED)
            ax.plot(metrics["step"], average, label=f"average of {AVERAGED}", color=COLOURS["blue"], linestyle="-")
        sentences.append(
            f"Training loss goes from {metrics['loss'].iloc[0]:.3g} at step {int(metrics['step'].iloc[0])} "
            f"to {metrics['loss'].iloc[-1]:.3g} {unit} at step {int(metrics['step'].iloc[-1])}"
        )
    validation = getattr(run, "validation", None)
    if validation is not None and len(validation):
        line = {"color": COLOURS["vermilion"], "linestyle": "--", "marker": "D", "markersize": 5}
        ax.plot(validation["step"], validation["loss"], label="held out", **line)
        sentences.append(f"Held-out loss ends at {validation['loss'].iloc[-1]:.3g} {unit}")
    for (name, value), dashes in zip((baseline or {}).items(), ([6, 3], [2, 2], [6, 2, 1, 2]) * 4, strict=False):
        ax.axhline(value, color=INK, linewidth=1.5, dashes=dashes, label=f"{name}: {value:.2f}")
        sentences.append(f"A level line marks {name} at {value:.3g} {unit}")
    finish(ax, x="step", y=f"loss ({unit})", title=title, sentences=sentences)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()
    return ax


def memory(run: Run, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw the memory of every rank: a bar for the last reading, a tick for the peak.

    Args:
        run: A run with ``memory`` (columns ``rank``, ``memory_bytes``, ``peak_memory_bytes``).

    Returns:
        The axis, in MiB below one GiB and in GiB above.
    """
    ax = _axis(ax)
    ranks, last_bytes, peak_bytes = per_rank(run)
    unit, unit_bytes = memory_unit(max(peak_bytes, default=0))
    ax.bar(ranks, [value / unit_bytes for value in last_bytes], width=0.7, color=COLOURS["green"], label="last reading")
    peak = {
        "marker": "_",
        "markersize": 14,
        "markeredgewidth": 2.5,
        "linestyle": "none",
        "color": COLOURS["vermilion"],
    }
    ax.plot(ranks, [value / unit_bytes for value in peak_bytes], label="peak", **peak)
    sentences = []
    if ranks:
        low, high = min(peak_bytes) / unit_bytes, max(peak_bytes) / unit_bytes
        sentences.append(f"Peak memory of {len(ranks)} ranks lies between {low:.4g} and {high:.4g} {unit}")
    finish(ax, x="rank", y=f"memory ({unit})", title=title, sentences=sentences)
    ax.set_ylim(0, 1.25 * max(peak_bytes, default=unit_bytes) / unit_bytes)  # room for the legend above the bars
    ax.grid(axis="x", visible=False)
    if ranks:
        ax.legend(loc="upper left", ncols=2)
    return ax


def throughput(run: Run, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw tokens per second of all ranks together against the step, with the median of all steps but the first.

    Args:
        run: A run with ``metrics`` (columns ``step``, ``tokens_per_second``).
    """
    ax = _axis(ax)
    metrics = run.metrics
    sentences = []
    if len(metrics):
        rate = metrics["tokens_per_second"]
        ax.plot(metrics["step"], rate, color=COLOURS["purple"], marker="o" if len(metrics) <= 40 else "", markersize=4)
        # The first step pays for allocation and for opening connections, so it says little about the rest.
        median = (rate.iloc[1:] if len(rate) > 1 else rate).median()
        ax.axhline(median, color=INK, linewidth=1.5, dashes=[6, 3], label=f"median: {median:,.0f}")
        ax.legend(loc="lower right")
        sentences.append(f"The median throughput after the first step is {median:,.0f} tokens per second")
    finish(ax, x="step", y="throughput (tokens/s)", title=title, sentences=sentences)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    return ax


def stacked(
    bars: Mapping[str, Mapping[str, float]], *, ax: Axes | None = None, unit: str, scale: float = 1.0, title: str = ""
) -> Axes:
    """Draw one level bar a name, made of parts; each part keeps its colour and hatch in all bars.

    Args:
        bars: Name to the sizes of its parts.
        unit: What the sizes are after division by ``scale``.
        scale: Divisor of the sizes, such as 1e9 for billions.

    Returns:
        The axis; parts under a hundredth of the longest bar, and those beyond eight, are drawn together as
        "other".
    """
    ax = _axis(ax)
    limit = 0.01 * max(sum(parts.values()) for parts in bars.values())
    # A second part in one hue would look like a relative of the first.
    looks = [(colour, "") for colour in COLOURS.values()] + [(PALE, hatch) for hatch in ("///", "...", "xxx", "---")]
    large = list(dict.fromkeys(part for parts in bars.values() for part, size in parts.items() if size >= limit))
    large = [part for part in large if part != "other"][: len(looks)]
    left = dict.fromkeys(bars, 0.0)
    for part, (colour, hatch) in zip([*large, "other"], [*looks[: len(large)], (INK, "")], strict=True):
        for name, parts in bars.items():
            others = sum(size for other, size in parts.items() if other not in large)
            width = (others if part == "other" else parts.get(part, 0)) / scale
            ax.barh(
                name, width, left=left[name], color=colour, hatch=hatch, height=0.6, label=part, edgecolor="#FFFFFF"
            )
            left[name] += width
    sentences = [f"{name} has {left[name]:.3g} {unit}" for name in bars]
    finish(ax, x=unit, y="", title=title, sentences=sentences, whole_x=False)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    handles, labels = ax.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    ax.legend([first[part] for part in [*large, "other"]], [*large, "other"], loc="lower right", ncols=2, fontsize=8)
    return ax


def loss_unit(run: Run) -> str:
    """The unit of a run's loss, as in ``Run.loss_unit``; what only has its tables is taken for a pretraining."""
    return getattr(run, "loss_unit", "nats/token")


def centred(values: pd.Series, count: int) -> pd.Series:
    """The mean of so many values around each, none near the ends: a trailing mean lies above a loss that falls."""
    return values.rolling(count, center=True).mean()


def per_rank(run: Run) -> tuple[list[int], list[float], list[float]]:
    """Return the ranks, the last reading and the highest peak of each, both in bytes."""
    frame = getattr(run, "memory", None)
    if frame is None or not len(frame):
        return [], [], []
    groups = frame.groupby("rank", sort=True)
    last, peak = groups["memory_bytes"].last(), groups["peak_memory_bytes"].max()
    return [int(rank) for rank in last.index], [float(value) for value in last], [float(value) for value in peak]


def memory_unit(value_bytes: float) -> tuple[str, int]:
    """Choose the unit for a memory axis.

    Example:
        >>> memory_unit(300 * 2**20), memory_unit(3 * 2**30)
        (('MiB', 1048576), ('GiB', 1073741824))
    """
    return ("GiB", GiB) if value_bytes >= GiB else ("MiB", MiB)


def _axis(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    with style():
        return Figure(figsize=(7.0, 3.4), layout="constrained").subplots()


def finish(ax: Axes, *, x: str, y: str, title: str, sentences: Sequence[str], whole_x: bool = True) -> None:
    """Name the axes of a drawing, give it its title, and leave its words for `describe`.

    Args:
        x: The horizontal quantity with its unit.
        title: What the picture shows; none if empty.
        whole_x: Whether the horizontal quantity is counted, as steps and ranks are.
    """
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if title:
        ax.set_title(title, loc="left")
    if whole_x:
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_label(". ".join(sentences) or f"No data yet for {y}")


def _show(fig: Figure, *, alt: str) -> None:
    """Display the figure as an image with alternative text, when there is a notebook to display it in."""
    if where() == "notebook":
        from IPython.display import Image, display

        display(Image(png(fig), width=int(fig.get_figwidth() * CSS_PIXELS_PER_INCH), alt=alt))


# Source: Okabe and Ito, "Color Universal Design" (2008). Orange, sky blue and yellow are left out: under 3:1 on white.
COLOURS = {"blue": "#0072B2", "vermilion": "#D55E00", "green": "#009E73", "purple": "#CC79A7"}
INK = "#787878"  # 4.4:1 on white and 4.2:1 on #121212: nearly equal, because one picture serves both
PALE = "#A3A3A3"  # 2.5:1 on white: an area, never a line or a word
CSS_PIXELS_PER_INCH = 96
DOTS_PER_INCH = 2 * CSS_PIXELS_PER_INCH  # sharp on a dense screen, and still about 40 KB a figure


@contextmanager
def style() -> Iterator[None]:
    """Apply the course's look inside a ``with`` block, and nowhere else.

    Example:
        >>> import matplotlib
        >>> before = matplotlib.rcParams["text.color"]
        >>> with style():
        ...     matplotlib.rcParams["text.color"] == before
        False
        >>> matplotlib.rcParams["text.color"] == before
        True
    """
    import matplotlib as mpl
    from cycler import cycler

    # Line style changes with the colour, so that a curve is told apart without colour too.
    with mpl.rc_context(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": INK,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.prop_cycle": cycler(color=list(COLOURS.values())) + cycler(linestyle=["-", "--", "-.", ":"]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "figure.dpi": DOTS_PER_INCH,
            "figure.edgecolor": "none",
            "figure.facecolor": "none",
            "font.family": ["DejaVu Sans"],
            "font.size": 10,
            "grid.alpha": 0.3,
            "grid.color": INK,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 2,
            "savefig.facecolor": "none",
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        yield

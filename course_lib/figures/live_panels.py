"""The three panels of the live view: loss, memory and throughput, drawn so cheaply that the ranks keep the cores.

The figure is built once; a frame redraws only the curves over a stored background.
"""

from __future__ import annotations

from io import BytesIO
from math import ceil, floor, isfinite, log10
from typing import TYPE_CHECKING, Any

from course_lib.figures import plots, style

if TYPE_CHECKING:
    from course_lib.runs import Run

__all__ = ["Panels", "roomy_limits", "round_limits", "sentences"]


class Panels:
    """Loss, memory and throughput side by side; built once, then only the curves are drawn again."""

    width_inches, height_inches = 7.5, 2.5  # as wide as the text of the book
    width_pixels = int(width_inches * style.CSS_PIXELS_PER_INCH)

    def __init__(self, total_steps: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.total_steps = max(1, total_steps)
        with style.style():
            size = (self.width_inches, self.height_inches)
            # Fixed margins: a layout engine would lay out the text again whenever an axis grows (0.3 s against 0.1 s).
            self.figure = Figure(figsize=size, dpi=style.CSS_PIXELS_PER_INCH)
            self.figure.subplots_adjust(left=0.1, right=0.965, bottom=0.2, top=0.88, wspace=0.5)
            self.canvas = FigureCanvasAgg(self.figure)
            self.axes = self.figure.subplots(1, 3)
            loss, memory, rate = self.axes
            line = {"animated": True, "marker": "o" if total_steps <= 40 else "", "markersize": 4}
            (self.loss,) = loss.plot([], [], color=style.COLOURS["blue"], **line)
            held_out = {"linestyle": "none", "marker": "D", "markersize": 5, "animated": True}
            (self.validation,) = loss.plot([], [], color=style.COLOURS["vermilion"], **held_out)
            (self.rate,) = rate.plot([], [], color=style.COLOURS["purple"], **line)
            peak = {"marker": "_", "markersize": 12, "markeredgewidth": 2.5, "linestyle": "none", "animated": True}
            (self.peak,) = memory.plot([], [], color=style.COLOURS["vermilion"], **peak)
            memory.grid(axis="x", visible=False)
            titles = ("Loss", "Memory per rank", "Throughput")
            labels = (("step", "nats per token"), ("rank (line: peak)", "MiB"), ("step", "tokens/s, all ranks"))
            for ax, title, (x, y) in zip(self.axes, titles, labels, strict=True):
                ax.set(xlabel=x, ylabel=y)
                ax.set_title(title, loc="left")
                ax.xaxis.get_major_locator().set_params(integer=True)
        rate.yaxis.set_major_formatter("{x:,.0f}")
        for ax in (loss, rate):
            ax.set_xlim(0, self.total_steps + 0.5)
        self.bars: list[Any] = []
        self.frame: Any = None  # everything but the curves, as pixels
        self.limits: Any = None

    def draw(self, run: Run, *, last: bool = False) -> bytes:
        """Draw one frame: fast while the run goes on, twice as sharp at the end."""
        with style.style():
            limits = self._place(run, tight=last)
            if last:
                return self._draw_last(run)
            if limits != self.limits:
                self.canvas.draw()
                self.frame = self.canvas.copy_from_bbox(self.figure.bbox)
                self.limits = limits
            self.canvas.restore_region(self.frame)
            for artist in self._moving():
                artist.axes.draw_artist(artist)
        return self._encode(compress_level=1)

    def _place(self, run: Run, *, tight: bool) -> tuple[Any, ...]:
        """Hand the data to the artists; return what decides whether the axes have to be drawn again."""
        metrics, validation = run.metrics, getattr(run, "validation", None)
        loss_axis, memory_axis, rate_axis = self.axes
        losses = list(metrics["loss"]) if len(metrics) else []
        if len(metrics):
            self.loss.set_data(metrics["step"], metrics["loss"])
            self.rate.set_data(metrics["step"], metrics["tokens_per_second"])
        if validation is not None and len(validation):
            self.validation.set_data(validation["step"], validation["loss"])
            losses += list(validation["loss"])
        ranks, last_bytes, peak_bytes = plots.per_rank(run)
        unit, unit_bytes = plots.memory_unit(max(peak_bytes, default=0))
        if len(ranks) != len(self.bars):
            for bar in self.bars:
                bar.remove()
            bars = memory_axis.bar(ranks, [0] * len(ranks), width=0.7, color=style.COLOURS["green"], animated=True)
            self.bars = list(bars)
            memory_axis.set_xlim(min(ranks, default=0) - 0.6, max(ranks, default=0) + 0.6)
        for bar, value in zip(self.bars, last_bytes, strict=True):
            bar.set_height(value / unit_bytes)
        peaks = [value / unit_bytes for value in peak_bytes]
        self.peak.set_data(ranks, peaks)
        rates = list(metrics["tokens_per_second"]) if len(metrics) else []
        kept = (None,) * 3 if tight or not self.limits or self.limits[3] != unit else self.limits[:3]
        # Losses fall, so there is room below; memory and throughput start at zero.
        ranges = tuple(
            roomy_limits(values, kept=old, tight=tight)
            for values, old in zip((losses, [0, *peaks], [0, *rates]), kept, strict=True)
        )
        limits = (*ranges, unit, len(ranks), bool(len(self.validation.get_xdata())))
        if limits != self.limits:
            for ax, pair in zip(self.axes, ranges, strict=True):
                ax.set_ylim(*pair)
            memory_axis.set_ylabel(unit)
            loss_axis.set_xlabel("step (diamonds: held out)" if limits[-1] else "step")
        return limits

    def _draw_last(self, run: Run) -> bytes:
        for artist in self._moving():
            artist.set_animated(False)
        self.figure.set_dpi(style.DOTS_PER_INCH)
        for ax, sentence in zip(self.axes, sentences(run), strict=True):
            ax.set_label(sentence)
        self.canvas.draw()
        return self._encode(compress_level=6)

    def _moving(self) -> list[Any]:
        return [*self.bars, self.peak, self.loss, self.validation, self.rate]

    def _encode(self, *, compress_level: int) -> bytes:
        from numpy import asarray
        from PIL import Image

        buffer = BytesIO()
        Image.fromarray(asarray(self.canvas.buffer_rgba())).save(buffer, "png", compress_level=compress_level)
        return buffer.getvalue()


def roomy_limits(
    values: list[float], *, kept: tuple[float, float] | None = None, tight: bool = False
) -> tuple[float, float]:
    """Choose the limits of an axis so that they seldom change: a change costs as much as eight frames.

    Args:
        values: All values on the axis.
        kept: The limits of the frame before, which stay while the values fit and fill a third of them.
        tight: For the last frame: a margin, and no room for more.

    Example:
        >>> roomy_limits([5.0, 7.0]), roomy_limits([4.5, 7.0], kept=(4.0, 7.5)), roomy_limits([0, 400], tight=True)
        ((4.0, 8.0), (4.0, 7.5), (0.0, 500.0))
        >>> bottom, top = roomy_limits([8.38356, 8.38361], tight=True)
        >>> top - bottom > 0.02
        True
    """
    finite = [float(value) for value in values if isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    # nearly equal values are drawn as such; a closer look would need labels longer than their place
    spread = max((high - low) or abs(high) or 1.0, abs(high) / 20)
    if kept and kept[0] <= low and high <= kept[1] and 3 * spread >= kept[1] - kept[0]:
        return kept
    below, above = (0.03, 0.05) if tight else (0.5, 0.15)
    return round_limits([low - below * spread if low else 0.0, high + above * spread])


def round_limits(values: list[float]) -> tuple[float, float]:
    """Round the range of the values outwards to whole steps, so that the axis moves seldom.

    Example:
        >>> round_limits([5.13, 6.97]), round_limits([0, 3100.0]), round_limits([])
        ((5.0, 7.0), (0.0, 4000.0), (0.0, 1.0))
    """
    finite = [float(value) for value in values if isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    spread = (high - low) or abs(high) or 1.0
    size = 10 ** floor(log10(spread))
    step = next(size * factor for factor in (0.2, 0.5, 1, 2) if spread <= 5 * size * factor)
    bottom, top = float(floor(low / step) * step), float(ceil(high / step) * step)
    return bottom, top if top > bottom else bottom + step


def sentences(run: Run) -> list[str]:
    """Put the three panels into words, by letting the plain figures write theirs."""
    return [draw(run).get_label() for draw in (plots.loss, plots.memory, plots.throughput)]

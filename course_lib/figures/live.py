"""A notebook cell that shows loss, memory per rank and tokens per second while a run trains.

The picture is a PNG behind one display id, so its last frame stays in the saved notebook and in a static page; it is
folded where the run succeeded.
The ranks need the cores more than the picture does: a frame redraws only the curves over a stored background, and the
pause between frames grows with what a frame costs, so that drawing takes at most 2% of the machine.
Without a notebook, a terminal gets one line of text and anything else gets silence.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from html import escape
from io import BytesIO
from math import ceil, floor, isfinite, log10
from typing import TYPE_CHECKING, Any

from course_lib.common import screen
from course_lib.common.units import duration
from course_lib.figures import plots
from course_lib.runs import Agreement

if TYPE_CHECKING:
    from course_lib.runs import Run

DUTY_CYCLE = 0.02  # share of the machine's cores that drawing may take
SECONDS_BETWEEN_FRAMES = 0.5  # the fastest rhythm in a notebook; it slows down by itself
SECONDS_BETWEEN_LINES = 1.0  # the same in a terminal
SECONDS_AT_MOST = 2.0  # between frames whose cost this pause can pay


def view(total_steps: int, *, name: str = "") -> View:
    """Open a live view for a run of ``total_steps`` steps.

    Args:
        total_steps: How many steps the run will take.
    """
    return View(total_steps, name=name)


def remaining(run: Run, *, total_steps: int) -> float | None:
    """Estimate the seconds that the remaining steps take, or None while there is nothing to go by.

    The median of the last ten steps stands for the rest. The first step is left out: it also pays for allocation and
    for opening connections. Evaluation and checkpoints are not foreseen.
    """
    elapsed_ms = run.metrics["elapsed_ms"].iloc[1:] if len(run.metrics) else []
    if len(elapsed_ms) < 2:
        return None
    return float(elapsed_ms.iloc[-10:].median()) / 1000 * max(0, total_steps - int(run.metrics["step"].iloc[-1]))


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Keep an error of the view out of the cell that trains: the view says so once and goes dark."""

    @wraps(method)
    def guarded(self: View, run: Run) -> None:
        if self.problem:
            return
        try:
            method(self, run)
        except Exception as error:  # whatever goes wrong here, the training goes on
            self.problem = f"{type(error).__name__}: {error}"
            print(f"The live view stopped ({self.problem}). The training is not affected.", file=sys.stderr)

    return guarded


class View:
    """The live view of one run; ``launch.run`` feeds it.

    Attributes:
        total_steps: How many steps the run will take.
        frame_cost_seconds: CPU time of the latest frame; the first, which builds the figure, does not count.
        interval_seconds: The pause between two frames that follows from it.
        problem: Why the view went dark, or an empty string.
    """

    def __init__(self, total_steps: int, *, name: str = "") -> None:
        self.total_steps = total_steps
        self.name = name
        self.frame_cost_seconds = 0.0
        self.problem = ""
        self._started = time.time()
        self._next = 0.0
        self._debt = 0.0  # CPU seconds that were drawn but not yet waited for
        self._paid = time.monotonic()
        self._drawn: tuple[int, int] = (0, 0)
        self._where, self._line = screen.where(), screen.Line()
        self.interval_seconds = SECONDS_BETWEEN_FRAMES if self._where == "notebook" else SECONDS_BETWEEN_LINES
        self._panels: Panels | None = None
        self._image: Any = None
        self._bar: Any = None
        self._agreement: Agreement | None = None
        self._label: Any = None

    @_harmless
    def update(self, run: Run) -> None:
        """Show the run as it is now; cheap to call as often as you like, because it mostly returns at once."""
        if self._where == "nowhere" or time.monotonic() < self._next:
            return
        start = time.thread_time()  # CPU time: wall time would count the ranks that hold the cores
        panels = self._panels
        self._say(run, self._progress(run))
        # Reading the run's files counts as well: that is why the check for news stands behind the clock.
        rows = (len(run.metrics), len(run.memory))
        if self._where == "notebook" and rows not in (self._drawn, (0, 0)):
            self._show(run)
            self._drawn = rows
        if panels is self._panels:
            self._pay(time.thread_time() - start)
        self._next = time.monotonic() + self.interval_seconds

    @_harmless
    def close(self, run: Run) -> None:
        """Show the last frame, sharp and with alternative text, and how the run ended."""
        if self._where == "nowhere":
            return
        self._say(run, self._ending(run), last=True)
        if self._where == "notebook" and (len(run.metrics) or len(run.memory)):
            self._show(run, last=True)

    def _pay(self, cost: float) -> None:
        """Set the pause that keeps drawing within its share of the cores.

        A few frames draw the axes again and cost eight times the others. Their cost is a debt that the pauses after the
        cheap ones pay off, so that the view does not stand still; a cost beyond two seconds of pause is waited for.
        """
        share = DUTY_CYCLE * len(os.sched_getaffinity(0))
        now = time.monotonic()
        self._debt = max(0.0, self._debt - (now - self._paid) * share) + cost
        self._paid = now
        self.frame_cost_seconds = cost
        fastest = SECONDS_BETWEEN_FRAMES if self._where == "notebook" else SECONDS_BETWEEN_LINES
        longest = SECONDS_AT_MOST if cost <= SECONDS_AT_MOST * share else cost / share
        self.interval_seconds = max(fastest, min(longest, self._debt / share))

    def _show(self, run: Run, *, last: bool = False) -> None:
        from IPython.display import Image, display

        if self._panels is None:
            self._panels = Panels(self.total_steps)
        data = self._panels.draw(run, last=last)
        alt = plots.describe(self._panels.figure) if last else "Live view of a run: it will be replaced"
        picture = Image(data, format="png", width=self._panels.width_pixels, alt=alt)
        bundle, metadata = picture._repr_mimebundle_()
        if last:
            bundle["text/html"] = self._folded(bundle["image/png"], alt, is_open=not _succeeded(run))
            # lessons.execute finds the run directory of an executed notebook here.
            metadata["course"] = {"run": str(run.path)}
        if self._image is None:
            self._image = display(bundle, raw=True, display_id=True, metadata=metadata)
        else:
            self._image.update(bundle, raw=True, metadata=metadata)

    def _folded(self, encoded: str, alt: str, *, is_open: bool) -> str:
        """The last frame below a line that unfolds it: what matters of a run, its lesson draws again."""
        image = f'<img src="data:image/png;base64,{encoded.strip()}" width="{Panels.width_pixels}" alt="{escape(alt)}">'
        summary = "<summary>Loss, memory and throughput while it ran</summary>"
        return f'<details class="live"{" open" if is_open else ""}>{summary}{image}</details>'

    def _say(self, run: Run, text: str, *, last: bool = False) -> None:
        text = f"{self.name}: {text}" if self.name else text
        if self._where == "terminal":
            if last:
                self._line.close(text)
            else:
                self._line.say(text, now=True)  # the view has its own clock
            return
        if self._bar is None:
            import ipywidgets
            from IPython.display import display

            layout = ipywidgets.Layout(width="220px")
            self._bar = ipywidgets.IntProgress(value=0, min=0, max=max(1, self.total_steps), layout=layout)
            # Not a Label: it sends its text through MathJax 2, which a book with MathJax 3 does not have.
            self._label = ipywidgets.HTML()
            display(ipywidgets.HBox([self._bar, self._label]))
        self._label.value = escape(text)
        self._bar.value = int(run.metrics["step"].iloc[-1]) if len(run.metrics) else 0
        if last:
            status = run.outcome.status if run.outcome else ""
            self._bar.bar_style = {"succeeded": "success", "failed": "danger"}.get(status, "warning")

    def _progress(self, run: Run) -> str:
        elapsed = duration(time.time() - self._started)
        if not len(run.metrics):
            stage = run.stage()
            return f"{'computing the first step' if stage == 'training' else stage}, {elapsed} so far"
        now = run.metrics.iloc[-1]
        left = remaining(run, total_steps=self.total_steps)
        self._agreement = self._agreement or Agreement(run)
        return self._warned(self._agreement.look()) + (
            f"step {int(now['step'])} of {self.total_steps}, loss {now['loss']:.3f} {plots.loss_unit(run)}, "
            + (f"{rate:,.0f} tokens/s, " if isfinite(rate := now["tokens_per_second"]) else "")
            + f"{elapsed} so far, "
            + (f"about {duration(left, rough=True)} left" if left is not None else "time left not known yet")
        )

    def _ending(self, run: Run) -> str:
        outcome = run.outcome
        status = outcome.status if outcome else ""
        began, ended = run.launch.get("started", self._started), (outcome.finished if outcome else 0) or time.time()
        steps = int(run.metrics["step"].iloc[-1]) if len(run.metrics) else 0
        words = {"succeeded": "done", "failed": "failed", "interrupted": "stopped by you"}.get(status, "ended")
        text = f"{words}, {steps} of {self.total_steps} steps in {duration(ended - began)}"
        if steps:
            text += f", loss {run.metrics['loss'].iloc[-1]:.3f} {plots.loss_unit(run)}"
        if outcome and status == "failed":
            text += f". {outcome.cause[:1].upper()}{outcome.cause[1:]}"
        return self._warned(run.warnings) + text

    def _warned(self, warnings: tuple[str, ...]) -> str:
        return "".join(f"WARNING: {text}. " for text in warnings)


def _succeeded(run: Run) -> bool:
    return bool(run.outcome) and run.outcome.status == "succeeded"


class Panels:
    """Loss, memory and throughput side by side; built once, then only the curves are drawn again."""

    width_inches, height_inches = 7.5, 2.5  # as wide as the text of the book
    width_pixels = int(width_inches * plots.CSS_PIXELS_PER_INCH)

    def __init__(self, total_steps: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.total_steps = max(1, total_steps)
        with plots.style():
            size = (self.width_inches, self.height_inches)
            # Fixed margins: a layout engine would lay out the text again whenever an axis grows (0.3 s against 0.1 s).
            self.figure = Figure(figsize=size, dpi=plots.CSS_PIXELS_PER_INCH)
            self.figure.subplots_adjust(left=0.085, right=0.975, bottom=0.2, top=0.88, wspace=0.6)
            self.canvas = FigureCanvasAgg(self.figure)
            self.axes = self.figure.subplots(1, 3)
            loss, memory, rate = self.axes
            line = {"animated": True, "marker": "o" if total_steps <= 40 else "", "markersize": 4}
            (self.loss,) = loss.plot([], [], color=plots.COLOURS["blue"], **line)
            held_out = {"linestyle": "none", "marker": "D", "markersize": 5, "animated": True}
            (self.validation,) = loss.plot([], [], color=plots.COLOURS["vermilion"], **held_out)
            (self.rate,) = rate.plot([], [], color=plots.COLOURS["purple"], **line)
            peak = {"marker": "_", "markersize": 12, "markeredgewidth": 2.5, "linestyle": "none", "animated": True}
            (self.peak,) = memory.plot([], [], color=plots.COLOURS["vermilion"], **peak)
            memory.grid(axis="x", visible=False)
            titles = ("Loss", "Memory per rank", "Throughput")
            labels = (("step", ""), ("rank (line: peak)", "MiB"), ("step", "tokens/s, all ranks"))
            for ax, title, (x, y) in zip(self.axes, titles, labels, strict=True):
                ax.set(xlabel=x, ylabel=y)
                ax.set_title(title, loc="left")
                ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        rate.yaxis.set_major_formatter("{x:,.0f}")
        room = 0.5 + 0.04 * self.total_steps  # for the whole first and last mark
        for ax in (loss, rate):
            ax.set_xlim(-room, self.total_steps + room)
        self.bars: list[Any] = []
        self.frame: Any = None  # everything but the curves, as pixels
        self.limits: Any = None

    def draw(self, run: Run, *, last: bool = False) -> bytes:
        """Draw one frame: fast while the run goes on, twice as sharp at the end."""
        with plots.style():
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
            bars = memory_axis.bar(ranks, [0] * len(ranks), width=0.7, color=plots.COLOURS["green"], animated=True)
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
            loss_axis.set_ylabel(plots.loss_unit(run).replace("/", " per "))
        return limits

    def _draw_last(self, run: Run) -> bytes:
        for artist in self._moving():
            artist.set_animated(False)
        self.figure.set_dpi(plots.DOTS_PER_INCH)
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
        kept: The limits of the frame before, which stay while the values fit and fill a third of them.

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

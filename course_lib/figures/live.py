"""A notebook cell that shows loss, memory per rank and tokens per second while a run trains.

The picture is a PNG behind one display id, so its last frame stays in the saved notebook and in a static page.
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
from typing import TYPE_CHECKING, Any

from course_lib.common import screen
from course_lib.common.units import duration
from course_lib.figures import live_panels, plots
from course_lib.runs import Agreement

if TYPE_CHECKING:
    from course_lib.runs import Run

__all__ = ["View", "remaining", "view"]

DUTY_CYCLE = 0.02  # share of the machine's cores that drawing may take
SECONDS_BETWEEN_FRAMES = 0.5  # the fastest rhythm in a notebook; it slows down by itself
SECONDS_BETWEEN_LINES = 1.0  # the same in a terminal
SECONDS_AT_MOST = 2.0  # between frames whose cost this pause can pay


def view(total_steps: int, *, name: str = "") -> View:
    """Open a live view for a run of ``total_steps`` steps.

    Args:
        total_steps: How many steps the run will take.
        name: The run's name, shown in front of the progress text.
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
        self._panels: live_panels.Panels | None = None
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
            self._panels = live_panels.Panels(self.total_steps)
        data = self._panels.draw(run, last=last)
        alt = plots.describe(self._panels.figure) if last else "Live view of a run: it will be replaced"
        picture = Image(data, format="png", width=self._panels.width_pixels, alt=alt)
        # lessons.execute finds the run directory of an executed notebook here.
        metadata = {"course": {"run": str(run.path)}} if last else {}
        if self._image is None:
            self._image = display(picture, display_id=True, metadata=metadata)
        else:
            self._image.update(picture, metadata=metadata)

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
            f"step {int(now['step'])} of {self.total_steps}, loss {now['loss']:.3f} nats/token, "
            f"{now['tokens_per_second']:,.0f} tokens/s, {elapsed} so far, "
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
            text += f", loss {run.metrics['loss'].iloc[-1]:.3f} nats/token"
        if outcome and status == "failed":
            text += f". {outcome.cause[:1].upper()}{outcome.cause[1:]}"
        return self._warned(run.warnings) + text

    def _warned(self, warnings: tuple[str, ...]) -> str:
        return "".join(f"WARNING: {text}. " for text in warnings)

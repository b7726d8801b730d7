"""The ledger as a page: a table, a figure that compares all predictions on one scale, and a button to forget it all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from course_lib.figures import plots, style
from course_lib.lesson import ledger, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["draw", "forget_button", "show", "text"]

AT_MOST = 100.0
"""Ratios beyond this factor are drawn at it; the table has the number."""


def show(*, lesson: str | None = None) -> None:
    """Display the ledger in a notebook: predictions, errors, exercises.

    Args:
        lesson: Only what belongs to this lesson.
    """
    from IPython.display import display

    predictions, scores, exercises = (f(lesson=lesson) for f in (ledger.table, ledger.scores, ledger.exercises))
    if not len(predictions) and not len(exercises):
        print(f"The ledger {ledger.path()} is empty. Run the cells of a lesson that predict and measure.")
        return
    if len(predictions):
        display(tables.full(predictions, index=False))
    if len(scores):
        near = int(((scores.ratio >= 0.5) & (scores.ratio <= 2)).sum())
        with plots.figure(height=0.9 + 0.28 * len(scores)) as ax:
            draw(scores, ax=ax, title=f"{near} of {len(scores)} predictions are within a factor of two")
    if len(exercises):
        display(tables.full(exercises, index=False))


def draw(scores: DataFrame, *, ax: Axes, title: str = "") -> Axes:
    """Draw predicted divided by measured, one row a prediction, on a logarithmic axis.

    Args:
        scores: What `ledger.scores` returns.
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis; its label puts the picture into words.
    """
    names = [f"{lesson}  {quantity}" for lesson, quantity in zip(scores.lesson, scores.quantity, strict=True)]
    places = range(len(names))
    shown = scores.ratio.clip(1 / AT_MOST, AT_MOST)
    ax.axvspan(0.5, 2, color=style.COLOURS["green"], alpha=0.15)
    ax.axvline(1, color=style.INK, linewidth=1)
    ax.plot(shown, places, marker="o", linestyle="none", color=style.COLOURS["blue"])
    ax.set_xscale("log")
    ax.set_xlim(min(0.2, shown.min() / 1.5), max(5, shown.max() * 1.5))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("predicted / measured (band: within a factor of two)")
    if title:
        ax.set_title(title)
    worst = scores.ratio.map(lambda ratio: max(ratio, 1 / ratio)).idxmax()
    ax.set_label(f"The prediction farthest off is {names[worst]}: {scores.ratio[worst]:.3g} times what was measured")
    return ax


def forget_button() -> Any:
    """A button that empties the ledger; it asks once more before it does."""
    import ipywidgets

    button = ipywidgets.Button(description="Forget everything", layout=ipywidgets.Layout(width="16em"))
    said = ipywidgets.HTML()

    def clicked(_: object) -> None:
        if button.description == "Forget everything":
            button.description, button.button_style = "Click again to be sure", "danger"
            return
        ledger.reset()
        button.description, button.button_style = "Forget everything", ""
        said.value = "The ledger is empty. Run the cell above again."

    button.on_click(clicked)
    return ipywidgets.HBox([button, said])


def text(*, lesson: str | None = None, history: bool = False) -> str:
    """The ledger for a terminal.

    Args:
        lesson: Only what belongs to this lesson.
        history: All attempts; otherwise the latest of each quantity.
    """
    predictions, exercises = ledger.table(lesson=lesson, history=history), ledger.exercises(lesson=lesson)
    parts = [frame.to_string(index=False) for frame in (predictions, exercises) if len(frame)]
    return "\n\n".join([*(parts or ["nothing yet"]), f"kept in {ledger.path()}, and sent nowhere"])

"""Figures of models that were measured alike: the four measures of lessons 13 to 15, and a ladder of wrong answers.

What is drawn comes from `reading.evaluation`; an interval is a bar, and its ends stand in the words of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.figures import plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["four", "rungs"]

MARKS = "osD^v"
PANELS = {
    "pass_rate": ("Passes PEP 257", "share of answers", "passes"),
    "answer_loss": ("Loss of the truth", "nats/token", "answer loss"),
    "word_f1": ("Words shared with it", "F1", "shared words"),
    "distinct": ("Different answers", "share of answers", "distinct"),
}
"""Measure to its title, its unit and its column in `evaluation.seeds()`."""
SHARES = (-0.05, 1.05)
"""Ends of an axis of shares: a mark at 0 or at 1 is whole."""


def four(measured: Mapping[str, Any], axes: Sequence[Axes], *, seeds: pd.DataFrame | None = None) -> None:
    """Draw the four measures side by side, a mark a model, with the interval where a measure has one.

    Args:
        measured: Name of the model to its `evaluation.Measures`.
        axes: Four.
        seeds: What `evaluation.seeds()` has of the same models; a small cross a seed stands beside the mark.
    """
    for (measure, (title, unit, column)), ax in zip(PANELS.items(), axes, strict=True):
        words = []
        for place, (name, each) in enumerate(measured.items()):
            words.append(f"{name} has {_draw(ax, place, getattr(each, measure), place)} {unit}")
            if seeds is not None:
                others = seeds.loc[name, column]
                ax.plot([place + 0.3] * len(others), others, "x", color=plots.INK, markersize=5)
                words[-1] += f", {' and '.join(f'{value:.3g}' for value in others)} in {len(others)} seeds"
        plots.finish(ax, x="", y=unit, title=title, sentences=words, whole_x=False)
        ax.set_xticks(range(len(measured)), measured, rotation=30, ha="right")
        ax.set_xlim(-0.5, len(measured) - 0.5)
        if unit.startswith("share"):
            ax.set_ylim(*SHARES)
        elif unit == "F1":
            ax.set_ylim(bottom=SHARES[0] * ax.get_ylim()[1])


def rungs(right: Mapping[tuple[str, str], Any], ax: Axes, *, y: str, chance: float) -> None:
    """Draw the share of items that each model gets right, rung by rung, beside chance.

    Args:
        right: Rung and model to an `evaluation.Interval`.
        ax: The axis.
        y: What is drawn, with the normalisation.
        chance: The share of a model that guesses.
    """
    steps, models = (list(dict.fromkeys(key[part] for key in right)) for part in (0, 1))
    words = []
    for number, model in enumerate(models):
        for place, step in enumerate(steps):
            beside = place + 0.12 * (number - (len(models) - 1) / 2)
            drawn = _draw(ax, beside, right[step, model], number, label=None if place else model)
            words.append(f"{model}, {step}: {drawn}")
    ax.axhline(chance, color=plots.INK, linewidth=1.5, dashes=[6, 3], label="chance")
    plots.finish(ax, x="wrong answers", y=y, title="", sentences=words, whole_x=False)
    ax.set_xticks(range(len(steps)), steps)
    ax.set_ylim(*SHARES)
    ax.legend(ncols=len(models) + 1, loc="lower left", fontsize=8)


def _draw(ax: Axes, place: float, value: Any, look: int, *, label: str | None = None) -> str:
    """One mark with its interval, and how it reads."""
    shown = getattr(value, "value", value)
    around = [[shown - value.low], [value.high - shown]] if hasattr(value, "low") else None
    colour = list(plots.COLOURS.values())[look % len(plots.COLOURS)]
    mark = MARKS[look % len(MARKS)]
    ax.errorbar(place, shown, around, fmt=mark, color=colour, markersize=7, capsize=3, label=label)
    return str(value) if around else f"{shown:.3g}"

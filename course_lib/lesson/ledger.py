"""The learner's ledger: predictions beside what was measured, attempts at exercises, and the page that shows both.

It is one JSON file on this machine (``COURSE_LEDGER``, or one below ``XDG_STATE_HOME``), which outlives every rerun of
a lesson and is never sent anywhere.  Writers take a lock and replace the file whole, so that two notebooks at once lose
nothing and a reader never sees half of it.  A file that cannot be read is never overwritten.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common import files
from course_lib.common.project import variable
from course_lib.common.screen import shell
from course_lib.common.units import format_number
from course_lib.figures import plots
from course_lib.lesson import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = [
    "LedgerError",
    "attempted",
    "draw",
    "exercises",
    "forget_button",
    "measured",
    "path",
    "predict",
    "reset",
    "scores",
    "show",
    "table",
    "text",
]


class LedgerError(RuntimeError):
    """The ledger cannot be read or written."""


@dataclass(frozen=True)
class Entry:
    """One prediction and, once it is known, what was measured."""

    lesson: str
    name: str
    unit: str
    predicted: float | None
    measured: float | None = None
    predicted_at: float = 0.0
    measured_at: float | None = None


@dataclass(frozen=True)
class Exercise:
    """How often an exercise was tried, and when an attempt was right for the first time."""

    lesson: str
    name: str
    attempts: int
    solved_at: float | None = None


@dataclass
class _Content:
    """The whole file."""

    entries: list[Entry] = field(default_factory=list)
    exercises: list[Exercise] = field(default_factory=list)


def predict(lesson: str, name: str, value: float | None, unit: str) -> None:
    """Enter a prediction in the ledger, before the run that tests it.

    Running the cell again with another value adds a new attempt; earlier ones stay.

    Args:
        lesson: The lesson's number, such as "03".
        name: The quantity, such as "loss at step 1".
        value: Your estimate in ``unit``, or None if you would rather not.
        unit: Its unit, such as "nats/token".
    """
    value = None if value is None else float(value)
    with _open() as content:
        entries = content.entries
        new = Entry(lesson=lesson, name=name, unit=unit, predicted=value, predicted_at=time.time())
        last = next(
            (i for i in reversed(range(len(entries))) if (entries[i].lesson, entries[i].name) == (lesson, name)), None
        )
        # An attempt that no run has tested yet may be corrected; a tested one is history.
        if last is not None and entries[last].measured is None:
            entries[last] = new
        else:
            entries.append(new)
    print(f"no prediction of {name}" if value is None else f"predicted: {name} = {format_number(value)} {unit}")


def measured(name: str, value: float, *, lesson: str | None = None) -> None:
    """Compare a measured value with the latest prediction of that name.

    Args:
        name: The quantity, as it was named in ``predict``.
        value: What was measured, in the unit of the prediction.
        lesson: The lesson's number, if two lessons predict a quantity of this name.

    Raises:
        ValueError: Nothing was predicted under this name.
    """
    value = float(value)
    with _open() as content:
        entries = content.entries
        fits = [i for i, entry in enumerate(entries) if entry.name == name and lesson in (None, entry.lesson)]
        if not fits:
            known = ", ".join(sorted({repr(entry.name) for entry in entries})) or "none"
            raise ValueError(
                f"nothing was predicted under the name {name!r}; the ledger knows: {known}. "
                "Run the cell with checks.predict(...) first, and use the same name."
            )
        entry = max((entries[i] for i in fits), key=lambda entry: entry.predicted_at)
        entries[entries.index(entry)] = replace(entry, measured=value, measured_at=time.time())
    shown = f"measured: {name} = {format_number(value)} {entry.unit}"
    if entry.predicted is None:
        print(f"{shown} (you made no prediction)")
    else:
        print(f"{shown}, predicted {format_number(entry.predicted)} {entry.unit}: {_error(entry.predicted, value)}")


def attempted(right: bool, *, lesson: str | None = None, name: str | None = None) -> None:
    """Enter an attempt at an exercise; an exercise that was once right stays right.

    Args:
        right: Whether the attempt passed.
        lesson: The lesson's number; by default that of the notebook whose cell is running.
        name: The exercise's name; by default the id of the running cell.  Without a notebook nothing is entered.
    """
    here_lesson, here_name = _running_cell()
    lesson, name = lesson or here_lesson, name or here_name
    if not lesson or not name:
        return
    with _open() as content:
        old = next((e for e in content.exercises if (e.lesson, e.name) == (lesson, name)), Exercise(lesson, name, 0))
        solved_at = old.solved_at or (time.time() if right else None)
        new = replace(old, attempts=old.attempts + 1, solved_at=solved_at)
        content.exercises[:] = sorted([e for e in content.exercises if e is not old] + [new], key=_place)


def table(*, lesson: str | None = None, history: bool = False) -> DataFrame:
    """Show your predictions beside what was measured.

    Args:
        lesson: Only the predictions of this lesson.
        history: All attempts; otherwise the latest of each quantity.

    Returns:
        One row a prediction: lesson, quantity, predicted, measured, unit, error.
    """
    from pandas import DataFrame

    columns = ["lesson", "quantity", "predicted", "measured", "unit", "error"]
    rows = [
        (
            entry.lesson,
            entry.name,
            "none" if entry.predicted is None else format_number(entry.predicted),
            "not yet" if entry.measured is None else format_number(entry.measured),
            entry.unit,
            "" if None in (entry.predicted, entry.measured) else _error(entry.predicted, entry.measured),
        )
        for entry in _entries(lesson, history=history)
    ]
    return DataFrame(rows, columns=columns)


def exercises(*, lesson: str | None = None) -> DataFrame:
    """Show which exercises you tried, and which were right.

    Args:
        lesson: Only those of this lesson.

    Returns:
        One row an exercise: lesson, exercise (the cell's id), attempts, state ("right" or "not yet").
    """
    from pandas import DataFrame

    rows = [
        (entry.lesson, entry.name, entry.attempts, "right" if entry.solved_at else "not yet")
        for entry in _read(path()).exercises
        if lesson in (None, entry.lesson)
    ]
    return DataFrame(rows, columns=["lesson", "exercise", "attempts", "state"])


def scores(*, lesson: str | None = None) -> DataFrame:
    """Compare predictions of every unit on one scale: predicted divided by measured.

    Args:
        lesson: Only those of this lesson.

    Returns:
        One row a prediction that has a measured value, both positive: lesson, quantity, ratio.
    """
    from pandas import DataFrame

    rows = [
        (entry.lesson, entry.name, entry.predicted / entry.measured)
        for entry in _entries(lesson)
        if entry.predicted is not None
        and entry.measured is not None
        and all(math.isfinite(value) and value > 0 for value in (entry.predicted, entry.measured))
    ]
    return DataFrame(rows, columns=["lesson", "quantity", "ratio"])


def reset(*, lesson: str | None = None) -> None:
    """Forget all predictions and exercises, or those of one lesson."""
    with _open() as content:
        predictions, tries = len(content.entries), len(content.exercises)
        content.entries[:] = [e for e in content.entries if lesson is not None and e.lesson != lesson]
        content.exercises[:] = [e for e in content.exercises if lesson is not None and e.lesson != lesson]
        predictions, tries = predictions - len(content.entries), tries - len(content.exercises)
    text = f"forgot {predictions} prediction{'' if predictions == 1 else 's'}"
    print(text + (f" and {tries} exercise{'' if tries == 1 else 's'}" if tries else ""))


def path() -> Path:
    """Return the ledger's file: ``COURSE_LEDGER``, or one in the user's state directory (XDG)."""
    given = variable("COURSE_LEDGER")
    if given:
        return Path(given).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "nemotron-course" / "ledger.json"


def _place(entry: Entry | Exercise) -> tuple[str, str]:
    return entry.lesson, entry.name


def _entries(lesson: str | None, *, history: bool = False) -> list[Entry]:
    entries = [entry for entry in _read(path()).entries if lesson in (None, entry.lesson)]
    return entries if history else list({_place(entry): entry for entry in entries}.values())


def _running_cell() -> tuple[str, str]:
    """The lesson's number and the id of the cell that runs, as JupyterLab tells its kernel; empty where nobody does."""
    kernel = shell()
    if kernel is None:
        return "", ""
    parent = getattr(kernel, "parent_header", None) or {}
    cell = (parent.get("metadata") or {}).get("cellId", "")
    found = re.match(r"(\d\d|[a-z])_", Path(os.environ.get("JPY_SESSION_NAME", "")).name)
    return (found.group(1), cell) if found else ("", cell)


def _error(predicted: float, value: float) -> str:
    """Say how wrong a prediction was.

    Example:
        >>> _error(6.6, 6.0), _error(3.24, 1.0), _error(20.0, 1.0), _error(0.01, -0.0006)
        ('10% too high', '224% too high', '20 times', 'off by 0.0106')
    """
    if predicted == value:
        return "exact"
    if value == 0 or not math.isfinite(value) or predicted * value < 0:
        return f"off by {format_number(predicted - value)}"
    share = 100 * (predicted - value) / abs(value)
    if abs(share) >= 1000:
        return f"{predicted / value:,.3g} times"
    return f"{abs(share):.{2 if abs(share) < 100 else 3}g}% too {'high' if share > 0 else 'low'}"


def _read(file: Path) -> _Content:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        # The first format had no exercises.
        return _Content(
            [Entry(**entry) for entry in stored["entries"]], [Exercise(**e) for e in stored.get("exercises", [])]
        )
    except FileNotFoundError:
        return _Content()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"the ledger {file} cannot be read ({error}). Move the file away to begin a new one, "
            "or set COURSE_LEDGER to another file."
        ) from error


@contextmanager
def _open() -> Iterator[_Content]:
    """Read, let the caller change, and write: under a lock, and with a rename, so that two notebooks lose nothing."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_name(file.name + ".lock").open("a")
    except OSError as error:
        raise LedgerError(
            f"the ledger {file} cannot be written ({error}). Set COURSE_LEDGER to a file in a directory of yours."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = _read(file)
        yield content
        text = json.dumps({"format": 2, **asdict(content)}, indent=1)
        try:
            files.write_text(file, text)
        except OSError as error:
            raise LedgerError(
                f"the ledger {file} cannot be written ({error}). Set COURSE_LEDGER to another file."
            ) from error


AT_MOST = 100.0
"""Ratios beyond this factor are drawn at it; the table has the number."""


def show(*, lesson: str | None = None) -> None:
    """Display the ledger in a notebook: predictions, errors, exercises.

    Args:
        lesson: Only what belongs to this lesson.
    """
    from IPython.display import display

    predictions, scored, solved = (f(lesson=lesson) for f in (table, scores, exercises))
    if not len(predictions) and not len(solved):
        print(f"The ledger {path()} is empty. Run the cells of a lesson that predict and measure.")
        return
    if len(predictions):
        display(tables.full(predictions, index=False))
    if len(scored):
        near = int(((scored.ratio >= 0.5) & (scored.ratio <= 2)).sum())
        with plots.figure(height=0.9 + 0.28 * len(scored)) as ax:
            draw(scored, ax=ax, title=f"{near} of {len(scored)} predictions are within a factor of two")
    if len(solved):
        display(tables.full(solved, index=False))


def draw(scores: DataFrame, *, ax: Axes, title: str = "") -> Axes:
    """Draw predicted divided by measured, one row a prediction, on a logarithmic axis.

    Args:
        scores: What `scores` returns.
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis; its label puts the picture into words.
    """
    names = [f"{lesson}  {quantity}" for lesson, quantity in zip(scores.lesson, scores.quantity, strict=True)]
    places = range(len(names))
    shown = scores.ratio.clip(1 / AT_MOST, AT_MOST)
    ax.axvspan(0.5, 2, color=plots.COLOURS["green"], alpha=0.15)
    ax.axvline(1, color=plots.INK, linewidth=1)
    ax.plot(shown, places, marker="o", linestyle="none", color=plots.COLOURS["blue"])
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
        reset()
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
    both = table(lesson=lesson, history=history), exercises(lesson=lesson)
    parts = [frame.to_string(index=False) for frame in both if len(frame)]
    return "\n\n".join([*(parts or ["nothing yet"]), f"kept in {path()}, and sent nowhere"])

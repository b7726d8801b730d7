"""The learner's ledger: guesses and predictions beside what was measured, and attempts at exercises.

A guess is the learner's own number, a prediction is what the course computed from a formula or took from a baseline; the
two are kept apart, and only guesses are scored.
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
    "by_lesson",
    "course_of_errors",
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
    """One quantity of a lesson: guessed, predicted and, once it is known, measured."""

    lesson: str
    name: str
    unit: str
    predicted: float | None
    measured: float | None = None
    predicted_at: float = 0.0
    measured_at: float | None = None
    guess: float | None = None  # files of the first two formats have none


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


def predict(lesson: str, name: str, value: float | None, unit: str, *, guess: float | None = None) -> None:
    """Enter what is expected, before the run that tests it: the learner's guess, and the course's own number.

    Running the cell again after the run adds a new attempt; earlier ones stay.

    Args:
        lesson: The lesson's number, such as "03".
        name: The quantity, such as "loss at step 1".
        value: What the course predicts in ``unit``, or None where no formula says it.
        unit: Its unit, such as "nats/token".
        guess: The learner's own number in ``unit``, or None if they would rather not.
    """
    guess = _number(guess, unit)
    value = None if value is None else float(value)
    with _open() as content:
        entries = content.entries
        new = Entry(lesson, name, unit, predicted=value, predicted_at=time.time(), guess=guess)
        last = next((i for i in reversed(range(len(entries))) if _place(entries[i]) == _place(new)), None)
        # An attempt that no run has tested yet may be corrected; a tested one is history.
        if last is not None and entries[last].measured is None:
            entries[last] = new
        else:
            entries.append(new)
    said = [("your guess", guess), ("the course predicts", value)]
    words = [f"{who} {format_number(number)} {unit}" for who, number in said if number is not None]
    print(f"{name}: {', '.join(words) or 'nothing is predicted'}")


def measured(name: str, value: float, *, lesson: str | None = None) -> None:
    """Compare a measured value with the latest guess and prediction of that name.

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
    said = [("your guess", entry.guess), ("the course's", entry.predicted)]
    words = [f"{who} {format_number(n)}: {_error(n, value)}" for who, n in said if n is not None]
    print("; ".join([f"measured: {name} = {format_number(value)} {entry.unit}", *words]))


def _number(guess: object, unit: str) -> float | None:
    """A guess as a number; one that is none is not entered, and a line says why."""
    if guess is None:
        return None
    try:
        number = float(guess)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number
    print(f"the guess {guess!r} is no number, so it is not entered: write a number in {unit}, and no unit behind it")
    return None


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
    """Show your guesses and the course's predictions beside what was measured.

    Args:
        lesson: Only what belongs to this lesson.
        history: All attempts; otherwise one of each quantity, your first guess that was measured, or the latest.

    Returns:
        One row a quantity: lesson, quantity, your guess, course, measured, unit, your error, the course's error.
    """
    from pandas import DataFrame

    def shown(number: float | None, nothing: str) -> str:
        return nothing if number is None else format_number(number)

    def error(number: float | None, value: float | None) -> str:
        return "" if None in (number, value) else _error(number, value)

    columns = ["lesson", "quantity", "your guess", "course", "measured", "unit", "your error", "course's error"]
    rows = [
        (
            *(entry.lesson, entry.name, shown(entry.guess, ""), shown(entry.predicted, "")),
            *(shown(entry.measured, "not yet"), entry.unit),
            *(error(entry.guess, entry.measured), error(entry.predicted, entry.measured)),
        )
        for entry in _entries(lesson, history=history)
    ]
    return DataFrame(rows, columns=columns)


def exercises(*, lesson: str | None = None, file: Path | None = None) -> DataFrame:
    """Show which exercises you tried, and which were right.

    Args:
        lesson: Only those of this lesson.
        file: The ledger of somebody else, by default your own.

    Returns:
        One row an exercise: lesson, exercise (the cell's id), attempts, state ("right" or "not yet").
    """
    from pandas import DataFrame

    rows = [
        (entry.lesson, entry.name, entry.attempts, "right" if entry.solved_at else "not yet")
        for entry in _read(file or path()).exercises
        if lesson in (None, entry.lesson)
    ]
    return DataFrame(rows, columns=["lesson", "exercise", "attempts", "state"])


def scores(*, lesson: str | None = None, file: Path | None = None) -> DataFrame:
    """Compare guesses of every unit on one scale: guessed divided by measured.

    The first guess of a quantity that was measured counts: who guesses again knows the answer.

    Args:
        lesson: Only those of this lesson.
        file: The ledger of somebody else, by default your own.

    Returns:
        One row a guess that has a measured value, both positive: lesson, quantity, ratio, and the same of the course.
    """
    from pandas import DataFrame

    def positive(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and value > 0

    rows = [
        (e.lesson, e.name, e.guess / e.measured, e.predicted / e.measured if positive(e.predicted) else math.nan)
        for e in _entries(lesson, file=file)
        if positive(e.guess) and positive(e.measured)
    ]
    return DataFrame(rows, columns=["lesson", "quantity", "ratio", "course"])


def by_lesson() -> DataFrame:
    """How far off your guesses were, lesson after lesson.

    Returns:
        One row a lesson with guesses: lesson, guesses, factor: the median of by how many times they were off, 1 is exact.
    """
    found = scores()
    found["factor"] = found.ratio.where(found.ratio >= 1, 1 / found.ratio)
    return found.groupby("lesson").factor.agg(guesses="size", factor="median").reset_index()


def course_of_errors(lessons: DataFrame) -> str:
    """Say whether the error of guesses falls over the lessons: their second half against their first.

    Args:
        lessons: What `by_lesson` returns.

    Example:
        >>> from pandas import DataFrame
        >>> course_of_errors(DataFrame({"lesson": ["00", "03", "04", "05"], "factor": [8.0, 4.0, 2.0, 1.0]}))
        'The error of your guesses falls: a factor of 6 in lessons 00 to 03, and of 1.5 in lessons 04 to 05.'
    """
    if len(lessons) < MEANINGFUL:
        return f"Whether your error falls shows after guesses in {MEANINGFUL} lessons; so far there are {len(lessons)}."
    middle = len(lessons) // 2
    early, late = lessons[:middle], lessons[middle:]
    before, after = early.factor.median(), late.factor.median()
    how = "falls" if after < before else "does not fall"
    words = [f"in lessons {part.lesson.iloc[0]} to {part.lesson.iloc[-1]}" for part in (early, late)]
    return f"The error of your guesses {how}: a factor of {before:.2g} {words[0]}, and of {after:.2g} {words[1]}."


def reset(*, lesson: str | None = None) -> None:
    """Forget all guesses, predictions and exercises, or those of one lesson."""
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


def _entries(lesson: str | None, *, history: bool = False, file: Path | None = None) -> list[Entry]:
    entries = [entry for entry in _read(file or path()).entries if lesson in (None, entry.lesson)]
    if history:
        return entries
    chosen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        earlier = chosen.get(_place(entry))
        if earlier is None or None in (earlier.guess, earlier.measured):
            chosen[_place(entry)] = entry
    return list(chosen.values())


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
        ('10% too high', '224% too high', '20 times the measured', 'off by 0.0106')
    """
    if predicted == value:
        return "exact"
    if value == 0 or not math.isfinite(value) or predicted * value < 0:
        return f"off by {format_number(predicted - value)}"
    share = 100 * (predicted - value) / abs(value)
    if abs(share) >= 1000:
        return f"{predicted / value:,.3g} times the measured"
    return f"{abs(share):.{2 if abs(share) < 100 else 3}g}% too {'high' if share > 0 else 'low'}"


def _read(file: Path) -> _Content:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        # The first format had no exercises, the second no guesses.
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
        text = json.dumps({"format": 3, **asdict(content)}, indent=1)
        try:
            files.write_text(file, text)
        except OSError as error:
            raise LedgerError(
                f"the ledger {file} cannot be written ({error}). Set COURSE_LEDGER to another file."
            ) from error


AT_MOST = 100.0
"""Ratios beyond this factor are drawn at it; the table has the number."""
MEANINGFUL = 4
"""Lessons with guesses before anything is said about their course."""


def show(*, lesson: str | None = None) -> None:
    """Display the ledger in a notebook: guesses, predictions, errors, exercises.

    Args:
        lesson: Only what belongs to this lesson.
    """
    from IPython.display import display

    entered, scored, solved = (f(lesson=lesson) for f in (table, scores, exercises))
    if not len(entered) and not len(solved):
        print(f"The ledger {path()} is empty. Run the cells of a lesson that guess, predict and measure.")
        return
    if len(entered):
        display(tables.full(entered, index=False))
    if len(scored):
        near = int(((scored.ratio >= 0.5) & (scored.ratio <= 2)).sum())
        with plots.figure(height=1.1 + 0.28 * len(scored)) as ax:
            draw(scored, ax=ax, title=f"{near} of {len(scored)} guesses are within a factor of two")
    if lesson is None and len(scored):
        print(course_of_errors(by_lesson()))
        display(tables.full(by_lesson().round(2), index=False))
    if len(solved):
        display(tables.full(solved, index=False))


def draw(scores: DataFrame, *, ax: Axes, title: str = "") -> Axes:
    """Draw guessed divided by measured, one row a guess, on a logarithmic axis, and the course's prediction beside it.

    Args:
        scores: What `scores` returns.
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis; its label puts the picture into words.
    """
    from matplotlib.ticker import LogLocator

    names = [f"{lesson}  {quantity}" for lesson, quantity in zip(scores.lesson, scores.quantity, strict=True)]
    places = range(len(names))
    shown, courses = (scores[column].clip(1 / AT_MOST, AT_MOST) for column in ("ratio", "course"))
    ax.axvspan(0.5, 2, color=plots.COLOURS["green"], alpha=0.15)
    ax.axvline(1, color=plots.INK, linewidth=1)
    ax.plot(
        courses, places, marker="|", markersize=12, linestyle="none", color=plots.COLOURS["vermilion"], label="course"
    )
    ax.plot(shown, places, marker="o", linestyle="none", color=plots.COLOURS["blue"], label="your guess")
    ax.set_xscale("log")
    ax.set_xlim(min(0.2, shown.min() / 1.5), max(5, shown.max() * 1.5))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("expected / measured (band: within a factor of two)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    if title:
        ax.set_title(title)
    worst = scores.ratio.map(lambda ratio: max(ratio, 1 / ratio)).idxmax()
    ax.set_label(f"The guess farthest off is {names[worst]}: {scores.ratio[worst]:.3g} times what was measured")
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

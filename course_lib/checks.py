"""Checks that a learner meets: claims, exercises, expected errors, and the ledger of predictions.

A claim that holds prints one line; a claim that fails raises with a message that teaches.
An attempt at an exercise never fails a notebook: ``answer = None`` and a wrong answer both get a friendly line.
The ledger is one JSON file on this machine; it is never sent anywhere.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "ClaimFailed",
    "LedgerError",
    "claim",
    "close",
    "exercise",
    "expect_error",
    "ledger",
    "measured",
    "predict",
    "reset_ledger",
    "solved",
]


class ClaimFailed(AssertionError):
    """A claim of a lesson, or the answer to an exercise, does not hold."""


class LedgerError(RuntimeError):
    """The ledger of predictions cannot be read or written."""


def claim(condition: object, message: str, *, otherwise: str = "") -> None:
    """Prove a sentence of the lesson, or stop with an explanation.

    Args:
        condition: What has to be true.
        message: The claim as a sentence, with numbers and units.
        otherwise: What it means if the claim does not hold, and where to look.

    Raises:
        ClaimFailed: The condition is false; the message repeats the claim and says ``otherwise``.

    Example:
        >>> claim(2 + 2 == 4, "two and two are four")
        holds: two and two are four
    """
    if not bool(condition):
        raise ClaimFailed(f"does not hold: {message}" + (f"\n{otherwise}" if otherwise else ""))
    print(f"holds: {message}")


def close(
    measured: float,
    expected: float,
    *,
    what: str,
    unit: str,
    rtol: float = 0.0,
    atol: float = 0.0,
    otherwise: str = "",
) -> None:
    """Prove that a measured value is as expected, within a tolerance that you state.

    Args:
        measured: The value that a run or a cell gave, in ``unit``.
        expected: The value that it should have, in ``unit``.
        what: What was measured ("loss at step 1").
        unit: Its unit ("nats/token").
        rtol: Tolerance as a share of ``expected``.
        atol: Tolerance in ``unit``; the larger of the two counts.
        otherwise: What it means if the values differ, and where to look.

    Raises:
        ValueError: No tolerance was given.
        ClaimFailed: The values differ by more than the tolerance, or the measured value is not a number.

    Example:
        >>> close(6.95, 6.93, atol=0.05, what="loss at step 1", unit="nats/token")
        holds: loss at step 1 is 6.95 nats/token, expected 6.93 within 0.05 nats/token
    """
    if rtol <= 0 and atol <= 0:
        raise ValueError(
            "close() was given no tolerance: pass atol=... in the unit, or rtol=... as a share of expected."
        )
    measured, expected = float(measured), float(expected)
    tolerance = max(atol, rtol * abs(expected))
    shown = f"{what} is {_number(measured)} {unit}, expected {_number(expected)} within {_number(tolerance)} {unit}"
    difference = abs(measured - expected)
    if not difference <= tolerance:  # written this way round, so that NaN fails
        raise ClaimFailed(
            f"does not hold: {shown} (they differ by {_number(difference)} {unit})"
            + (f"\n{otherwise}" if otherwise else "")
        )
    print(f"holds: {shown}")


def exercise(answer: object, check: Callable[[Any], object]) -> bool:
    """Look at a learner's attempt without ever failing the notebook.

    Args:
        answer: What the learner wrote; ``None`` means that nothing was tried yet.
        check: A function of the answer. It returns False, or raises ``ClaimFailed``, when the answer is wrong.

    Returns:
        Whether the answer is right.

    Example:
        >>> exercise(None, lambda answer: claim(answer == 4, "TP=2 leaves DP=4"))
        not attempted yet: replace None with your answer and run the cell again
        False
        >>> exercise(2, lambda answer: claim(answer == 4, "TP=2 leaves DP=4", otherwise="8 ranks / 2 = 4."))
        not yet: does not hold: TP=2 leaves DP=4
        8 ranks / 2 = 4.
        False
    """
    if answer is None:
        print("not attempted yet: replace None with your answer and run the cell again")
        return False
    try:
        solved(answer, check)
    except ClaimFailed as error:
        print(f"not yet: {error}")
        return False
    print("right")
    return True


def solved(answer: object, check: Callable[[Any], object]) -> None:
    """Prove that an answer is right; for the solution cell, which must fail if it is not.

    Raises:
        ClaimFailed: The answer is missing or wrong, or the check cannot work with an answer of this kind.
    """
    if answer is None:
        raise ClaimFailed("there is no answer to check: the solution is None")
    try:
        verdict = check(answer)
    except ClaimFailed:
        raise
    except AssertionError as error:
        raise ClaimFailed(str(error) or f"the answer {answer!r} does not pass") from error
    except Exception as error:  # an attempt may be of any kind: a string where a number was meant, say
        kinds = f"a {type(answer).__name__} ({type(error).__name__}: {error})"
        raise ClaimFailed(f"the check cannot work with the answer {answer!r}, {kinds}") from error
    # numpy's own False is no singleton, and a check that only asserts returns None.
    if verdict is not None and not bool(verdict):
        raise ClaimFailed(f"the answer {answer!r} is not right")


@contextmanager
def expect_error(kind: type[Exception], *, contains: str = "") -> Iterator[None]:
    """Show an error on purpose: run the block, print the error's message, and go on.

    Args:
        kind: The class of the expected error.
        contains: Words that its message must contain.

    Raises:
        ClaimFailed: The block raised nothing, or an error with another message.

    Example:
        >>> with expect_error(ZeroDivisionError):
        ...     1 / 0
        expected ZeroDivisionError: division by zero
    """
    try:
        yield
    except kind as error:
        if contains not in str(error):
            message = f"{kind.__name__} was raised, but its message has no {contains!r}: {error}"
            raise ClaimFailed(message) from error
        print(f"expected {type(error).__name__}: {error}")
    else:
        raise ClaimFailed(f"{kind.__name__} was expected, but the block raised no error")


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
    with _open_ledger() as entries:
        new = Entry(lesson=lesson, name=name, unit=unit, predicted=value, predicted_at=time.time())
        last = next(
            (i for i in reversed(range(len(entries))) if (entries[i].lesson, entries[i].name) == (lesson, name)), None
        )
        # An attempt that no run has tested yet may be corrected; a tested one is history.
        if last is not None and entries[last].measured is None:
            entries[last] = new
        else:
            entries.append(new)
    print(f"no prediction of {name}" if value is None else f"predicted: {name} = {_number(value)} {unit}")


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
    with _open_ledger() as entries:
        fits = [i for i, entry in enumerate(entries) if entry.name == name and lesson in (None, entry.lesson)]
        if not fits:
            known = ", ".join(sorted({repr(entry.name) for entry in entries})) or "none"
            raise ValueError(
                f"nothing was predicted under the name {name!r}; the ledger knows: {known}. "
                "Run the cell with checks.predict(...) first, and use the same name."
            )
        entry = max((entries[i] for i in fits), key=lambda entry: entry.predicted_at)
        entries[entries.index(entry)] = Entry(**{**asdict(entry), "measured": value, "measured_at": time.time()})
    shown = f"measured: {name} = {_number(value)} {entry.unit}"
    if entry.predicted is None:
        print(f"{shown} (you made no prediction)")
    else:
        print(f"{shown}, predicted {_number(entry.predicted)} {entry.unit}: {_error(entry.predicted, value)}")


def ledger(*, lesson: str | None = None, history: bool = False) -> DataFrame:
    """Show your predictions beside what was measured.

    Args:
        lesson: Only the predictions of this lesson.
        history: All attempts; otherwise the latest of each quantity.

    Returns:
        One row a prediction: lesson, quantity, predicted, measured, unit, error.
    """
    from pandas import DataFrame

    entries = [entry for entry in _read(_path()) if lesson in (None, entry.lesson)]
    if not history:
        entries = list({(entry.lesson, entry.name): entry for entry in entries}.values())
    columns = ["lesson", "quantity", "predicted", "measured", "unit", "error"]
    rows = [
        (
            entry.lesson,
            entry.name,
            "none" if entry.predicted is None else _number(entry.predicted),
            "not yet" if entry.measured is None else _number(entry.measured),
            entry.unit,
            "" if None in (entry.predicted, entry.measured) else _error(entry.predicted, entry.measured),
        )
        for entry in entries
    ]
    return DataFrame(rows, columns=columns)


def reset_ledger(*, lesson: str | None = None) -> None:
    """Forget all predictions, or those of one lesson."""
    with _open_ledger() as entries:
        kept = [entry for entry in entries if lesson is not None and entry.lesson != lesson]
        gone = len(entries) - len(kept)
        entries[:] = kept
    print(f"forgot {gone} prediction{'' if gone == 1 else 's'}")


def _number(value: float) -> str:
    """Write a number as a person reads it: whole numbers with separators, others with four digits.

    Example:
        >>> _number(1234567), _number(6.931471), _number(0.00012), _number(float("nan"))
        ('1,234,567', '6.931', '0.00012', 'nan')
    """
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _error(predicted: float, value: float) -> str:
    """Say how wrong a prediction was.

    Example:
        >>> _error(6.6, 6.0), _error(3.24, 1.0), _error(20.0, 1.0), _error(0.01, -0.0006)
        ('10% too high', '224% too high', '20 times', 'off by 0.0106')
    """
    if predicted == value:
        return "exact"
    if value == 0 or not math.isfinite(value) or predicted * value < 0:
        return f"off by {_number(predicted - value)}"
    share = 100 * (predicted - value) / abs(value)
    if abs(share) >= 1000:
        return f"{predicted / value:,.3g} times"
    return f"{abs(share):.{2 if abs(share) < 100 else 3}g}% too {'high' if share > 0 else 'low'}"


def _path() -> Path:
    """Return the ledger's file: ``COURSE_LEDGER``, or one in the user's state directory (XDG)."""
    given = os.environ.get("COURSE_LEDGER")
    if given:
        return Path(given).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "nemotron-course" / "ledger.json"


def _read(path: Path) -> list[Entry]:
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"the ledger {path} cannot be read ({error}). Move the file away to begin a new one, "
            "or set COURSE_LEDGER to another file."
        ) from error


@contextmanager
def _open_ledger() -> Iterator[list[Entry]]:
    """Read, let the caller change, and write: under a lock, and with a rename, so that two notebooks lose nothing."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("a")
    except OSError as error:
        raise LedgerError(
            f"the ledger {path} cannot be written ({error}). Set COURSE_LEDGER to a file in a directory of yours."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = _read(path)
        yield entries
        text = json.dumps({"format": 1, "entries": [asdict(entry) for entry in entries]}, indent=1)
        try:
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
        except OSError as error:
            raise LedgerError(
                f"the ledger {path} cannot be written ({error}). Set COURSE_LEDGER to another file."
            ) from error

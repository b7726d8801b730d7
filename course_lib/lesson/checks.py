"""Checks that a learner meets: claims, exercises, expected errors, and the ledger's three functions.

A claim that holds prints one line; a claim that fails raises with a message that teaches.
An attempt at an exercise never fails a notebook: ``answer = None`` and a wrong answer both get a friendly line.
The exercises stand in ``course_lib.lesson.exercises``, so that no cell shows its answer.
Guesses, predictions and attempts go to the learner's ledger, see ``course_lib.lesson.ledger``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course_lib.common import screen
from course_lib.common.project import PROJECT
from course_lib.common.units import format_number
from course_lib.lesson import verdicts
from course_lib.lesson.ledger import LedgerError, attempted, measured, predict, reset, table

__all__ = [
    "ClaimFailed",
    "LedgerError",
    "attempt",
    "claim",
    "close",
    "expect_error",
    "ledger",
    "measured",
    "predict",
    "publish",
    "reset_ledger",
    "solution",
]

ledger, reset_ledger = table, reset  # the names that read well behind `checks.`


class ClaimFailed(AssertionError):
    """A claim of a lesson, or the answer to an exercise, does not hold."""


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
    value: float,
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
        value: The value that a run or a cell gave, in ``unit``.
        expected: The value that it should have, in ``unit``.
        what: What was measured ("loss at step 1").
        unit: Its unit ("nats/token").
        rtol: Tolerance as a share of ``expected``.
        atol: Tolerance in ``unit``; the larger of the two counts.
        otherwise: What it means if the values differ, and where to look.

    Raises:
        ValueError: No tolerance was given.
        ClaimFailed: The values differ by more than the tolerance, or the value is not a number.

    Example:
        >>> close(6.95, 6.93, atol=0.05, what="loss at step 1", unit="nats/token")
        holds: loss at step 1 is 6.95 nats/token, expected 6.93 within 0.05 nats/token
    """
    if rtol <= 0 and atol <= 0:
        raise ValueError(
            "close() was given no tolerance: pass atol=... in the unit, or rtol=... as a share of expected."
        )
    value, expected = float(value), float(expected)
    tolerance = max(atol, rtol * abs(expected))
    shown = f"{what} is {format_number(value)} {unit}, "
    shown += f"expected {format_number(expected)} within {format_number(tolerance)} {unit}"
    difference = abs(value - expected)
    if not difference <= tolerance:  # written this way round, so that NaN fails
        raise ClaimFailed(
            f"does not hold: {shown} (they differ by {format_number(difference)} {unit})"
            + (f"\n{otherwise}" if otherwise else "")
        )
    print(f"holds: {shown}")


def attempt(answer: object, judge: verdicts.Judge, *facts: Any) -> None:
    """Show what an exercise says of a learner's attempt, without ever failing the notebook, and enter it in the ledger.

    Args:
        answer: What the learner wrote; ``None`` means that nothing was tried yet.
        judge: The exercise, a function of ``course_lib.lesson.exercises``.
        facts: What it needs of the lesson besides: a configuration, a run.

    Example:
        >>> attempt(None, lambda answer: verdicts.value(answer, 4, why="8 / 2.", otherwise="Divide the ranks by TP."))
        not attempted: replace None with your answer and run the cell again
        >>> attempt(2, lambda answer: verdicts.value(answer, 4, why="8 / 2.", otherwise="Divide the ranks by TP."))
        not yet: Divide the ranks by TP.
    """
    if answer is None:
        print("not attempted: replace None with your answer and run the cell again")
        return
    verdict = verdicts.of(answer, judge, *facts)
    print(f"{'right' if verdict.right else 'not yet'}: {verdict.hint}")
    try:
        attempted(verdict.right)
    except LedgerError as error:  # the answer was judged; that it is not remembered is worth a line, and no more
        print(error)


def solution(answer: object, judge: verdicts.Judge, *facts: Any) -> None:
    """Judge the lesson's own solution, which must be right; the reason is kept for those who answer themselves.

    Raises:
        ClaimFailed: The solution is missing or not right.
    """
    verdict = verdicts.of(answer, judge, *facts) if answer is not None else verdicts.wrong("the solution is None")
    if not verdict.right:
        raise ClaimFailed(f"does not hold: the solution is right\n{verdict.hint}")
    print("right: a solution stands in this folded cell; your own right answer is told why it is one")


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


def publish(name: str, value: object) -> None:
    """Hand a value out of a notebook: it is shown as text, and ``notebooks.execute`` reads it back.

    The name "run" is for run directories: ``publish("run", run.path)`` puts the path into ``notebooks.Executed.runs``.

    Args:
        name: What the value is called.
        value: Anything that JSON holds, a path, or a number of numpy or torch.

    Raises:
        TypeError: JSON cannot hold the value.

    Example:
        >>> publish("loss", 6.93)
        loss = 6.93
    """
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    if hasattr(plain, "item"):
        plain = plain.item()
    try:
        json.dumps(plain)
    except TypeError as error:
        raise TypeError(
            f"the value {name!r} is of type {type(value).__name__}: publish numbers, text, lists or paths."
        ) from error
    if screen.where() != "notebook":
        print(f"{name} = {_shown(plain)}")
        return
    from IPython.display import display

    display({"text/plain": f"{name} = {_shown(plain)}"}, raw=True, metadata={"course": {name: plain}})


def _shown(value: object) -> object:
    """A path as it is written in the text: from the project's folder on, whoever's machine it is."""
    inside = isinstance(value, str) and value.startswith(f"{PROJECT}{os.sep}")
    return value.removeprefix(f"{PROJECT}{os.sep}") if inside else value

"""What an exercise says of an answer: right or not, and a hint; and the ways in which an answer is given."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from course_lib import runs
from course_lib.text import microscope


@dataclass(frozen=True)
class Verdict:
    """What was found about an answer.

    Attributes:
        right: Whether the answer is right.
        hint: Why it is right, or what to look at; a sentence that does not give the answer away.
    """

    right: bool
    hint: str


Judge = Callable[..., Verdict]
"""An exercise: a function of the answer, and of what the lesson made by then."""


class Unfit(ValueError):
    """The answer is not of the kind that was asked for; the message says which kind that is."""


def right(why: str) -> Verdict:
    """The answer is right, and this is what it shows."""
    return Verdict(right=True, hint=why)


def wrong(hint: str) -> Verdict:
    """The answer is not right yet, and this is what to look at."""
    return Verdict(right=False, hint=hint)


def value(
    answer: object,
    expected: object,
    *,
    why: str,
    otherwise: str,
    hints: Iterable[tuple[object, str]] = (),
    rtol: float = 0.0,
    atol: float = 0.0,
) -> Verdict:
    """Judge a number, a word or a list of them.

    Args:
        answer: What the learner wrote.
        expected: The right value, computed from what the lesson made, so that it follows the lesson's parameters.
        why: Said of the right answer.
        otherwise: Said of a wrong answer that has no hint of its own.
        hints: Wrong values that people really give, each with what went wrong on the way to it.
        rtol: Tolerance as a share of `expected`, for numbers.
        atol: Tolerance in the number's unit; the larger of the two counts.

    Example:
        >>> value(8, 4, why="8 / 2.", otherwise="Divide.", hints=[(8, "TP takes its share of the ranks first.")]).hint
        'TP takes its share of the ranks first.'
    """

    def is_(wanted: object) -> bool:
        if isinstance(wanted, Real) and not isinstance(wanted, bool):
            return math.isclose(answer, wanted, rel_tol=rtol, abs_tol=atol)
        return bool(answer == wanted)

    if is_(expected):
        return right(why)
    return wrong(next((hint for wanted, hint in hints if is_(wanted)), otherwise))


def own_run(answer: object) -> runs.Run:
    """The run that a learner gives as an answer: a `Run`, its folder, or its name; it has to have succeeded.

    Raises:
        Unfit: There is no such run, or it has not succeeded.
    """
    if not isinstance(answer, runs.Run | str | os.PathLike):
        raise Unfit(
            f"a run is asked for: what `launch.run` returns, or the run's name; yours is of type {type(answer).__name__}"
        )
    try:
        run = answer if isinstance(answer, runs.Run) else runs.read(answer)
    except runs.NoSuchRun as error:
        raise Unfit(str(error)) from error
    if run.outcome is None:
        raise Unfit(f"the run {run.name} has not ended yet")
    if run.outcome.status != "succeeded":
        raise Unfit(f"the run {run.name} {run.outcome.status}: {run.outcome.cause} {run.outcome.hint}".strip())
    return run


def own_files(answer: object) -> microscope.Index:
    """The index of the `.bin` and `.idx` that a learner wrote and gives as an answer by their prefix.

    Raises:
        Unfit: It is no prefix, or Megatron could not read these files.
    """
    if not isinstance(answer, str | os.PathLike):
        raise Unfit("the prefix of the files that you wrote is asked for, a path without suffix")
    try:
        return microscope.read(Path(answer))
    except microscope.ForeignFile as error:
        raise Unfit(f"these files cannot be read: {error}") from error


def of(answer: Any, judge: Judge, *facts: Any) -> Verdict:
    """Let an exercise judge an answer of any kind; nothing is raised.

    Args:
        answer: What the learner wrote, not None.
        judge: The exercise.
        facts: What it needs of the lesson besides.
    """
    try:
        return judge(answer, *facts)
    except Unfit as error:
        return wrong(str(error))
    except Exception as error:  # a string where a number was meant, say
        kind = f"of type {type(answer).__name__} ({type(error).__name__}: {error})"
        return wrong(f"the exercise cannot work with the answer {reprlib.repr(answer)}, {kind}")

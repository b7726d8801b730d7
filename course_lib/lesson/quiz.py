"""Three questions at the end of a lesson: buttons in JupyterLab, folded text where no kernel answers.

A quiz is a file, ``quizzes/NN.toml`` beside this module, so that its questions are data that a test reads.
"""

from __future__ import annotations

import html
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Option", "Question", "QuizError", "as_buttons", "as_text", "display", "path", "read", "show"]

QUIZZES = Path(__file__).parent / "quizzes"
LETTERS = "ABCDEF"


class QuizError(ValueError):
    """A lesson has no quiz, or its file is not one."""


@dataclass(frozen=True)
class Option:
    """One of a question's answers, and why it is right or not."""

    text: str
    reason: str
    right: bool = False


Answered = Callable[[Option], None]


@dataclass(frozen=True)
class Question:
    """A question and its options; words between backquotes are code."""

    text: str
    options: tuple[Option, ...]


def path(lesson: str) -> Path:
    """The file of a lesson's quiz."""
    return QUIZZES / f"{lesson}.toml"


def read(lesson: str) -> tuple[Question, ...]:
    """The questions of a lesson.

    Raises:
        QuizError: There is no such file, it is not TOML, or a question has not exactly one right option.
    """
    file = path(lesson)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        found = tuple(
            Question(each["text"], tuple(Option(**option) for option in each["option"])) for each in content["question"]
        )
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise QuizError(f"{file} is no quiz ({type(error).__name__}: {error})") from error
    for question in found:
        if (count := sum(option.right for option in question.options)) != 1:
            raise QuizError(f"{file}: {question.text!r} has {count} right options, needed exactly one")
    return found


def show(lesson: str) -> None:
    """Show the quiz of a lesson.

    Args:
        lesson: The lesson's number, such as "03".
    """
    display(read(lesson))


def display(questions: tuple[Question, ...], *, answered: Answered | None = None) -> None:
    """Show questions, with buttons where a notebook server answers them, with folded text everywhere else.

    Args:
        answered: What is told of each option that somebody clicks.
    """
    import IPython.display

    words = {"text/html": as_text(questions), "text/plain": f"questions: {len(questions)}"}
    if "JPY_SESSION_NAME" in os.environ:  # a Jupyter server set it; an execution without a browser has nobody to click
        words |= as_buttons(questions, answered=answered)._repr_mimebundle_()
    IPython.display.display(words, raw=True)


def as_text(questions: tuple[Question, ...]) -> str:
    """The questions as HTML: each option unfolds its reason, without a kernel and without a script."""
    parts = []
    for number, question in enumerate(questions, 1):
        parts.append(f"<p>{_number(number, questions)}{_code(question.text)}</p>")
        for letter, option in zip(LETTERS, question.options, strict=False):
            said = f"<summary><b>{letter}</b> {_code(option.text)}</summary><p>{_answer(option)}</p>"
            parts.append(f"<details>{said}</details>")
    return f'<div class="quiz">{"".join(parts)}</div>'


def as_buttons(questions: tuple[Question, ...], *, answered: Answered | None = None) -> Any:
    """The questions as widgets: a click on a letter shows the reason below the question."""
    import ipywidgets

    parts = []
    for number, question in enumerate(questions, 1):
        said = ipywidgets.HTML()
        parts.append(ipywidgets.HTML(f"{_number(number, questions)}{_code(question.text)}"))
        for letter, option in zip(LETTERS, question.options, strict=False):
            button = ipywidgets.Button(description=letter, layout=ipywidgets.Layout(width="3em", flex="0 0 auto"))
            button.on_click(_clicked(letter, option, said, answered))
            parts.append(ipywidgets.HBox([button, ipywidgets.HTML(_code(option.text))]))
        parts.append(said)
    return ipywidgets.VBox(parts)


def _number(number: int, questions: tuple[Question, ...]) -> str:
    """One question alone needs no number."""
    return f"<b>{number}.</b> " if len(questions) > 1 else ""


def _clicked(letter: str, option: Option, said: Any, answered: Answered | None) -> Any:
    def show_reason(button: Any) -> None:
        said.value = f"<b>{letter}</b> {_answer(option)}"
        button.button_style = "success" if option.right else "warning"
        if answered is not None:
            answered(option)

    return show_reason


def _answer(option: Option) -> str:
    return f"<b>{'Right.' if option.right else 'Not this one.'}</b> {_code(option.reason)}"


def _code(text: str) -> str:
    """The text as HTML, with code where backquotes stand."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(" ".join(text.split()), quote=False))

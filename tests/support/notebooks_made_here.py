"""Small notebooks for tests: one that keeps every rule, and the means to break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.hygiene import FOLDS


def markdown(name: str, source: str, *tags: str) -> dict[str, Any]:
    """A markdown cell with a readable id."""
    return {"cell_type": "markdown", "id": name, "metadata": {"tags": list(tags)} if tags else {}, "source": source}


def code(name: str, source: str, *tags: str) -> dict[str, Any]:
    """A code cell without outputs."""
    metadata = {"tags": list(tags)} if tags else {}
    for tag in tags:
        if tag in FOLDS:
            metadata["jupyter"] = FOLDS[tag]
    return {
        "cell_type": "code",
        "id": name,
        "metadata": metadata,
        "source": source,
        "outputs": [],
        "execution_count": None,
    }


def notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    """A notebook with the metadata that the sources have."""
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        },
        "cells": list(cells),
    }


IMPORTS = """from types import SimpleNamespace

from course_lib.lesson import checks, quiz
from course_lib.lesson.exercises import setup

report = SimpleNamespace(lessons=[SimpleNamespace(number="07", runs=True)], findings=())"""
PREDICT = 'checks.predict("07", "sum", 4, "(a number)", guess=guess)'
CHECK = 'checks.measured("sum", total, lesson="07")\nchecks.claim(total == 4, "two and two are four")'
ATTEMPT = "answer = None  # yours\n\nchecks.attempt(answer, setup.lessons_that_run, report)"
SOLUTION = "checks.solution(1, setup.lessons_that_run, report)"


def clean() -> dict[str, Any]:
    """A small lesson that keeps every rule."""
    return notebook(
        markdown("title", "# A small lesson\n\nDoes addition work?\nNothing has changed since the last lesson.\n"),
        markdown("objectives", "**You will be able to**\n\n- add two numbers\n- say what you expected\n", "objectives"),
        markdown(
            "before-you-start", "It takes 5 minutes.\nSee the [glossary](../book/glossary.md#rank).\n", "prerequisites"
        ),
        code("imports", IMPORTS, "imports"),
        code("parameters", "first = 2  # a number\nsecond = 2  # another number", "parameters"),
        code("guess", "guess = None  # yours, a number", "guess"),
        code("predict", PREDICT, "predict", "hide-input"),
        code("sum", 'total = first + second\nchecks.publish("total", total)'),
        code("check-the-sum", CHECK, "check"),
        code("attempt-read", ATTEMPT, "exercise", "attempt"),
        code("solution-read", SOLUTION, "solution", "hide-cell"),
        code("attempt-do", ATTEMPT, "exercise", "attempt"),
        code("solution-do", SOLUTION, "solution", "hide-cell"),
        code("quiz", 'quiz.show("00")', "quiz", "hide-input"),
        markdown("takeaways", "**What you now know**\n\n- You added two numbers.\n- You expected 4.\n", "takeaways"),
    )


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a notebook as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path

"""Answers to the exercises of lesson 00."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from course_lib.lesson.exercises import setup
from support.tried import Tried


def lessons_that_run(folder: Path) -> Tried:
    """Counting numbers, counting from zero, counting findings, and the lessons instead of their count."""
    names = [*(f"{number:02}" for number in range(14)), "a"]
    lessons = [SimpleNamespace(number=name, runs=name not in ("12", "13")) for name in names]
    report = SimpleNamespace(lessons=lessons, findings=range(24))
    wrong = [(12, "Lesson A"), (11, "numbered from 00"), (24, "number of findings"), (2, "cannot run")]
    return Tried(13, [*wrong, (lessons[:13], "how many of them")], [report])


def python_path(folder: Path) -> Tried:
    """Nothing changed, everything thrown away, and the order turned round."""
    path = setup.mixed_path(folder)
    stranger, tools = path.split(os.pathsep)
    turned = os.pathsep.join((tools, stranger))
    return Tried(
        tools, [("", "so is `lab_tools`"), (path, "stands on this path still"), (turned, "The order does not help")]
    )

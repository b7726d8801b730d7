"""Lesson 00: read the doctor's report, and mend a search path with a stranger on it."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong

if TYPE_CHECKING:
    from course_lib.machine import doctor

__all__ = ["lessons_that_run", "mixed_path", "python_path"]

TOOL = "lab_tools"


def lessons_that_run(answer: int, report: doctor.Report) -> Verdict:
    """How many lessons run live on this machine?"""
    if isinstance(answer, list | tuple):
        raise Unfit("Those are the lessons; the answer is how many of them there are.")
    live, known = (sum(bool(row.runs) is kind for row in report.lessons) for kind in (True, False))
    numbered = sum(bool(row.runs) for row in report.lessons if row.number.isdigit())
    return value(
        answer,
        live,
        why="you counted the lessons whose `runs` is true; the report names a reason where it is not.",
        otherwise="Count the entries of `report.lessons` whose field `runs` is true.",
        hints=[
            (numbered, "Lesson A has a letter for a number, and runs as well."),
            (numbered - 1, "Lessons are numbered from 00, so the last number is one less than how many have one."),
            (len(report.findings), "That is the number of findings; the lessons stand in a list of their own."),
            (known, "That is how many lessons cannot run here."),
        ],
    )


def mixed_path(place: Path) -> str:
    """A PYTHONPATH on which a package stands that hides NVIDIA's, and a tool that somebody needs.

    Args:
        place: Where the two folders are made.

    Returns:
        The variable's value, both folders with a colon between them.
    """
    stranger, tools = place / "old-site-packages", place / "lab"
    (stranger / "megatron").mkdir(parents=True, exist_ok=True)
    (stranger / "megatron" / "__init__.py").write_text("'''Not NVIDIA.'''\n", encoding="utf-8")
    tools.mkdir(exist_ok=True)
    (tools / f"{TOOL}.py").write_text("'''What a colleague's scripts import.'''\n", encoding="utf-8")
    return os.pathsep.join(map(str, (stranger, tools)))


def python_path(answer: str) -> Verdict:
    """Which PYTHONPATH finds NVIDIA's package, and the colleague's tool still?"""
    if not isinstance(answer, str | os.PathLike):
        raise Unfit(
            f"PYTHONPATH is a string, folders with {os.pathsep!r} between them; yours is of type {type(answer).__name__}"
        )
    folders = [folder for folder in os.fspath(answer).split(os.pathsep) if folder]
    if not PathFinder.find_spec(TOOL, folders):
        return wrong(
            f"The stranger may be gone, and so is `{TOOL}`, which the colleague's scripts import from this path."
        )
    found = PathFinder.find_spec("megatron", [*folders, *sys.path])
    if found is not None and found.origin is not None:
        last = "megatron" not in {path.name for path in Path(folders[0]).iterdir()}
        order = "The order does not help: NVIDIA's `megatron` is a folder without an `__init__.py`, and a package that has one "
        here = "A package that hides NVIDIA's stands on this path still: look for a folder `megatron` with an `__init__.py`."
        return wrong(order + "wins wherever it stands on the path." if last else here)
    return right(
        "the stranger is off the path, and nothing else is; an empty path would have broken the colleague's scripts."
    )

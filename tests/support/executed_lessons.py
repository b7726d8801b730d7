"""Executed lessons, for tests that read what a reader sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks


@contextmanager
def alone(source: Path) -> Iterator[Path]:
    """Nobody else executes this lesson meanwhile, in this process or in another of the same test run.

    Yields:
        Where its executed copy stands, or will.
    """
    path = PROJECT / "book" / "lessons" / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{source.stem}.lock")):
        yield path


def executed(lesson: notebooks.Lesson) -> dict:
    """The executed copy of a lesson; it is executed now if that has not been done since its source changed."""
    with alone(lesson.path) as path:
        if not path.is_file() or path.stat().st_mtime < lesson.path.stat().st_mtime:
            notebooks.execute(lesson.number)
        return json.loads(path.read_text(encoding="utf-8"))

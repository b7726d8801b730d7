"""Executed lessons, for tests that read what a reader sees."""

from __future__ import annotations

import json

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks


def executed(lesson: notebooks.Lesson) -> dict:
    """The executed copy of a lesson; it is executed now if that has not been done since its source changed."""
    path = PROJECT / "book" / "lessons" / lesson.path.name
    if not path.is_file() or path.stat().st_mtime < lesson.path.stat().st_mtime:
        notebooks.execute(lesson.number)
    return json.loads(path.read_text(encoding="utf-8"))

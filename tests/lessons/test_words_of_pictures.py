"""Every picture of a lesson says in words what it shows, for readers who cannot see it."""

from __future__ import annotations

import pytest

from course_lib.lesson import notebooks
from support.executed_lessons import executed

PLACEHOLDERS = ("it will be replaced", "without a description")


def silent(notebook: dict) -> list[str]:
    """Cells with a picture whose alternative text is missing, a placeholder, or too short to say anything."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if "image/png" not in output.get("data", {}):
                continue
            words = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if len(words.split()) < 4 or any(placeholder in words for placeholder in PLACEHOLDERS):
                found.append(f"{cell['id']}: {words!r}")
    return found


@pytest.mark.parametrize("lesson", notebooks.listing(), ids=lambda lesson: lesson.path.stem)
def test_every_picture_has_words(lesson: notebooks.Lesson) -> None:
    """Figures and the last frames of live views have alternative text."""
    assert silent(executed(lesson)) == []


@pytest.mark.parametrize(
    "words", ["", "Live view of a run: it will be replaced", "A figure without a description.", "Loss"]
)
def test_a_silent_picture_is_found(words: str) -> None:
    """No words, a placeholder, or one word are not enough."""
    output = {"data": {"image/png": "AA"}, "metadata": {"image/png": {"alt": words} if words else {}}}
    assert len(silent({"cells": [{"id": "figure", "outputs": [output]}]})) == 1

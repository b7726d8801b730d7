"""The whole path at the head of each page: the parts with their lessons, and where the reader stands.

It is a list of links that the style sheet draws as a row of steps, so it needs no file of its own, follows the theme, and
is read aloud as what it is.
"""

from __future__ import annotations

import fnmatch
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from course_lib.lesson.notebooks import Lesson

__all__ = ["Part", "parts", "picture"]


@dataclass(frozen=True)
class Part:
    """A part of the course: its caption in the side bar, and its lessons in their order."""

    caption: str
    lessons: tuple[Lesson, ...]


def parts(contents: Mapping[str, Any], lessons: Sequence[Lesson]) -> list[Part]:
    """The parts that have lessons, as the table of contents groups them.

    Args:
        contents: What `_toc.yml` says.
        lessons: The lessons of this book.
    """
    found = []
    for part in contents["parts"]:
        patterns = [entry["glob"] for entry in part["chapters"] if "glob" in entry]
        own = [one for each in patterns for one in lessons if fnmatch.fnmatch(f"lessons/{one.path.stem}", each)]
        if own:
            found.append(Part(part["caption"], tuple(own)))
    return found


def picture(whole: Sequence[Part], here: str = "", *, folder: str = "") -> str:
    """The path as HTML without an empty line, for one page.

    Args:
        whole: What `parts` returns.
        here: The number of the page's lesson; a page beside the lessons has none.
        folder: Where the lessons lie as seen from the page, with its slash.
    """
    shown = []
    for part in whole:
        steps = "".join(_step(lesson, here, folder) for lesson in part.lessons)
        shown.append(f"<li><span>{html.escape(part.caption)}</span><ol>{steps}</ol></li>")
    return f'<nav class="course-path" aria-label="The whole path"><ol>{"".join(shown)}</ol></nav>'


def _step(lesson: Lesson, here: str, folder: str) -> str:
    number, current = lesson.number.upper(), ' aria-current="page"' if lesson.number == here else ""
    said = html.escape(f"{number} {lesson.title}")
    address = f"{folder}{lesson.path.stem}.html"
    return f'<li><a href="{address}" title="{said}" aria-label="Lesson {said}"{current}>{number}</a></li>'

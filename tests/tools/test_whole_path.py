"""The whole path at the head of a page: from the table of contents, with one place marked, and words for each step."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import yaml

from book.builder import facts, whole_path
from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks

CONTENTS = yaml.safe_load((PROJECT / "book" / "_toc.yml").read_text(encoding="utf-8"))


class Links(HTMLParser):
    """The attributes of each link."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [dict(attrs)] if tag == "a" else []


def test_the_parts_hold_every_lesson_once() -> None:
    """The table of contents forgets no lesson, and names none twice; the order is that of the numbers."""
    whole = whole_path.parts(CONTENTS, notebooks.listing())
    assert [one.path for part in whole for one in part.lessons] == notebooks.notebooks()
    assert len(whole) == 5


def test_a_page_shows_where_it_stands() -> None:
    """One step is the present one; each has a link and words; the text of a title is no markup."""
    made = [
        notebooks.Lesson(number, f"Title {number} <b>", "", None, Path(f"{number}_x.ipynb"))
        for number in ("00", "03", "a")
    ]
    whole = whole_path.parts(CONTENTS, made)
    picture = whole_path.picture(whole, "03")
    links = Links()
    links.feed(picture)
    assert [link["href"] for link in links.found] == ["00_x.html", "03_x.html", "a_x.html"]
    assert [link["aria-label"] for link in links.found if "aria-current" in link] == ["Lesson 03 Title 03 <b>"]
    assert links.found[2]["aria-label"] == "Lesson A Title a <b>" and "<b>" not in picture
    assert "\n" not in picture, "an empty line would end the HTML of a Markdown cell"
    links = Links()
    links.feed(whole_path.picture(whole, folder="lessons/"))
    assert [link["href"] for link in links.found] == ["lessons/00_x.html", "lessons/03_x.html", "lessons/a_x.html"]
    assert not any("aria-current" in link for link in links.found), "a page beside the lessons is no step"


def test_parts_without_a_lesson_are_left_out() -> None:
    """A book of one lesson has a path of one step."""
    (only,) = whole_path.parts(CONTENTS, [notebooks.Lesson("07", "Launch", "", None, Path("07_launch.ipynb"))])
    assert only.caption == "II. Execution" and len(only.lessons) == 1


def test_the_front_page_lists_every_lesson() -> None:
    """A row a lesson with its question, and the caption of a part in its first row only."""
    rows = facts.lessons(PROJECT).splitlines()[2:]
    known = notebooks.listing()
    assert len(rows) == len(known) and all(lesson.question in row for lesson, row in zip(known, rows, strict=True))
    assert sum(not row.startswith("|  |") for row in rows) == 5
    assert "<!-- facts: lessons -->" in (PROJECT / "book" / "index.md").read_text(encoding="utf-8")

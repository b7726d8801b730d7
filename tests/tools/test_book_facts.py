"""Tables that the book makes at build time: versions as locked, sources as written, the plan as computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from book.builder import facts as book_facts
from book.builder import plan
from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks


def test_every_table_that_a_page_asks_for_is_made() -> None:
    """No page keeps a mark, and every table is on a page."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in (PROJECT / "book").glob("*.md")}
    asked = {name for text in pages.values() for name in book_facts.MARK.findall(text)}
    assert asked == set(book_facts.FACTS)
    assert not any("<!-- facts" in book_facts.fill(text, root=PROJECT) for text in pages.values())


def test_an_unknown_table_is_refused() -> None:
    """A misspelt name fails the build, with the names that there are."""
    with pytest.raises(book_facts.FactError, match="'version'.*versions"):
        book_facts.fill("<!-- facts: version -->", root=PROJECT)


def test_versions_are_those_that_are_installed() -> None:
    """The page says what runs here: each row equals the installed package."""
    import importlib.metadata

    rows = [line.split(" | ") for line in book_facts.versions(PROJECT).splitlines()[2:]]
    assert len(rows) > 20
    for name, version, _ in rows:
        assert importlib.metadata.version(name.strip("| ")).split("+")[0] == version


def test_every_file_of_data_has_a_source() -> None:
    """A file without one would stand on the page with an empty cell."""
    rows = [line.strip("| ").split(" | ", 1) for line in book_facts.provenance(PROJECT).splitlines()[2:]]
    files = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "data").rglob("*.json")}
    assert {name.strip("`") for name, _ in rows} == files
    assert all(len(source.strip()) > 5 for _, source in rows)


def test_sources_of_every_shape_are_found(tmp_path: Path) -> None:
    """As a text, a list, a table of fields, or repository, path and version; an unsourced file has none."""
    (tmp_path / "data").mkdir()
    facts = {
        "read_on": "2026-11-22",
        "rows": [
            {"source": "a sheet"},
            {"sources": ["one", "two"]},
            {"source": {"field": "a card"}},
            {"repository": "x/y", "path": "z.py", "version": "commit 0123456789abcdef"},
        ],
    }
    (tmp_path / "data" / "facts.json").write_text(json.dumps(facts))
    (tmp_path / "data" / "none.json").write_text('{"layers": 4}')
    table = book_facts.provenance(tmp_path)
    for source in ("a sheet", "one<br>two", "a card", "x/y z.py @ 0123456", "read on 2026-11-22"):
        assert source in table
    assert "| `data/none.json` |  |" in table


def test_the_plan_is_what_lesson_06_computes(bridge) -> None:
    """Megatron builds each model again; if upstream moved, `python -m book.builder.plan` writes the row again."""
    assert plan.make() == plan.read()


def test_a_plan_that_does_not_fit_says_so() -> None:
    """What is left is counted from usable memory, and below zero it does not fit."""
    rows = {
        (row.split(" | ")[0].strip("| "), row.split(" | ")[1]): row
        for row in plan.markdown(plan.read()).splitlines()[2:]
    }
    assert len(rows) == 11
    assert rows["8B", "TP=1 DP=8"].endswith("| 92.5 | 72.7 | **−19.7** |")
    assert rows["8B", "TP=2 DP=4"].endswith("| 52.0 | 72.4 | 20.5 |")
    assert rows["8B", "TP=1 PP=2 DP=4"].endswith("| 67.9 | 72.1 | 4.1 |")
    assert rows["8B", "TP=1 CP=2 DP=4"].endswith("| 74.3 | 72.4 | **−1.8** |"), "with fp32 gradients"


def test_the_sessions_hold_every_lesson_once() -> None:
    """A class takes all lessons in their order, and the minutes are those of the lessons' own heads."""
    known = notebooks.listing()
    assert [name for names, _ in book_facts.SESSIONS for name in names] == [lesson.number for lesson in known]
    minutes = [int(row.split(" | ")[2]) for row in book_facts.sessions(PROJECT).splitlines()[2:]]
    assert all(lesson.minutes for lesson in known) and sum(minutes) == sum(lesson.minutes for lesson in known)


def test_the_readme_has_the_four_paths_of_the_front_page() -> None:
    """The same lessons in the same order, and the minutes that the lessons name."""
    import re

    rows = re.findall(r"^\| (\w[\w ]+) \| (.*) \| (\d+) \|$", (PROJECT / "README.md").read_text(), re.MULTILINE)
    minutes = {lesson.number: lesson.minutes or 0 for lesson in notebooks.listing()}
    assert [name for name, _, _ in rows] == [name for name, *_ in book_facts.PATHS]
    for (_, told, total), (_, numbers, *_) in zip(rows, book_facts.PATHS, strict=True):
        named = re.findall(r"\b\d\d\b", told.partition(", in ")[0])
        ends = f"{numbers[0]} to {numbers[-1]}" in told
        assert named == ([numbers[0], numbers[-1]] if ends else list(numbers))
        assert int(total) == sum(minutes[number] for number in numbers)

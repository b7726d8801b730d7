"""The troubleshooting page: each row says what is seen, why, what to do and who shows it; the museum's symptoms are there."""

from __future__ import annotations

import re

import pytest

from course_lib.common.project import PROJECT
from course_lib.lesson import museum, notebooks

PAGE = (PROJECT / "book" / "troubleshooting.md").read_text(encoding="utf-8")
SHOWN_BY = re.compile(r"\(([^()]+)\) \|$")
KNOWN = {"drill", "test", "doctor", "run once by hand", "read in Megatron-Bridge, pull request 4385"}
KNOWN |= {"read in nvidia-docker, issue 1243"}
KNOWN |= {f"lesson {lesson.number.upper()}" for lesson in notebooks.listing()}
SILENT = {"no-such-field", "tiny-weight", "no-answer", "chunk-border", "code-in-metadata"}
"""Exhibits that print nothing by themselves: what they show is said in other words on the page."""


def rows() -> list[str]:
    """The symptoms, a line each."""
    tables = re.findall(r"(?m)^\| what you see \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    return [row for table in tables for row in table.splitlines()]


def test_there_are_many_rows_of_one_kind() -> None:
    """At least 45, each with a symptom, a cause, a way out, and in brackets who shows or checks it; none twice."""
    found = rows()
    assert len(found) >= 45
    for row in found:
        cells = re.split(r"(?<!\\)\|", row.strip().strip("|"))
        assert len(cells) == 3 and all(cell.strip() for cell in cells), row
        shown = SHOWN_BY.search(row)
        assert shown, f"nobody shows it: {row}"
        assert set(shown[1].split(", ")) <= KNOWN or shown[1] in KNOWN, row
    symptoms = [row.split("|")[1] for row in found]
    assert len(set(symptoms)) == len(symptoms)


@pytest.mark.parametrize("name", sorted(set(museum.exhibits()) - SILENT))
def test_the_words_of_an_exhibit_lead_to_a_row(name: str) -> None:
    """What a failure of the museum prints is found on the page."""
    said = museum.exhibits()[name].symptom.lower()
    assert any(said in row.lower() for row in rows()), said

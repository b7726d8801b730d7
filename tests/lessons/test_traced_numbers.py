"""Every number in prose comes from somewhere: a cell, a row of `data/`, or the short list below, with its reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks
from course_lib.machine import bootstrap
from support import traced_numbers
from support.executed_lessons import executed
from support.notebooks_made_here import clean, code, markdown

DATA = traced_numbers.in_data(PROJECT / "data")
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "book").glob("*.md"))]
LESSONS = notebooks.listing()

ALLOWED = {
    "**Before you start**": "the time that a lesson is planned to take; `course lesson` measures what it takes",
    "13 sessions of 90 minutes": "the sum of the lessons' own minutes; tests/tools/test_book_facts.py holds it against them",
    "the 256 bytes": "a byte has eight bits",
    "256 bytes and the end of a document": "a byte has eight bits",
    "first loss is 10.81 within 0.05 for 32,768 ids": "planned; tests/tools/test_eight_gpu_pages.py computes both numbers",
    "with glibc 2.28 or later": "what the set-up checks; held against it below",
    "on glibc 2.39 or later": "the tag of the wheels that are named there, read at PyPI",
}
"""Words of a line, and why its numbers need no source."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_number_of_a_page_is_traced(path: Path) -> None:
    """The README and the book's pages state no number that `data/` does not hold."""
    text = path.read_text(encoding="utf-8")
    assert [str(number) for number in traced_numbers.untraced(text, DATA, allowed=ALLOWED)] == []


def test_the_readme_asks_for_what_the_set_up_checks() -> None:
    """Memory, disk and C library of the README's table are the limits of `course_lib/machine/bootstrap.py`."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    memory, disk = (size // bootstrap.GIB for size in (bootstrap.MINIMUM_MEMORY_BYTES, bootstrap.MINIMUM_DISK_BYTES))
    library = ".".join(map(str, bootstrap.OLDEST_GLIBC))
    for words in (f"| {memory} GiB |", f"| {disk} GiB free", f"glibc {library} or later"):
        assert words in text


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
def test_every_number_of_a_lesson_is_traced(lesson: notebooks.Lesson) -> None:
    """The prose of a lesson states what its cells hold or show, or what `data/` holds."""
    assert traced_numbers.untraced_in_lesson(executed(lesson), DATA, allowed=ALLOWED) == []


def lesson_saying(sentence: str, *, shown: str = "") -> dict:
    """A small executed lesson with one more sentence, and one more output."""
    notebook = clean()
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] != "before-you-start"]  # it states minutes
    notebook["cells"].insert(-1, markdown("said", sentence))
    notebook["cells"].insert(-1, code("shown", "show()"))
    notebook["cells"][-2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": shown}]
    return notebook


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("The loss ends at 3.71 nats/token.", "loss 3.6 nats/token"),
        ("It has 465 KB of text.", "text has 481,002 bytes"),
        ("Memory falls by 37%.", "a share of 0.36"),
        ("Each rank holds 14 tensors.", "13 tensors"),
        ("The model has 1,235,814,400 parameters.", "1235814401 parameters"),
        ("| layers | 17 |", ""),
    ],
)
def test_a_planted_number_is_found(sentence: str, shown: str) -> None:
    """A number that no cell shows, or that differs in a digit that is written, is listed with its cell."""
    found = traced_numbers.untraced_in_lesson(lesson_saying(sentence, shown=shown), set())
    assert len(found) == 1 and found[0].startswith("said: ") and sentence in found[0]


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("The loss ends at 3.71 nats/token.", "loss 3.7052 nats/token"),
        ("It has 465 KB of text.", "text has 465,127 bytes"),
        ("Memory falls by 36%.", "a share of 0.36"),
        ("About 1,200 steps, or 0.5 GiB.", "1234 steps 536870912 bytes"),
        ("The model has 1.24 billion parameters.", "1235814400 parameters"),
    ],
)
def test_a_rounded_number_is_traced(sentence: str, shown: str) -> None:
    """What a cell shows may be rounded and converted in the sentence."""
    assert traced_numbers.untraced_in_lesson(lesson_saying(sentence, shown=shown), set()) == []


@pytest.mark.parametrize(
    "text",
    [
        "1. First\n2. Second",
        "Layout TP=2 PP=1 on H100 in bf16, for 8B and Nemotron-3.",
        "See lesson 07, lessons 00 to 12, and `f(17)` or $x^{17}$.",
        "```\n17 lines\n```",
        "1. Step\n   ```\n   17 lines\n   ```",
        "Read in pull request 17.",
        "[seventeen](page.md#17) (2019), arXiv 2512.20848",
        "| 17 | a row's number |",
        "megatron-core 0.19.2 and commit 1234567",
    ],
)
def test_what_is_no_statement_of_a_number(text: str) -> None:
    """List numbers, names, versions, code, formulae, links and years state nothing that has to be traced."""
    assert traced_numbers.in_text(text) == []


def test_an_allowed_line_needs_a_reason_and_is_still_there() -> None:
    """The list stays short: a line that no page has any more is taken out of it."""
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    texts += ["".join("".join(c["source"]) for c in json.loads(l.path.read_text())["cells"]) for l in LESSONS]  # noqa: E741
    for words, reason in ALLOWED.items():
        assert reason and any(words in text for text in texts), words


def test_data_is_read_whole(tmp_path: Path) -> None:
    """Numbers in values and in words of nested rows count."""
    os.makedirs(tmp_path / "deep")
    (tmp_path / "deep" / "facts.json").write_text(json.dumps({"rows": [{"layers": 52}, {"note": "about 1,200 steps"}]}))
    assert traced_numbers.in_data(tmp_path) == {52.0, 1200.0}

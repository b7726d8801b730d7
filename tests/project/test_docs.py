"""The examples in docstrings are true, words are spelled, and code on a page is as wide as the page."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import course_lib
from course_lib.common.project import PROJECT
from support.hygiene_code import MAX_WIDTH

LIBRARY = Path(course_lib.__file__).parent
MODULES = sorted(
    "course_lib." + path.relative_to(LIBRARY).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in LIBRARY.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
"""The modules with examples; what only ranks import, or a fork server, has none."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name, tmp_path, monkeypatch):
    """Every `>>>` line of a module gives what stands below it."""
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.json"))
    module = importlib.import_module(name)
    result = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS, extraglobs={"Path": importlib.import_module("pathlib").Path}
    )
    assert result.failed == 0


def test_most_modules_show_examples():
    """The examples are found: a loader that hides them would let the test above pass with none."""
    found = {name: doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES}
    examples = {name: sum(len(test.examples) for test in tests) for name, tests in found.items()}
    assert len(examples) > 30 and sum(examples.values()) > 100
    assert [name for name, count in examples.items() if not count] == []


def test_words_are_spelled():
    """codespell finds no known misspelling in lessons, pages, code and data."""
    pages = [
        *PROJECT.glob("*.md"),
        *PROJECT.glob("book/*.md"),
        *PROJECT.glob("data/**/*"),
        *PROJECT.glob("notebooks/*.ipynb"),
    ]
    command = [Path(sys.executable).with_name("codespell"), *pages, PROJECT / "course_lib", PROJECT / "tests"]
    done = subprocess.run([*command, "--skip", "*.pyc"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def too_wide(text: str) -> list[str]:
    """The lines of a page's code that the book would wrap; what mermaid draws is no code."""
    blocks = re.findall(r"^```(?!mermaid)\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if len(line) > MAX_WIDTH]


@pytest.mark.parametrize("page", sorted(path.name for path in PROJECT.glob("book/*.md")))
def test_code_of_a_page_fits_its_width(page: str) -> None:
    """A line that wraps is copied wrong; the browser looks at the built page, this looks in a second."""
    assert too_wide((PROJECT / "book" / page).read_text(encoding="utf-8")) == []


def test_a_line_that_is_too_wide_is_found() -> None:
    """One character more than fits, in a block of code and nowhere else."""
    wide = "x" * (MAX_WIDTH + 1)
    assert too_wide(f"{wide}\n```\n{wide}\n```\n```mermaid\n{wide}\n```\n") == [wide]

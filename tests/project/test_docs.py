"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import course_lib
from course_lib.common.project import PROJECT

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

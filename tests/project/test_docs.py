"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import course_lib
from course_lib.common.project import PROJECT

DOES_SOMETHING = {"course_lib.ranks.preload", "course_lib.ranks.preload_automodel"}
"""Imported by a fork server only, and the two modules that do something then."""
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(course_lib.__path__, "course_lib.") if m.name not in DOES_SOMETHING
)


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
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    examples = [sum(len(test.examples) for test in tests) for tests in found]
    assert sum(count > 0 for count in examples) > 30 and sum(examples) > 100


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

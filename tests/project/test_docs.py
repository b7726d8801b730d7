"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import course_lib
from course_lib.common.project import PROJECT

DOES_SOMETHING = {"course_lib.ranks.preload"}
"""Imported by the fork server only, and the one module that does something then."""
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


def modules_named_in(text):
    """What a page says of this project: files by path, and a module with a name in it for each dotted name or import."""
    for path in re.findall(r"\b(?:course_lib|tests|book|notebooks)/[\w/.-]+\.(?:py|md|ipynb)", text):
        yield path, ""
    imports = re.findall(r"from (course_lib(?:\.\w+)*) import (\w+)", text)
    for words in [f"{place}.{name}" for place, name in imports] + re.findall(r"\bcourse_lib(?:\.\w+)+", text):
        parts = words.split(".")
        known = [count for count in range(1, len(parts) + 1) if (PROJECT / "/".join(parts[:count])).is_dir()]
        known += [count for count in range(1, len(parts) + 1) if (PROJECT / f"{'/'.join(parts[:count])}.py").exists()]
        module = Path(*parts[: max(known)])
        rest = parts[max(known) :]
        yield f"{module}.py" if (PROJECT / f"{module}.py").exists() else f"{module}/__init__.py", ".".join(rest)


def test_pages_name_what_is_there():
    """A file that moved, or a function that was renamed, does not live on in the prose of a page or a lesson."""
    pages = [
        *PROJECT.glob("*.md"),
        *PROJECT.glob("book/*.md"),
        *PROJECT.glob("data/*.md"),
        *PROJECT.glob("notebooks/*.ipynb"),
    ]
    missing = []
    for page in pages:
        for path, name in modules_named_in(page.read_text(encoding="utf-8")):
            file = PROJECT / path
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            if not file.exists() or (name and not re.search(rf"\b{name}\b", text)):
                missing.append((page.name, path, name))
    assert missing == []
    gone = ("course_lib/ranks/__init__.py", "nothing_there")
    assert next(modules_named_in("from course_lib.ranks import nothing_there")) == gone

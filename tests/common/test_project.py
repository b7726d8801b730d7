"""One place for the project's folders, and one table for every environment variable that the course reads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from course_lib import stack
from course_lib.common import project
from course_lib.machine import doctor, readings

# Not `*/**`: below .venv are tens of thousands of files.
PATTERNS = ("[!.]*/**/*.py", "notebooks/*.ipynb", "Makefile", "*.md", "book/*.md")
TEXT = {
    path: path.read_text(encoding="utf-8")
    for pattern in PATTERNS
    for path in project.PROJECT.glob(pattern)
    if path != Path(__file__).resolve()
}
READ = re.compile(r"""environ(?:\.get\(|\[)\s*["']COURSE_\w+["'](?:\]|,|\))(?!\s*=[^=])""")


def test_the_folders_are_those_of_this_project() -> None:
    """The package, the data and the notebooks lie side by side."""
    assert Path(project.__file__).is_relative_to(project.PROJECT / "course_lib")
    assert (project.DATA / "README.md").is_file() and (project.PROJECT / "notebooks").is_dir()
    assert project.RUNS.parent == project.PROJECT


def test_every_variable_stands_in_the_table_and_is_used() -> None:
    """Whatever code, lesson or page names a COURSE_ variable, the table explains it; none of the table is unused."""
    named = {name: path for path, text in TEXT.items() for name in re.findall(r"\bCOURSE_[A-Z_]+[A-Z]\b", text)}
    assert not named.keys() - project.VARIABLES.keys(), named
    table = project.PROJECT / "course_lib/common/project.py"
    used = {name for path, text in TEXT.items() if path != table for name in re.findall(r"COURSE_[A-Z_]+[A-Z]", text)}
    assert used == project.VARIABLES.keys()


def test_variables_are_read_through_the_table_only() -> None:
    """A read of its own would miss the check of the value."""
    assert READ.search('os.environ.get("COURSE_RUNS")') and READ.search("os.environ['COURSE_RUNS']")
    assert not READ.search('os.environ["COURSE_RUNS"] = folder')
    assert [path.name for path, text in TEXT.items() if "course_lib" in path.parts and READ.search(text)] == []


def test_nobody_counts_parents_for_a_folder_of_the_project() -> None:
    """The one file that runs before the package can be imported does; a move of any other cannot break its paths."""
    counting = [
        path.name for path, text in TEXT.items() if re.search(r"__file__\)(\.resolve\(\))?\.parent(\.parent|s\[)", text)
    ]
    assert sorted(counting) == ["bootstrap.py", "project.py"], counting


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("COURSE_DEVICE", "gpu", "COURSE_DEVICE is 'gpu'; it must be 'cpu' or 'cuda'"),
        ("COURSE_THREADS", "0", "COURSE_THREADS is '0'; it must be a whole number of at least 1"),
        ("COURSE_ALLOW_UNTESTED", "yes", "it must be '0' or '1'"),
        ("COURSE_RUN", "here", "no variable COURSE_RUN: did you mean COURSE_RUNS"),
    ],
)
def test_a_value_without_a_meaning_is_refused(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is read, and by the doctor before anything reads it."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        project.variable(name)
    found = readings.settings()
    assert found.status == "fail" and words in found.value


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `COURSE_DEVICE= make run` means it; 0 allows nothing."""
    monkeypatch.setenv("COURSE_DEVICE", "")
    assert project.variable("COURSE_DEVICE") is None and stack.device(2**20) == "cpu"
    for value, allowed in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("COURSE_ALLOW_UNTESTED", value)
        assert project.untested_allowed() is allowed


def test_the_doctor_shows_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has each variable with what it says now."""
    monkeypatch.setenv("COURSE_THREADS", "3")
    rows = {row["name"]: row for row in doctor.variables()}
    assert rows.keys() == project.VARIABLES.keys()
    assert rows["COURSE_THREADS"]["now"] == "3"
    assert all(row["now"] == os.environ.get(name, "") and row["meaning"] for name, row in rows.items())


def test_an_environment_is_afterwards_what_it_was(monkeypatch) -> None:
    """Variables that are added, replaced and taken out inside; after an error as well, and with an environment of its own."""
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.setenv("TAKEN", "before")
    monkeypatch.delenv("ADDED", raising=False)
    before = dict(os.environ)
    for wanted in (None, {"ADDED": "at first"}):
        with pytest.raises(RuntimeError), project.environment_kept(wanted):
            assert dict(os.environ) == (before if wanted is None else wanted)
            os.environ |= {"KEPT": "inside", "ADDED": "inside"}
            os.environ.pop("TAKEN", None)
            raise RuntimeError
        assert dict(os.environ) == before

"""Which lessons `--changed-only` leaves out, and the table of seconds: tried on a project of one lesson."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.common.project import PROJECT
from support import lesson_runs

SUPPORT = Path(lesson_runs.__file__).parent
TEST = """
import pathlib, pytest
@pytest.mark.parametrize("number", ["03", "04"])
def test_the_lesson_runs(number):
    assert pathlib.Path("data/fact.json").read_text() != "wrong"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two lessons, their library, data and lock, executed once."""
    for name, text in {
        "course_lib/code.py": "x = 1",
        "data/fact.json": "1",
        "uv.lock": "",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        "notebooks/03_three.ipynb": "{}",
        "notebooks/04_four.ipynb": "{}",
        "book/lessons/03_three.ipynb": "{}",
        "book/lessons/04_four.ipynb": "{}",
        "tests/conftest.py": "pytest_plugins = ['support.lesson_runs']",
        "tests/support/lesson_runs.py": (SUPPORT / "lesson_runs.py").read_text(),
        "tests/lessons/test_all_run.py": TEST,
        "tests/lessons/test_broken_claims.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(project: Path, *options: str, ci: str = "") -> str:
    """What pytest prints."""
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | ({"CI": ci} if ci else {})
    command = [sys.executable, "-m", "pytest", "-q", "tests", *options]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_only_what_changed_runs_again(project: Path) -> None:
    """Unchanged lessons are left out by name; a changed one runs; without the option all run."""
    table = run(project)
    assert "2 passed" in table and "seconds per lesson" in table and "\n03  " in table and "\n04  " in table
    again = run(project, "--changed-only")
    assert "2 deselected" in again and "unchanged since they passed: 03, 04" in again
    (project / "notebooks" / "04_four.ipynb").write_text('{"cells": []}')
    assert "1 passed, 1 deselected" in run(project, "--changed-only")
    assert "2 passed" in run(project)


def test_ci_always_runs_everything(project: Path) -> None:
    """Where CI is set the option is refused, before a test is left out."""
    run(project)
    refused = run(project, "--changed-only", ci="true")
    assert "there every lesson runs" in refused and "deselected" not in refused


def test_a_lesson_that_failed_runs_again(project: Path) -> None:
    """Only what passed is left out, even when the content is back to what passed before."""
    (project / "data" / "fact.json").write_text("wrong")
    assert "2 failed" in run(project)
    assert "2 failed" in run(project, "--changed-only")


@pytest.mark.parametrize(
    "name",
    [
        *("course_lib/code.py", "data/fact.json", "uv.lock"),
        *("tests/lessons/test_all_run.py", "tests/lessons/test_broken_claims.py"),
    ],
)
def test_the_hash_sees_everything_that_counts(project: Path, name: str) -> None:
    """The library, the data, the lock and the tests are part of a lesson's content."""
    before = lesson_runs.digest(project, "03")
    with open(project / name, "a") as file:
        file.write("#")
    assert lesson_runs.digest(project, "03") != before


def test_the_hash_sees_a_missing_page_and_not_another_lesson(project: Path) -> None:
    """Without its executed copy a lesson has to run; another lesson's source is none of its business."""
    before = lesson_runs.digest(project, "03")
    (project / "notebooks" / "04_four.ipynb").write_text("[]")
    assert lesson_runs.digest(project, "03") == before
    (project / "book" / "lessons" / "03_three.ipynb").unlink()
    assert lesson_runs.digest(project, "03") != before


def test_make_test_runs_everything() -> None:
    """Neither `make test` nor the entry of continuous integration passes the option."""
    makefile = (PROJECT / "Makefile").read_text()
    recipe = makefile.split("\ntest: setup", 1)[1].split("\n\n", 1)[0]
    assert "changed" not in recipe and "changed" not in (PROJECT / ".ci" / "run").read_text()

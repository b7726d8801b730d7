"""A pytest plugin for the tests that execute lessons: a table of seconds, and `--changed-only`.

`--changed-only` leaves out a lesson that passed with the same content before.  The content is everything that could
change the result: the notebook, `course_lib`, `data`, the lock, and the tests of lessons themselves.  Where `CI` is set,
and in `make test`, every lesson runs.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest

OF_A_LESSON = re.compile(r"test_(?:all_run|broken_claims)\.py::(\w+)\[(\d\d|[a-z])\]$")
COMMON = (
    *("course_lib", "data", "uv.lock", "pyproject.toml"),
    *("notebooks/pretrain.py", "tests/conftest.py"),
    *("tests/lessons/test_all_run.py", "tests/lessons/test_broken_claims.py"),
)


def digest(project: Path, number: str) -> str:
    """A hash of everything that the result of a lesson may depend on, its executed copy's presence included.

    Args:
        project: The root.
        number: The lesson's number.
    """
    found = hashlib.sha256()
    for place in [*(project / name for name in COMMON), *sorted((project / "notebooks").glob(f"{number}_*.ipynb"))]:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for path in files:
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(f"{path.relative_to(project).as_posix()} {path.stat().st_size}\n".encode())
                found.update(path.read_bytes())
    executed = sorted(path.name for path in (project / "book" / "lessons").glob(f"{number}_*.ipynb"))
    return hashlib.sha256(f"{found.hexdigest()} {executed}".encode()).hexdigest()


class LessonRuns:
    """Remembers which lessons passed with which content, and how long each took."""

    def __init__(self, config: pytest.Config, project: Path) -> None:
        self.config = config
        self.project = project
        self.seconds: dict[str, dict[str, float]] = defaultdict(dict)
        self.left_out: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what passed with the same content, if asked."""
        if not self.config.getoption("--changed-only"):
            return
        kept, left_out = [], []
        for item in items:
            match = OF_A_LESSON.search(item.nodeid)
            same = match and self.config.cache.get(self._key(item.nodeid), None) == self._digest(match.group(2))
            (left_out if same else kept).append(item)
        items[:] = kept
        self.left_out = sorted({OF_A_LESSON.search(item.nodeid).group(2) for item in left_out})
        self.config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the seconds, and the content that passed."""
        match = OF_A_LESSON.search(report.nodeid)
        if not match or report.when != "call":
            return
        self.seconds[match.group(2)][match.group(1)] = report.duration
        self.config.cache.set(
            self._key(report.nodeid), self._digest(match.group(2)) if report.outcome == "passed" else None
        )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print one line a lesson: seconds to run it, and to see its broken claim caught."""
        if self.left_out:
            terminalreporter.write_line(f"lessons left out, unchanged since they passed: {', '.join(self.left_out)}")
        if not self.seconds:
            return
        terminalreporter.section("seconds per lesson")
        names = sorted({name for row in self.seconds.values() for name in row}, reverse=True)
        terminalreporter.write_line("lesson  " + "  ".join(f"{name:>24}" for name in names) + f"  {'together':>9}")
        for number, row in sorted(self.seconds.items()):
            cells = "  ".join(f"{row[name]:24.1f}" if name in row else f"{'-':>24}" for name in names)
            terminalreporter.write_line(f"{number:6}  {cells}  {sum(row.values()):9.1f}")
        total = sum(sum(row.values()) for row in self.seconds.values())
        terminalreporter.write_line(f"{'all':6}  {'':{26 * len(names) - 2}}  {total:9.1f}")

    def _digest(self, number: str) -> str:
        return digest(self.project, number)

    @staticmethod
    def _key(nodeid: str) -> str:
        return "lessons/" + re.sub(r"\W+", "-", OF_A_LESSON.search(nodeid).group())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--changed-only", action="store_true", help="leave out lessons that passed with the same content")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin; a continuous integration run never leaves a lesson out."""
    if config.getoption("--changed-only") and os.environ.get("CI"):
        raise pytest.UsageError("--changed-only is for your own desk: CI is set, and there every lesson runs.")
    config.pluginmanager.register(LessonRuns(config, Path(config.rootpath)), "lesson-runs")

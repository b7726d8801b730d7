"""Lessons are shared out to the workers of pytest-xdist, and nothing that needs a lesson comes before it."""

from __future__ import annotations

import pytest

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks
from support import workers

RUNS = [f"{workers.LESSONS}::test_the_lesson_runs[{lesson.number}]" for lesson in notebooks.listing()]
BASE = f"{workers.LESSONS}::test_the_base_of_lessons_13_to_15_is_trained_once"
OTHERS = ["tests/ranks/test_cpu.py::test_it", *(f"{file}::test_it[13]" for file in (*workers.LAST, *workers.FILES))]


def test_the_base_and_the_lessons_that_start_from_it_stay_together():
    """In one worker, in their order; every other lesson is a unit of its own."""
    kept = [nodeid for nodeid in [BASE, *RUNS] if workers.unit(nodeid) == workers.LESSONS]
    assert kept == [BASE, *(f"{workers.LESSONS}::test_the_lesson_runs[{number}]" for number in ("13", "14", "15"))]
    assert len({workers.unit(nodeid) for nodeid in RUNS}) == len(RUNS) - 3 + 1
    assert {workers.unit(f"{workers.CLAIMS}::test_{number}[16]") for number in (1, 2)} == {workers.CLAIMS}


def test_lessons_come_before_who_needs_them():
    """The base, its lessons, the long ones, the others; then the long files, all else, and readers of executed lessons."""
    order = sorted([*OTHERS, BASE, *RUNS], key=workers.turn)
    assert order[:4] == [BASE, *(nodeid for nodeid in RUNS if workers.lesson(nodeid) in workers.TOGETHER)]
    assert [workers.lesson(nodeid) for nodeid in order[4 : 4 + len(workers.LONG)]] == list(workers.LONG)
    assert set(order[: len(RUNS) + 1]) == {*RUNS, BASE}
    files = [workers.unit(nodeid) for nodeid in order[len(RUNS) + 1 :]]
    assert files == [*workers.FILES, "tests/ranks/test_cpu.py", *workers.LAST]


def test_the_files_that_are_named_exist():
    """One that is renamed would lose its place in silence."""
    for file in (workers.LESSONS, *workers.FILES, *workers.LAST):
        assert (PROJECT / file).is_file(), file


@pytest.mark.parametrize(
    "nodeid", ["tests/ranks/test_cpu.py::test_the_lesson_runs[13]", f"{workers.CLAIMS}::test_x[03]"]
)
def test_other_tests_are_no_lessons(nodeid):
    """Only the file that executes lessons from top to bottom is divided."""
    assert workers.lesson(nodeid) is None

"""A pytest plugin: what comes first, and which worker of pytest-xdist runs it.

The tests of a file stay in one worker.  Lessons go to whoever is free, the longest first, so that no worker is left with
all of them; those that find what the one before has trained stay together, in their order.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.lesson_runs import OF_A_LESSON

LESSONS = "tests/lessons/test_all_run.py"
TOGETHER = ("13", "14", "15")
LONG = ("20", "08", "09", "18", "16", "03")
LATER = "tests/lessons/test_broken_claims.py"
LAST = ("tests/lessons/test_traced_numbers.py", "tests/lessons/test_words_of_pictures.py", "tests/tools/test_book.py")
"""These need what lessons trained and showed."""


def lesson(nodeid: str) -> str | None:
    """The number of the lesson that a test executes from top to bottom, if it is such a test."""
    match = OF_A_LESSON.search(nodeid)
    return match.group(2) if match and match.group(1) == "test_the_lesson_runs" else None


def turn(nodeid: str) -> tuple[int, int]:
    """What comes when: the base and its lessons, other lessons with the longest first, all else, and who needs lessons."""
    if nodeid.startswith(LESSONS):
        number = lesson(nodeid)
        if number is None or number in TOGETHER:
            return 0, 0
        return 1, LONG.index(number) if number in LONG else len(LONG)
    return 2 + nodeid.startswith(LATER) + 2 * nodeid.startswith(LAST), 0


def unit(nodeid: str) -> str:
    """The name of the tests that one worker runs together: a file, or a lesson."""
    number = lesson(nodeid)
    return nodeid if number and number not in TOGETHER else nodeid.split("::", 1)[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the same turn keep their order."""
    items.sort(key=lambda item: turn(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`, with lessons as units of their own."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Units(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return Units(config, log)

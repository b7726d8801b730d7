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
LONG = ("20", "08", "10", "18", "19", "07", "03", "16", "09")
CLAIMS = "tests/lessons/test_broken_claims.py"
FILES = ("tests/browser/test_lessons.py", CLAIMS, "tests/ranks/test_parity.py", "tests/browser/test_book.py")
"""The longest: the last one to be taken keeps one worker waiting for the other."""
LAST = ("tests/lessons/test_traced_numbers.py", "tests/lessons/test_words_of_pictures.py", "tests/tools/test_book.py")
"""These need what lessons trained and showed."""


def lesson(nodeid: str) -> str | None:
    """The number of the lesson that a test executes from top to bottom, if it is such a test."""
    match = OF_A_LESSON.search(nodeid)
    return match.group(2) if match and match.group(1) == "test_the_lesson_runs" else None


def turn(nodeid: str) -> tuple[int, int]:
    """What comes when: the base and its lessons, other lessons, other files, each with the longest first, and the last."""
    file, number = nodeid.split("::", 1)[0], lesson(nodeid)
    if file == LESSONS:
        return (0, 0) if number is None or number in TOGETHER else (1, _place(number, LONG))
    return (3, 0) if file in LAST else (2, _place(file, FILES))


def _place(name: str, longest: tuple[str, ...]) -> int:
    """Where it stands among those that come first; behind all of them if it does not."""
    return longest.index(name) if name in longest else len(longest)


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

"""What a verifier of first lines accepts, and what it cannot see."""

from __future__ import annotations

import pytest

from course_lib.text import docstrings

RIGHT = "Return the number of items."


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        (RIGHT, set()),
        (f"  {RIGHT}\n", set()),
        ("Return the number\nof items.", {"one line"}),
        ("Return the number of items", {"ends in one period"}),
        ("Return the number of items...", {"ends in one period"}),
        ("return the number of items.", {"begins with a capital"}),
        ("Return items.", {"3 to 12 words"}),
        ("Return " + "the item " * 6 + "now.", {"3 to 12 words"}),
        ("Returns the number of items.", {'commands, as in "Return"'}),
        ("", set(docstrings.checks(RIGHT))),
    ],
)
def test_each_fault_costs_its_own_check_and_no_other(text, failed):
    """A fault of one kind is a fifth of the score, and nothing passes with one."""
    assert {name for name, holds in docstrings.checks(text).items() if not holds} == failed
    assert docstrings.score(text) == pytest.approx(1 - len(failed) / 5)
    assert docstrings.passes(text) == (not failed)

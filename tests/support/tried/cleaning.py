"""Answers to the exercises of lesson 18."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from support.tried import Tried

FOUND = pd.DataFrame({"clean": [3], "mojibake": [1]}, index=["signs"])
MENDED = pd.DataFrame({"text": ["a b", "c d", "b a", "d c"], "kind": ["clean"] * 2 + ["shuffled words"] * 2})
GROUPS = [[1, 5], [2, 3, 9]]


def precision(folder: Path) -> Tried:
    """A row with three clean documents in four."""
    return Tried(0.25, [(0.75, "lacks to one"), (1, "how many faults"), (0.5, "divide those")], [FOUND])


def sees_order(folder: Path) -> Tried:
    """Functions that keep what is in order, everything, nothing, and the wrong half; and no function."""
    wrong = [
        (lambda _: True, "which words are neighbours"),
        (lambda _: False, "fewer known neighbours"),
        (lambda text: text > "b" and text != "c d", "where a text is to be kept"),
        (0.5, "a function of a text"),
    ]
    return Tried(sorted_words, wrong, [MENDED])


def sorted_words(text: str) -> bool:
    """Whether the words are in the order of the alphabet."""
    return sorted(text.split()) == text.split()


def one_stays(folder: Path) -> Tried:
    """All but one of each group, all of them, too few, and others."""
    wrong = [([1, 2, 3, 5, 9], "nothing is left"), ([5, 3], "more than one"), ([5, 3, 9, 7], "in no group")]
    return Tried([5, 3, 9], wrong, [GROUPS])

"""Lesson 18: the precision of a filter, a filter that sees the order of words, and a removal list that takes too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["all_of_each", "one_stays", "precision", "sees_order"]

FIND, SPARE = 0.8, 0.9
"""Shares of the shuffled documents that have to be found, and of the clean ones that have to stay."""


def precision(answer: float, found: pd.DataFrame) -> Verdict:
    """Which share of what the filter `"signs"` takes is faulty?"""
    row = found.loc["signs"]
    whole, clean = int(row.sum()), int(row["clean"])
    return value(
        answer,
        (whole - clean) / whole,
        why="precision asks what was taken; recall asks what was there to find.",
        otherwise="Of the row's documents all kinds but `clean` are faults: divide those by all of the row.",
        hints=[
            (clean / whole, "That is the share of clean documents, which is what precision lacks to one."),
            (whole - clean, "That is how many faults it took; precision is their share of everything that it took."),
        ],
        atol=0.006,
    )


def sees_order(answer: Callable[[str], bool], mended: pd.DataFrame) -> Verdict:
    """A function that keeps clean documents and drops those whose words were shuffled."""
    if not callable(answer):
        raise Unfit(f"a function of a text is asked for; yours is of type {type(answer).__name__}")
    keeps = {kind: mended[mended.kind == kind].text.map(answer).astype(bool) for kind in ("clean", "shuffled words")}
    finds, spares = 1 - keeps["shuffled words"].mean(), keeps["clean"].mean()
    if finds < FIND and spares < SPARE:
        return wrong(f"It finds {finds:.0%} and spares {spares:.0%}: does it return True where a text is to be kept?")
    if finds < FIND:
        return wrong(f"It finds {finds:.0%} of the shuffled: what differs is which words are neighbours.")
    if spares < SPARE:
        return wrong(f"It spares only {spares:.0%} of the clean: ask for fewer known neighbours.")
    return right(f"it finds {finds:.0%} and spares {spares:.0%}: a language model does the same with longer contexts.")


def all_of_each(groups: Sequence[Sequence[int]]) -> list[int]:
    """Every id of every group: a removal list after which no copy is left."""
    return sorted(id for group in groups for id in group)


def one_stays(answer: Sequence[int], groups: Sequence[Sequence[int]]) -> Verdict:
    """The ids to remove, so that one document of each group stays."""
    ids = set(answer)
    if ids - {id for group in groups for id in group}:
        return wrong("There are ids in it that are in no group.")
    left = [len(set(group) - ids) for group in groups]
    if 0 in left:
        return wrong(f"Of {left.count(0)} groups nothing is left: one document of each has to stay.")
    if max(left) > 1:
        return wrong(f"Of {sum(count > 1 for count in left)} groups more than one document is left.")
    return right("each text is there once; Curator's own identification writes its list in the same way.")

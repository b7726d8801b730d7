"""Lesson 05: tokens against tokens, a vocabulary that needs no padding, and files whose ids name other pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.lesson.verdicts import Unfit, Verdict, own_files, right, value, wrong
from course_lib.planning.layout.rules import padded_vocab_size
from course_lib.text import indexed, microscope, tokenizers

if TYPE_CHECKING:
    import pandas as pd

IDS, TENSOR_PARALLEL_SIZE = 1000, 8
"""Of the exercise "no row for nothing"."""
NEMOTRON_IDS = 131_072


def nemotron_tokens(answer: float, table: pd.DataFrame) -> Verdict:
    """How many tokens of Nemotron's vocabulary hold the text of 1,000 tokens of the BPE?"""
    tokens = table.set_index("tokenizer").tokens
    share = tokens["Nemotron"] / tokens["BPE"]
    return value(
        answer,
        1000 * share,
        rtol=0.01,
        why="the text is the same, so the numbers of tokens stand in the ratio of the table's column `tokens`.",
        otherwise="Both rows of the table hold one and the same text; only its number of tokens differs.",
        hints=[
            (1000 / share, "That is the other way round: longer tokens are fewer."),
            (1000 * tokens["Nemotron"] / tokens["bytes"], "That compares with single bytes, and not with the BPE."),
        ],
    )


def no_row_for_nothing(answer: Any) -> Verdict:
    """Which configuration trains 1,000 ids at TP=8 without a row that belongs to no id?"""
    model = getattr(answer, "model", None)
    if model is None:
        raise Unfit(
            f"a configuration is asked for, a copy of `cfg` that you changed; yours is of type {type(answer).__name__}"
        )
    tensor, divisor = model.tensor_model_parallel_size, model.make_vocab_size_divisible_by
    if tensor != TENSOR_PARALLEL_SIZE:
        return wrong(f"TP is {tensor} there, and {TENSOR_PARALLEL_SIZE} was asked for: a layout is not the way out.")
    if not answer.tokenizer.use_tokenizer_vocab_size or answer.tokenizer.vocab_size not in (None, IDS):
        return wrong(f"The number of ids has to come from a tokenizer, of {IDS:,} ids.")
    rows = padded_vocab_size(IDS, tensor_model_parallel_size=tensor, divisible_by=divisor)
    if rows != IDS:
        more = f"{rows:,} rows for {IDS:,} ids: each of the {tensor} ranks holds a multiple of {divisor}."
        return wrong(f"{more} Which number of rows does each rank need?")
    return right(
        f"{IDS // tensor} rows on each rank, none for nothing; on a GPU 128 is worth a few idle rows, because its matrix "
        "units work on multiples of such sizes."
    )


def files_of_a_colleague(texts: Sequence[str], prefix: Path, end: int) -> microscope.Index:
    """Token files whose ids are the Tekken file's own numbers: no special id lies in front of them.

    Args:
        texts: The documents.
        prefix: Where the files go, a path without suffix.
        end: The id that closes a document; it is right.
    """
    indexed.write(tokenizers.tekken_ranks(texts), prefix, vocab_size=NEMOTRON_IDS, end_of_document=end)
    return microscope.read(prefix)


def ids_of_the_text(answer: str | Path, here: Sequence[Sequence[int]], end: int) -> Verdict:
    """Which files hold the ids that Nemotron's tokenizer gives these texts?

    Args:
        answer: The prefix of the files.
        here: The ids of each text.
        end: The id that closes a document.
    """
    import numpy as np

    found = own_files(answer)
    if len(found.lengths) != len(here):
        return wrong(f"{len(found.lengths):,} documents, and the colleague's files have {len(here):,}.")
    for number, ids in enumerate(here):
        mine, theirs = microscope.document(found, number).astype(int), np.array([*ids, end])
        if len(mine) == len(theirs) + 1:
            return wrong(f"Document {number} has an id too many: `indexed.write` closes each document itself.")
        if mine[-1] != end:
            return wrong(
                f"Document {number} ends with id {mine[-1]}, and {end} closes a document: that id is a special one "
                "already, and stays."
            )
        if len(mine) != len(theirs):
            return wrong(f"Document {number} has {len(mine):,} ids, and its text {len(theirs):,}.")
        if (away := theirs[:-1] - mine[:-1]).any():
            same = " in each of them" if (away == away[0]).all() else ""
            return wrong(
                f"Document {number}: its ids are not those of its text; the first is off by {abs(away[0]):,}{same}. "
                "What stands in front of the first piece of text in Nemotron's vocabulary?"
            )
    return right(f"{len(here):,} documents decode to their text, and each is closed once.")

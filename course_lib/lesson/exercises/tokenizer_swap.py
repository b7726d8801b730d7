"""Lesson 05: tokens against tokens, a vocabulary that needs no padding, and a loss that rises without a word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong
from course_lib.planning.layout.rules import padded_vocab_size

if TYPE_CHECKING:
    import pandas as pd

IDS, TENSOR_PARALLEL_SIZE = 1000, 8
"""Of the exercise "no row for nothing"."""


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
        raise Unfit(f"a configuration is asked for, a copy of `cfg` that you changed, not a {type(answer).__name__}")
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


def rise_of_the_loss(answer: float, ids: int, rows: int) -> Verdict:
    """By how many nats per token does the loss rise when a checkpoint of `ids` rows is loaded into `rows`?"""
    return value(
        answer,
        math.log(rows / ids),
        atol=5e-4,
        why="ln(rows / ids): the softmax is shared by the new rows, whose logits are zero, like those of a young model.",
        otherwise="Compare the losses of two even guesses, one among all rows and one among all ids.",
        hints=[
            (
                math.log(rows),
                "That is the loss of an even guess among all rows; asked is by how much it is above the other.",
            ),
            (rows - ids, "That is how many rows were added; what does the softmax make of them?"),
            (math.log2(rows / ids), "That is in bits; a loss here is in nats, with the natural logarithm."),
        ],
    )

"""Lesson 02: ranks of a layout, a recipe made small, and a pattern with a letter too few."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from course_lib.common import config
from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong
from course_lib.planning import closed_forms

VOCABULARY = 1024
"""Ids with which a small recipe is counted, those of lesson 03."""


def ranks_needed(answer: int, sizes: dict[str, int]) -> Verdict:
    """How many ranks does a layout need at least?

    Args:
        sizes: TP, PP, CP and EP.
    """
    tp, pp, cp, ep = (sizes[name] for name in ("TP", "PP", "CP", "EP"))
    needed = max(tp * pp * cp, ep * pp)
    return value(
        answer,
        needed,
        why=f"TP x PP x CP, and EP x PP = {ep * pp} fit into the same ranks; one node of 8 GPUs does not hold them.",
        otherwise="Multiply the sizes that take ranks of their own, and see whether the experts fit into those.",
        hints=[
            (tp * pp * cp * ep, "Experts take no ranks of their own: EP uses those of TP, CP and DP once more."),
            (tp * pp, "Context parallelism takes ranks, too: each holds a part of every sequence."),
            (ep, "The experts alone would fit; what do TP, PP and CP need?"),
        ],
    )


def small_recipe(answer: Any, recipe: Any, limit: int) -> Verdict:
    """Which configuration is the same recipe with fewer parameters than this, and may be built?

    Args:
        answer: A configuration.
        recipe: The one that was made small.
        limit: Parameters.
    """
    if not config.has(answer, "model.num_layers"):
        raise Unfit(
            f"a configuration is asked for, a small copy of the recipe; yours is of type {type(answer).__name__}"
        )
    mine, theirs = config.flatten(answer), config.flatten(recipe)
    parts = ("optimizer.", "scheduler.", "train.", "mixed_precision")
    if other := sorted(name for name in theirs if name.startswith(parts) and mine.get(name) != theirs[name]):
        return wrong(f"{', '.join(other[:3])} changed: a smaller model was asked for, and the same training.")
    if mine["model.seq_length"] != mine["dataset.seq_length"]:
        return wrong(
            "Model and data disagree on the sequence length: it stands in two places, and `recipes.shrink` sets both."
        )
    heads, groups = mine["model.num_attention_heads"], mine["model.num_query_groups"]
    if heads % groups or mine["model.hidden_size"] != heads * mine["model.kv_channels"]:
        return wrong("Heads times the width of a head is the hidden size here, and the query groups divide the heads.")
    count = closed_forms.parameter_count(answer.model, vocab_size=VOCABULARY)
    if count >= limit:
        return wrong(f"{count:,} parameters with {VOCABULARY:,} ids: the limit is {limit:,}.")
    return right(f"{count:,} parameters, and the recipe's data, optimizer and schedule.")


def short_of_a_layer(pattern: str) -> str:
    """The pattern with one letter lost, in the middle of it."""
    place = pattern.index("MEM", len(pattern) // 3) + 1
    return pattern[:place] + pattern[place + 1 :]


def whole_pattern(answer: str, layers: int, pattern: str) -> Verdict:
    """Which pattern has all layers, in the right places?

    Args:
        layers: So many layers the model has.
        pattern: The pattern as it should be.
    """
    if not isinstance(answer, str):
        raise Unfit("the pattern is a string, a letter a layer")
    if len(answer) != layers:
        return wrong(f"{len(answer)} letters, and the model has {layers} layers.")
    if found := re.search("MM", answer):
        return wrong(
            f"Layers {found.start()} and {found.start() + 1} are both Mamba layers: in this model none follows another."
        )
    if Counter(answer) != Counter(pattern):
        return wrong(f"The letters are counted {dict(Counter(answer))}; which kind of layer was lost?")
    if answer != pattern:
        return wrong(
            "As many of each kind, and another order: where does a letter stand between two others as it does elsewhere?"
        )
    return right("the lost layer stands between two Mamba layers, as everywhere in this model.")

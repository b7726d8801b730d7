"""Lesson 12: how many microbatches a longer pipeline needs, a run that has them, and the order 1F1B."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.reading import pipeline

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

Order = Mapping[int, Sequence[str]]
"""The passes of each stage in their order, "F0" for the forward pass of microbatch 0, "B0" for the backward one."""


def microbatches(answer: int, stages: int, before: tuple[int, int]) -> Verdict:
    """With how many microbatches does a stage of a longer pipeline wait no longer than before?

    Args:
        stages: Of the longer pipeline.
        before: Stages and microbatches of the shorter one.
    """
    old_stages, old = before
    needed = next(m for m in range(1, 10_000) if pipeline.bubble_share(stages, m) <= pipeline.bubble_share(*before))
    return value(
        answer,
        needed,
        why=f"p - 1 grows from {old_stages - 1} to {stages - 1}, and m has to grow as much for the same share.",
        otherwise="Keep (p - 1) / (m + p - 1) the same.",
        hints=[
            (old * stages // old_stages, "That grows m as p does; what stands in the formula is p - 1."),
            (old, "With as many as before a stage waits longer: the pipeline is longer to fill and to empty."),
        ],
    )


def longer_pipeline(answer: Run | str, stages: int, before: Run) -> Verdict:
    """Which run has so many stages, and waits by order no longer than the shorter pipeline did?

    Args:
        answer: A run, recorded.
        stages: Pipeline stages that it has to have.
        before: The run of the shorter pipeline.
    """
    run = own_run(answer)
    found = run.launch.get("layout", {}).get("pipeline_model_parallel_size")
    if found != stages:
        return wrong(f"PP is {found} in that run, and {stages} was asked for.")
    if not len(run.timeline):
        return wrong("That run has no timeline: launch it with record=True.")
    mine, theirs = (_waits_by_order(pipeline.passes(each)) for each in (run, before))
    if mine > theirs + 1e-6:
        count = pipeline.passes(run).microbatch.nunique()
        return wrong(
            f"With {count} microbatches a stage waits {mine:.1%} of the step by order, and before it was {theirs:.1%}."
        )
    return right(f"a stage waits {mine:.1%} of the step by order, and with fewer stages it was {theirs:.1%}.")


def all_forward_first(stages: int, count: int) -> dict[int, list[str]]:
    """An order that works, and keeps the activations of every microbatch: all forward passes, then all backward ones."""
    numbers = range(count)
    return {stage: [f"F{n}" for n in numbers] + [f"B{n}" for n in numbers] for stage in range(stages)}


def one_forward_one_backward(answer: Order, given: Order) -> Verdict:
    """Which order of the same passes keeps as few microbatches as 1F1B, and waits no longer than the formula says?

    Args:
        answer: The order of each stage.
        given: The order that keeps too many, with the same passes.
    """
    if not isinstance(answer, Mapping):
        raise Unfit(
            'a dictionary from a stage to its passes is asked for, such as `{0: ["F0", "B0"], 1: ["F0", "B0"]}`'
        )
    stages, count = len(given), len(given[0]) // 2
    for stage, passes in given.items():
        if sorted(answer.get(stage, ())) != sorted(passes):
            return wrong(f"Stage {stage} has to have each of {', '.join(sorted(passes))} once.")
    try:
        rows = pipeline.replay(_rows(answer))
    except ValueError:
        return wrong(
            "Two stages wait for each other for ever: look at who needs the first backward pass of the last stage."
        )
    kept = {stage: _most_kept(passes) for stage, passes in answer.items()}
    if too_many := [stage for stage, most in kept.items() if most > stages - stage]:
        stage = too_many[0]
        limit = stages - stage
        return wrong(
            f"Stage {stage} keeps the activations of {kept[stage]} microbatches at once, and {limit} would do: "
            "a backward pass frees one, so it comes as soon as it can."
        )
    waits, formula = pipeline.idle_share(rows), pipeline.bubble_share(stages, count)
    if waits > formula + 1e-6:
        return wrong(
            f"A stage waits {waits:.0%} of the step, and {formula:.0%} is what the order costs at least: early stages do "
            "several forward passes before their first backward one, so that later ones have work."
        )
    return right(
        f"stage 0 keeps {kept[0]} microbatches instead of {count}, and a stage waits {waits:.0%} of the step, as before."
    )


def _waits_by_order(rows: pd.DataFrame) -> float:
    return pipeline.idle_share(pipeline.replay(rows, equal_stages=True))


def _rows(order: Order) -> pd.DataFrame:
    """The passes as `pipeline.replay` takes them, a forward and a backward pass equally long."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for stage, passes in order.items():
        for name in passes:
            kind, number = re.fullmatch(r"([FB])(\d+)", name).groups()
            kind = "forward" if kind == "F" else "backward"
            rows.append({"stage": stage, "kind": kind, "microbatch": int(number), "chunk": 0, "busy_seconds": 1.0})
    return pd.DataFrame(rows)


def _most_kept(passes: Sequence[str]) -> int:
    """How many microbatches had a forward pass and no backward pass yet, at most."""
    kept = [sum(1 if name[0] == "F" else -1 for name in passes[: end + 1]) for end in range(len(passes))]
    return max(kept)

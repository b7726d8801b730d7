"""Lesson 16: read a load, train with the experts elsewhere, and mend a run whose routers cannot be watched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.planning import layout
from course_lib.reading import experts

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["same_first_load", "starved_experts", "unwatched", "watched"]

EXPERT_RANKS = 4


def starved_experts(answer: int, loads: Mapping[str, pd.DataFrame]) -> Verdict:
    """How many experts of layer 2 get less than a tenth of the mean in the last step without balancing?"""
    mine = loads["no balancing"]
    hungry = experts.starved(mine)
    last = mine.xs(hungry.index[-1], level="step").loc[2]
    return value(
        answer,
        int(hungry[2].iloc[-1]),
        why="they were chosen by less than a tenth of the mean, so their weights hardly learn.",
        otherwise="Divide the last row of layer 2 by its mean, and count the columns below 0.1.",
        hints=[
            (int(hungry[2].iloc[0]), "That is the first step: the routers have not learned anything there."),
            (int((last == 0).sum()), "You counted the experts that get nothing at all; a tenth of the mean is more."),
            (int((last < last.mean()).sum()), "You counted all below the mean; starved is less than a tenth of it."),
            (int(hungry[1].iloc[-1]), "That is layer 1."),
        ],
    )


def same_first_load(answer: object, run: Run) -> Verdict:
    """A run of the learner's with EP=4, whose first layer sends every token where `run` sent it in the first step."""
    mine = own_run(answer)
    if (size := mine.launch["layout"]["expert_model_parallel_size"]) != EXPERT_RANKS:
        return wrong(f"That run has EP={size}: set cfg.model.expert_model_parallel_size to {EXPERT_RANKS}.")
    try:
        load = experts.load(mine)
    except ValueError as error:
        return wrong(f"{error}")
    if not (load.loc[(1, 1)] == experts.load(run).loc[(1, 1)]).all():
        return wrong("Its first layer sent tokens elsewhere: keep the seed, the text, the batch and the sizes of cfg.")
    return right(
        "routers, attention and embedding draw their first weights from random numbers that are the same at any EP."
    )


def unwatched(cfg: Any) -> Any:
    """A copy at TP=2 and EP=4 whose routers cannot be recorded, for two reasons."""
    broken = copy.deepcopy(cfg)
    broken.model.tensor_model_parallel_size, broken.model.expert_model_parallel_size = 2, EXPERT_RANKS
    broken.model.sequence_parallel, broken.model.moe_expert_capacity_factor = False, 1.0
    return broken


def watched(answer: Any, broken: Any) -> Verdict:
    """A configuration that trains at the sizes of `broken`, and whose routers can be recorded."""
    get, given = Fields.of(answer).model, Fields.of(broken).model
    if get("num_moe_experts") is None:
        raise Unfit("a configuration with experts is asked for: a copy of `broken`, mended")
    for name in ("tensor_model_parallel_size", "expert_model_parallel_size"):
        if get(name) != given(name):
            return wrong(f"It has {name}={get(name)}, and {given(name)} was to stay.")
    if reasons := layout.check(answer, 8):
        return wrong(f"It cannot train yet: {reasons[0].message}.")
    if get("moe_expert_capacity_factor") is not None:
        return wrong("It trains, and its routers still drop choices: NVIDIA's tracer leaves such microbatches out.")
    return right(
        "with TP the sequence is shared, so each token is routed once; and without a capacity none is dropped."
    )

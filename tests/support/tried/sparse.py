"""Answers to the exercises of lesson 16."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from course_lib import runs
from course_lib.lesson.exercises import sparse
from support.tried import Tried, run


def starved_experts(folder: Path) -> Tried:
    """The first step, those that get nothing, all below the mean, and the other layer."""
    index = pd.MultiIndex.from_product([(1, 2), (1, 2)], names=["step", "layer"])
    rows = [[25, 25, 25, 25] * 2, [25, 25, 25, 25] * 2, [80, 90, 6, 6, 6, 6, 5, 1], [96, 96, 1, 2, 1, 4, 0, 0]]
    loads = {"no balancing": pd.DataFrame(rows, index=index)}
    wrong = [
        (0, "first step"),
        (2, "nothing at all"),
        (6, "all below the mean"),
        (1, "layer 1"),
        (7, "Divide the last row"),
    ]
    return Tried(5, wrong, [loads])


def recorded(folder: Path, name: str, tokens: list[int] | None, *, ep: int = 4) -> runs.Run:
    """A run whose first layer sent so many tokens to each expert."""
    layout = {"expert_model_parallel_size": ep}
    config = {"model": {"num_moe_experts": 4}}
    made = run(folder, name, config=config, launch={"layout": layout, "ranks": 8})
    row = {"rank": 0, "step": 1, "layer": 1, "microbatch": 0, "tokens": tokens}
    (made.path / "router.jsonl").write_text(json.dumps(row) + "\n" if tokens else "")
    return made


def same_first_load(folder: Path) -> Tried:
    """Another EP, another seed, and a run that nobody watched."""
    lesson = recorded(folder, "lesson", [5, 6, 7, 8], ep=2)
    wrong = [
        (lesson, "That run has EP=2"),
        (recorded(folder, "other-seed", [8, 7, 6, 5]), "sent tokens elsewhere"),
        (recorded(folder, "unwatched", None), "record='router'"),
    ]
    return Tried(recorded(folder, "yours", [5, 6, 7, 8]), wrong, [lesson])


def watched(folder: Path) -> Tried:
    """Half mended in either way, and made easy by another layout."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "num_moe_experts": 16}
    broken = sparse.unwatched(SimpleNamespace(model=SimpleNamespace(**sizes, seq_length=64)))
    spread, dropless, mended, easy = (copy.deepcopy(broken) for _ in range(4))
    for one in (spread, mended):
        one.model.sequence_parallel = True
    for one in (dropless, mended, easy):
        one.model.moe_expert_capacity_factor = None
    easy.model.tensor_model_parallel_size = 1
    wrong = [
        (spread, "still drop choices"),
        (dropless, "cannot train yet"),
        (easy, "2 was to stay"),
        (1, "with experts"),
    ]
    return Tried(mended, wrong, [broken])

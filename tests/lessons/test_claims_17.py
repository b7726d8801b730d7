"""Every claim of a check cell of lesson 17 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

from types import SimpleNamespace as Some

import numpy as np
import pandas as pd
import pytest

from course_lib import runs
from support.lesson_cells import falsify, gives, tagged


def trained(*losses):
    """A run with these losses."""
    metrics = pd.DataFrame({"step": range(1, 1 + len(losses)), "loss": losses, "grad_norm": 1.0})
    return Some(metrics=metrics, launch={"device": "cpu"})


def lesson_17():
    """Facts of lesson 17."""
    named = {"small": Some(hybrid_layer_pattern="M*", num_layers=16)}
    counting = Some(get_hybrid_layer_counts=gives({"M": 14, "*": 2}))
    pattern = {"named": named, "hybrid_layer_allocation": counting}
    many = Some(get_hybrid_layer_counts=gives({"M": 12, "*": 4}))
    yield "check-pattern", pattern, [{"hybrid_layer_allocation": many}]
    model = Some(__init__=None)
    named = type("HybridModelProvider", (), {})()
    said = '"GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes, see `HybridModel`")'
    move = {"inspect": Some(getsource=gives(said)), "gpt_model": Some(GPTModel=model), "cfg_4b": Some(model=named)}
    newer = Some(getsource=gives('"GPTModel IS back")'))
    yield "check-move", move, [{"inspect": newer}, {"cfg_4b": Some(model=model)}]
    y, left = pd.Series(np.linspace(-1, 1, 8)), np.full((8, 8), 0.9)
    scan = {"one_by_one": y, "in_chunks": y + 1e-7, "left": left, "chunk": 4}
    yield "check-scan", scan, [{"in_chunks": y + 1e-3}, {"left": left / 9}]
    run = {
        "started": trained(6.9), "expected_loss": 6.94, "cut": trained(6.8), "alone": trained(6.8), "runs": runs,
        "tolerance": 1e-5,
    }  # fmt: skip
    yield "check-run", run, [{"started": trained(6.0)}, {"cut": trained(6.7)}, {"tolerance": 0.0}]
    spent = pd.DataFrame({"length": [1, 2], "attention GFLOP": [1.0, 4.0], "scan GFLOP": [2.0, 4.0]})
    slow = [spent.assign(**{kind: [1.0, 3.0]}) for kind in ("attention GFLOP", "scan GFLOP")]
    yield "check-cost", {"spent": spent, "crossing": 4}, [{"spent": one} for one in slow]
    memory = {
        "kept": {"state": 100, "a token": 2}, "full": {"state": 0, "a token": 20}, "sizes": [1, 64],
        "curves": {"Nano 4B": [102, 228], "with * for M": [20, 1280]},
    }  # fmt: skip
    little = {"Nano 4B": [102, 228], "with * for M": [20, 300]}
    yield "check-memory", memory, [{"kept": {"state": 100, "a token": 19}}, {"curves": little}]
    model = Some(
        vocab_size=8, hidden_size=4, init_method_std=0.1, seq_length=10, hybrid_layer_pattern="MM*", mamba_num_heads=2,
        mamba_head_dim=8, mamba_num_groups=1, mamba_state_dim=4,
    )  # fmt: skip
    kept = 2 * 10 * (2 * (4 + 5 * 16 + 8 + 2) + 4)
    card = {
        "cfg_4b": Some(model=model), "planned": 24.0, "by_part": {"mamba": kept},
        "baselines": Some(first_loss=gives(12.41)), "plan": Some(states=Some(parameters=5)),
        "published": {"rows": [{"value": 12.43}], "parameters": 5},
    }  # fmt: skip
    wrong = [{"baselines": Some(first_loss=gives(11.9))}, {"plan": Some(states=Some(parameters=6))}, {"planned": 71.0}]
    wrong.append({"by_part": {"mamba": 2 * kept}})
    yield "check-card", card, wrong


CELLS = {cell: (facts, wrong) for cell, facts, wrong in lesson_17()}


@pytest.mark.parametrize("name", CELLS)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """A check that cannot fail proves nothing."""
    falsify("17", name, *CELLS[name])


def test_every_check_cell_is_tried():
    """A new check cell needs facts here."""
    assert set(CELLS) == tagged("17", "check")

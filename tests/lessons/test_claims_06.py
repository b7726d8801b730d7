"""Every check of lesson 06 can fail: its cell alone, with the numbers of the page, and with one of them wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from course_lib.common import units
from course_lib.lesson import checks
from support.lesson_cells import execute, tagged

GIB = units.GiB
SIZES = {
    **{"1B TP=1 DP=8": 20.0, "1B TP=2 DP=4": 10.9, "1B TP=4 DP=2": 6.3},
    **{"3B TP=1 DP=8": 44.0, "3B TP=2 DP=4": 24.3, "3B TP=4 DP=2": 14.5},
    **{"8B TP=1 DP=8": 92.5, "8B TP=2 DP=4": 52.0, "8B TP=4 DP=2": 31.7},
    **{"8B PP=2 DP=4": 67.9, "8B CP=2 DP=4": 74.3, "8B recompute DP=8": 61.3},
}
RATES = {
    f"{name} {layout}": rate
    for name in ("1B", "3B", "8B")
    for layout, rate in {"TP=1 DP=8": 19_215, "TP=2 DP=4": 17_253, "TP=4 DP=2": 14_328}.items()
} | {"8B CP=2 DP=4": 19_215}
PARTS = {"weights": 15.0, "gradients": 29.9, "optimizer": 11.2, "activations": 34.4, "loss": 2.0}
NEMO = pd.DataFrame({"name": ["Llama 3.1 8B, NeMo 24.09, BF16"], "tokens_per_second_per_gpu": [10_153]})


def kept(gib: float) -> SimpleNamespace:
    """A plan that keeps so many GiB of activations."""
    return SimpleNamespace(activations=SimpleNamespace(total_bytes=gib * GIB), components=PARTS)


def holds(states_gib: float, optimizer_gib: float) -> SimpleNamespace:
    """Planned states."""
    return SimpleNamespace(total_bytes=states_gib * GIB, optimizer_bytes=optimizer_gib * GIB)


def page() -> dict[str, Any]:
    """The values that the check cells read, near those of the page."""
    values = {
        "checks": checks,
        "units": units,
        "models": dict.fromkeys(["1B", "3B", "8B"]),
        "limit": 79.6,
        "headroom_gib": 3.0,
    }
    values |= {"planned": {("8B", tp): size for tp, size in ((1, 56.1), (2, 33.7), (4, 22.4))}}
    values |= {"by_hand": {(tp, 8 // tp): size * GIB for tp, size in ((1, 56.1), (2, 33.7), (4, 22.4))}}
    values |= {"needs": SIZES, "plans": {"8B TP=1 DP=8": kept(34.4), "8B PP=2 DP=4": kept(34.3)}}
    values |= {"counted": SimpleNamespace(states=holds(33.7, 11.2)), "kept": 18.3 * GIB}
    values |= {"estimate": {"states": 33.7 * GIB, "activations": 18.0 * GIB}}
    values |= {"rows": {"weights": (2**20, 2**20), "activations": (2**21, 2**21)}}
    values |= {"vocab_size": 128_256, "closed_forms": SimpleNamespace(flops_per_token=lambda model, vocab_size: 51.5e9)}
    values |= {"by_torch": 57.9e9, "formula": 57.9e9, "rate": RATES, "published": NEMO}
    values |= {"best": {"1B": "1B TP=1 DP=8", "3B": "3B TP=1 DP=8", "8B": "8B CP=2 DP=4"}}
    values |= {"bubble": {m: 6.8 / m for m in (4, 8, 16, 32)}, "waits": 0.78, "work": 6.8}
    values |= {"tp_gb": 349.0, "pp_gb": 2.1, "slow": 7.0}
    values |= {"by_ep": {ep: holds(size, 44.1) for ep, size in ((1, 161.8), (2, 107.0), (4, 79.7), (8, 66.0))}}
    return values


BROKEN = {
    "check-states": [("planned", {("8B", 1): 56.1, ("8B", 2): 40.0, ("8B", 4): 22.4})],
    "check-fit": [
        ("needs", SIZES | {"8B TP=1 DP=8": 70.0}),
        ("plans", {"8B TP=1 DP=8": SimpleNamespace(components=PARTS | {"activations": 20.0})}),
        ("needs", SIZES | {"8B CP=2 DP=4": 70.0}),
    ],
    "check-bridge": [("kept", 25.0 * GIB), ("estimate", {"states": 35.0 * GIB, "activations": 18.0 * GIB})],
    "check-run": [("rows", {"weights": (2**20, 1.04 * 2**20)}), ("rows", {"activations": (2**20, 1.15 * 2**20)})],
    "check-time": [
        ("by_torch", 51.5e9),
        ("closed_forms", SimpleNamespace(flops_per_token=lambda model, vocab_size: 57.9e9)),
        ("rate", RATES | {"3B TP=2 DP=4": 30_000}),
        ("published", NEMO.assign(tokens_per_second_per_gpu=19_000)),
    ],
    "check-verdict": [
        ("best", {"1B": "1B TP=1 DP=8", "3B": "3B TP=1 DP=8", "8B": "8B PP=2 DP=4"}),
        ("rate", RATES | {"1B TP=4 DP=2": 17_000}),
        ("needs", SIZES | {"8B TP=2 DP=4": 65.0}),
    ],
    "check-pipeline": [
        ("plans", {"8B TP=1 DP=8": kept(34.4), "8B PP=2 DP=4": kept(18.4)}),
        ("needs", SIZES | {"8B PP=2 DP=4": 50.0}),
        ("waits", 0.1),
        ("pp_gb", 10.0),
        ("slow", 0.8),
    ],
    "check-experts": [
        ("by_ep", {ep: holds(size, size / 2) for ep, size in ((1, 161.8), (2, 107.0), (4, 79.7), (8, 66.0))}),
        ("by_ep", {ep: holds(size, 44.1) for ep, size in ((1, 161.8), (2, 107.0), (4, 70.0), (8, 66.0))}),
    ],
}
"""For each check cell the values that must make it fail."""


def test_every_check_cell_is_broken_here():
    """A new check in the lesson needs a value that makes it fail."""
    assert tagged("06", "check") == set(BROKEN)


@pytest.mark.parametrize("cell", BROKEN)
def test_a_check_passes_and_each_wrong_value_fails_it(cell, monkeypatch, capsys):
    """With the page's numbers the cell passes; with one of them wrong it stops."""
    monkeypatch.setattr(checks, "measured", lambda *_, **__: None)
    execute("06", cell, page())
    for name, wrong in BROKEN[cell]:
        with pytest.raises(checks.ClaimFailed):
            execute("06", cell, page() | {name: wrong})
    capsys.readouterr()

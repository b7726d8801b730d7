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
    "8B CP=2 DP=4, bf16 gradients": 59.3,
}
RATES = {
    f"{name} {layout}": rate
    for name in ("1B", "3B", "8B")
    for layout, rate in {"TP=1 DP=8": 19_215, "TP=2 DP=4": 17_253, "TP=4 DP=2": 14_328}.items()
} | {"8B CP=2 DP=4": 19_215, "8B CP=2 DP=4, bf16 gradients": 19_215, "8B PP=2 DP=4": 17_546}
PARTS = {
    "weights": 15.0 * GIB,
    "gradients": 29.9 * GIB,
    "optimizer": 11.2 * GIB,
    "activations": 34.4 * GIB,
    "loss": 2.0,
}
LAYER = {
    "input of the first product": 64,
    "both halves before the gate": 448,
    "product of the halves": 224,
    "the rest": 363,
}
NEMO = pd.DataFrame({"name": ["Llama 3.1 8B, NeMo 24.09, BF16"], "tokens_per_second_per_gpu": [10_153]})
COUNT = 8_030_261_248


def layer(**sizes: int) -> dict[str, dict[str, int]]:
    """What one layer keeps, in bytes."""
    named = {name.replace("_", " "): size for name, size in sizes.items()}
    return {"TP=1": {name: size * units.MiB for name, size in (LAYER | named).items()}}


def page() -> dict[str, Any]:
    """The values that the check cells read, near those of the page."""
    values = {
        "checks": checks,
        "units": units,
        "models": dict.fromkeys(["1B", "3B", "8B"]),
        "limits": dict.fromkeys(SIZES, 72.5),
        "alike": 0.05,
        "count": COUNT,
    }
    values |= {"planned": {("8B", tp): size for tp, size in ((1, 56.1), (2, 33.7), (4, 22.4))}, "by_bridge": 33.7}
    values |= {"by_hand": {(tp, 8 // tp): size * GIB for tp, size in ((1, 56.1), (2, 33.7), (4, 22.4))}}
    values |= {"needs": SIZES, "plans": {"8B TP=1 DP=8": SimpleNamespace(components=PARTS)}, "one_layer": layer()}
    values |= {"rows": {"weights": (2**20, 2**20), "activations": (2**21, 2**21)}}
    values |= {"vocab_size": 128_256, "closed_forms": SimpleNamespace(flops_per_token=lambda model, vocab_size: 51.5e9)}
    values |= {"by_torch": 57.9e9, "formula": 57.9e9, "rate": RATES, "published": NEMO}
    values |= {"gradients": [29.9, 29.9, 14.95], "by_layers": {n: 77.5 - 1.008 * n for n in range(1, 9)}}
    values |= {"sharded": SimpleNamespace(sharded_bytes=2 * COUNT)}
    values |= {"best": {"1B": "1B TP=1 DP=8", "3B": "3B TP=1 DP=8", "8B": "8B TP=2 DP=4"}}
    values |= {"bubble": {m: 6.8 / m for m in (4, 8, 16, 32)}, "waits": 0.78}
    return values


BROKEN = {
    "check-states": [("planned", {("8B", 1): 56.1, ("8B", 2): 40.0, ("8B", 4): 22.4}), ("by_bridge", 35.0)],
    "check-fit": [
        ("needs", SIZES | {"8B TP=1 DP=8": 70.0}),
        ("needs", SIZES | {"8B CP=2 DP=4": 70.0}),
        ("plans", {"8B TP=1 DP=8": SimpleNamespace(components=PARTS | {"activations": 20.0 * GIB})}),
        ("one_layer", layer(the_rest=600)),
        ("plans", {"8B TP=1 DP=8": SimpleNamespace(components=PARTS | {"activations": 40.0 * GIB})}),
    ],
    "check-run": [("rows", {"weights": (2**20, 1.04 * 2**20)}), ("rows", {"activations": (2**20, 1.15 * 2**20)})],
    "check-time": [
        ("by_torch", 51.5e9),
        ("closed_forms", SimpleNamespace(flops_per_token=lambda model, vocab_size: 57.9e9)),
        ("rate", RATES | {"3B TP=2 DP=4": 30_000}),
        ("published", NEMO.assign(tokens_per_second_per_gpu=19_000)),
    ],
    "check-levers": [
        ("gradients", [29.9, 29.9, 29.9]),
        ("gradients", [29.9, 14.95, 14.95]),
        ("by_layers", {n: 76.0 - 1.008 * n for n in range(1, 9)}),
        ("sharded", SimpleNamespace(sharded_bytes=2.25 * COUNT)),
    ],
    "check-verdict": [
        ("best", {"1B": "1B TP=1 DP=8", "3B": "3B TP=1 DP=8", "8B": "8B PP=2 DP=4"}),
        ("rate", RATES | {"1B TP=4 DP=2": 17_000}),
        ("needs", SIZES | {"8B TP=2 DP=4": 55.0}),
        ("rate", RATES | {"8B PP=2 DP=4": 19_000}),
        ("needs", SIZES | {"8B PP=2 DP=4": 55.0}),
        ("waits", 0.1),
        ("rate", RATES | {"8B CP=2 DP=4, bf16 gradients": 17_300}),
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

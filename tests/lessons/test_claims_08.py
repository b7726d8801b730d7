"""Every check of lesson 08 can fail: its cell alone, with the numbers of a good run, and with one of them wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from course_lib.common import units
from course_lib.experiments import faults
from course_lib.reading import throughput
from support.lesson_cells import Sample, execute, gives, predicted, proving, tells

NAMES = ("loss at step 1", "held-out loss at the end", "work per token", "weight and optimizer by Bridge")
STEPS = pd.DataFrame({"step": range(1, 11), "loss": 5.0, "grad_norm": 0.7, "elapsed_ms": 100.0})
LOG = pd.DataFrame({"loss": [5.0, 5.0], "grad_norm": 0.7, "skipped": 0, "nan": 0, "elapsed_ms": 101.0})


OPERATORS = pd.DataFrame({"kind": ["matrix products", "loss"], "count": [54, 2]})


def said(whole_gflop: float, half_gflop: float) -> dict[str, Any]:
    """Published runs whose TFLOP/s and tokens/s make so many GFLOP a token, by the accounting of each."""
    names = {
        **{"NeMo 24.12, FP8": whole_gflop, "Megatron-LM, spring 2025, FP8": whole_gflop},
        **{"Megatron-Bridge 25.09, FP8": half_gflop, "Megatron-Bridge 25.11, FP8": half_gflop},
    }
    rows = pd.DataFrame({"name": names.keys(), "tflops_per_gpu": names.values(), "precision": "fp8"})
    rows["tokens_per_second_per_gpu"] = 1e3
    return {
        "recipes": SimpleNamespace(offline=nullcontext), "ceiling": SimpleNamespace(published=gives(rows)),
        "llama3_8b_pretrain_config": lambda: SimpleNamespace(model=None), "published_seq_length": 8192,
    }  # fmt: skip


def read(labels: Callable[[np.ndarray], np.ndarray] = lambda labels: labels) -> dict[str, Any]:
    """Samples as the microscope gives them, with these labels."""
    sets = gives((Sample(labels), [0], None))
    return {
        "microscope": SimpleNamespace(datasets=sets), "cfg": SimpleNamespace(train=SimpleNamespace(global_batch_size=2)),
        "work": Path("."), "steps": 3, "vocab_size": 8192,
    }  # fmt: skip


def counts(unigram: float, bigram: float) -> dict[str, Any]:
    """Baselines with these losses."""
    pairs = gives(np.zeros((4, 2)))
    made = SimpleNamespace(token_pairs=pairs, unigram_loss=gives(unigram), bigram_loss=gives(bigram))
    return {"baselines": made}


def logged(**values: float) -> dict[str, Any]:
    """Bridge's log, with these columns changed."""
    return {"throughput": SimpleNamespace(bridge_log=gives(LOG.assign(**values)))}


def timed(*milliseconds: float, device: str = "cpu", mixed_up: bool = False) -> dict[str, Any]:
    """A run of steps that last this long, eight of each; mixed up, its rates are seconds a token."""
    steps = pd.DataFrame({"elapsed_ms": np.repeat(milliseconds, 8), "tokens": 100, "skipped": 0})
    steps["tokens_per_second"] = steps.tokens / (steps.elapsed_ms / 1e3)
    if mixed_up:
        steps["tokens_per_second"] = 1 / steps.tokens_per_second
    return {"run": SimpleNamespace(metrics=steps, launch={"device": device}), "throughput": throughput}


def traced(layers: int) -> SimpleNamespace:
    """A configuration of a run that is traced."""
    parts = {name: SimpleNamespace() for name in ("scheduler", "validation")}
    model, train = SimpleNamespace(num_layers=layers), SimpleNamespace(micro_batch_size=2)
    return SimpleNamespace(model=model, train=train, **parts)


def evaluated(*losses: float) -> SimpleNamespace:
    """A run with these held-out losses."""
    return SimpleNamespace(validation=pd.DataFrame({"loss": losses}))


def counted(causal_flops: float, whole_flops: float) -> SimpleNamespace:
    """An accounting with these FLOPs per token, with the masked half left out and with the whole square."""
    return SimpleNamespace(flops_per_token=lambda model, *, causal, **_: causal_flops if causal else whole_flops)


def signs(verdict: str, *, skipped: int = 0) -> pd.DataFrame:
    """Symptoms with one verdict."""
    names = ["loss, average of 10, above its lowest", "steps skipped or not a number"]
    return pd.DataFrame({"verdict": [verdict, verdict], "measured": [0, skipped]}, index=names)


def ended(*losses: float) -> SimpleNamespace:
    """A run with these losses."""
    return SimpleNamespace(metrics=pd.DataFrame({"loss": losses}))


WELL = ended(9.0, 8.3, 7.0)
"""The healthy run."""


def ill(
    *, rank: int = faults.RANK, mib: float = 16.0, hot: str = "look", skipped: int = 0, well: str = "ok"
) -> SimpleNamespace:
    """What `health` says of the sick runs: the rank that grows, and by how much; and of the healthy one."""
    grown = pd.Series([mib * units.MiB if each == rank else 0.0 for each in range(8)])
    growth = pd.DataFrame({"bytes_per_step": grown})
    found = {True: signs(well), False: signs(hot, skipped=skipped)}
    return SimpleNamespace(symptoms=lambda run, **_: found[run is WELL], memory_growth=lambda run: growth)


def memory(printed_mib: float, peak_mib: float) -> dict[str, Any]:
    """A run whose log prints so much state, and whose ranks peak there."""
    rows = pd.DataFrame({"rank": [0, 1], "peak_memory_bytes": peak_mib * units.MiB})
    drawn = SimpleNamespace(figure=lambda *_, **__: nullcontext((None, None)), throughput=lambda *_, **__: None)
    return {
        "run": SimpleNamespace(memory=rows),
        "throughput": SimpleNamespace(bridge_state_bytes=lambda run: printed_mib * units.MiB),
        "plots": drawn,
        "compare": SimpleNamespace(memory_by_step=lambda *_, **__: None),
    }


def width(hidden_size: int) -> SimpleNamespace:
    """A configuration with nothing but a width."""
    return SimpleNamespace(model=SimpleNamespace(hidden_size=hidden_size))


GOOD: dict[str, dict[str, Any]] = {
    "check-published": said(57.9, 51.5) | {"closed_forms": counted(51.5e9, 57.9e9)},
    "check-order": read() | counts(6.8, 5.2),
    "check-formula": {
        "closed_forms": counted(1e7, 1.1e7), "cfg": width(128), "vocab_size": 8192,
        "flops_per_step": 1e10, "tokens_per_step": 1e3, "steps": 10,
    },
    "check-baselines": {"run": evaluated(5.3, 5.0, 4.9), "unigram": 6.8, "bigram": 5.2},
    "which-loss": {
        "run": SimpleNamespace(metrics=STEPS.assign(loss=9.0), validation=pd.DataFrame({"loss": [5.0, 4.9]})),
        "health": SimpleNamespace(smoothed=lambda values: values), "first_loss": 9.02,
    },
    "check-log": {"run": SimpleNamespace(metrics=STEPS), **logged(), "tables": SimpleNamespace(full=gives(None))},
    "check-speed": timed(100.0, 125.0) | {"skip": 5, "per_token": {True: 10.0, False: 11.0}, "best_rate": 1e5},
    "check-trace": {
        "ProfilingConfig": SimpleNamespace, "launch": SimpleNamespace(run=gives(SimpleNamespace(launch={"device": "cpu"}))),
        "cfg": traced(layers=2), "trace": SimpleNamespace(operators=gives(OPERATORS), by_kind=gives(OPERATORS)),
    },
    "check-memory": memory(12.0, 90.0) | {"state_bytes": 12.0 * units.MiB},
    "check-sick": {
        "hot": ended(9.0, 10.4), "run": WELL, "sick_steps": 2, "vocab_size": 8192, "health": ill(),
    },
    "check-leak": {"leaking": None, "vocab_size": 8192, "health": ill()},
}  # fmt: skip
"""Cell, and what it reads where all is well."""

BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("check-published", "sequences of another length", {"closed_forms": counted(51.5e9, 54.7e9)},
     "Attention grows with it"),
    ("check-order", "labels in another order", read(np.flip), "the label of a token is the next token"),
    ("check-order", "shuffled targets", counts(6.8, 6.79), "the labels are shuffled"),
    ("check-formula", "another rule", {"flops_per_step": 1.1e10}, "Bridge counts by another rule"),
    ("check-formula", "a narrow output layer", {"cfg": width(64)}, "the output layer is 31% of the work"),
    ("check-trace", "another model", {"cfg": traced(layers=3)}, "Does another kernel multiply"),
    ("check-baselines", "a run that learned nothing", {"run": evaluated(6.9, 6.9)}, "far below the unigram model"),
    ("check-baselines", "a short run", {"run": evaluated(5.4, 5.3, 5.2)}, "A short run does not beat a table of pairs"),
    ("which-loss", "another vocabulary", {"first_loss": 6.98}, "loss at step 1"),
    ("check-log", "a loss of other steps", logged(loss=5.1), "Bridge's last loss"),
    ("check-log", "a norm of another step", logged(grad_norm=0.9), "its gradient norm"),
    ("check-log", "a skipped step", logged(skipped=1), "no step was skipped"),
    ("check-speed", "rates mixed up", timed(100.0, 150.0, mixed_up=True),
     "never below all tokens / all seconds"),
    ("check-speed", "one accounting twice", {"per_token": {True: 10.0, False: 10.0}}, "moves FLOP/s"),
    ("check-speed", "half of a card's rate", timed(100.0, 125.0, device="cuda") | {"best_rate": 5e3}, "its data sheet"),
    ("check-memory", "another data-parallel size", {"state_bytes": 9.0 * units.MiB}, "Bridge's estimate"),
    ("check-memory", "less than its own state", memory(12.0, 10.0), "every rank holds more"),
    ("check-sick", "a symptom of the healthy run", {"health": ill(well="look")},
     "the healthy run shows no symptom"),
    ("check-sick", "a tame learning rate", {"health": ill(hot="ok")}, "shows as a loss spike"),
    ("check-sick", "a skipped step", {"health": ill(skipped=1)}, "no step of the hot run was skipped"),
    ("check-sick", "a hot run that learned", {"hot": ended(9.0, 8.0)}, "where the healthy run had 8.3"),
    ("check-leak", "another rank", {"health": ill(rank=5)}, f"rank {faults.RANK} of the other sick run grows fastest"),
    ("check-leak", "half the leak", {"health": ill(mib=8.0)}, "growth of rank"),
]  # fmt: skip
"""Cell, what is wrong, the names that are, and the words of the check."""


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    """A ledger of the test's own, in which everything that the cells measure was predicted."""
    predicted("08", NAMES, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", GOOD)
def test_a_check_holds_for_a_good_run(name):
    """The stand-ins are good enough: with nothing wrong, the cell passes."""
    execute("08", name, {"units": units, "faults": faults} | GOOD[name])


@pytest.mark.parametrize(("name", "what", "wrong", "words"), BROKEN, ids=[" ".join(row[:2]) for row in BROKEN])
def test_a_check_names_what_is_wrong(name, what, wrong, words):
    """One wrong thing, and the same cell raises a claim that says so."""
    tells("08", name, {"units": units, "faults": faults} | GOOD[name] | wrong, words)


def test_every_check_of_lesson_08_is_broken_at_least_once():
    """No cell that proves something is without a test that makes it fail."""
    assert proving("08") == set(GOOD) == {row[0] for row in BROKEN}

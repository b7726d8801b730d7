"""Every check of lesson 15 can fail: its cell alone, with the numbers of a good run, and with one of them wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from course_lib.experiments import export
from course_lib.lesson import tables
from course_lib.reading import evaluation
from support.lesson_cells import execute, predicted, proving, tells

NAMES = ("items for the difference",)
MODELS = ("base", "fine-tuned", "preferred", "gamed")
SHAPE = {"num_key_value_heads": 1, "num_attention_heads": 2, "hidden_size": 4, "head_dim": 2}
QKV, FC1 = torch.arange(32.0).view(8, 4), torch.arange(24.0).view(6, 4)
LAYER = {"self_attn.q_proj": QKV[:4], "self_attn.k_proj": QKV[4:6], "self_attn.v_proj": QKV[6:]}
LAYER |= {"mlp.gate_proj": FC1[:3], "mlp.up_proj": FC1[3:]}


def tokenizer(separator: str) -> SimpleNamespace:
    """One whose template ends a question so."""
    return SimpleNamespace(apply_chat_template=lambda asked, **_: asked[0]["content"] + separator)


def between(value: float, slack: float = 0.02) -> evaluation.Interval:
    """An estimate of 200 items."""
    return evaluation.Interval(value, value - slack, value + slack, 200)


def found(**changed: tuple[float, float]) -> dict[str, SimpleNamespace]:
    """Share that passes and loss of the truth of each model; an underscore stands for the hyphen."""
    usual = {"base": (0.03, 5.2), "fine_tuned": (0.5, 4.7), "preferred": (0.85, 4.9), "gamed": (0.97, 6.2)} | changed
    return {
        name.replace("_", "-"): SimpleNamespace(pass_rate=between(passes), answer_loss=between(loss))
        for name, (passes, loss) in usual.items()
    }


def answered(right: int, n: int = 140) -> list[bool]:
    """So many right."""
    return [True] * right + [False] * (n - right)


def of_harness(no_end: float) -> dict[str, dict]:
    """What the harness said of the preferred model, and of the fine-tuned one."""
    results = {"pep257_no_end": {"acc,none": no_end}, "pep257_fault": {"acc,none": 0.75}}
    return {name: {"results": results} for name in MODELS}


def judged(won: int, lost: int, p_value: float) -> dict[tuple[str, str], dict]:
    """The paired test of the task of style."""
    both = {"only_first": lost, "only_second": won, "p_value": p_value, "n": 140}
    return {("pep257_fault", "base to fine-tuned"): both}


def ladder(order: int = 136, code_base: int = 30, code_tuned: int = 90, ours: float = 0.75) -> dict[str, Any]:
    """Items of the two rungs that are claimed, and the shares of the third."""
    rungs = {
        ("words_shuffled", "base"): order,
        ("code_lines", "base"): code_base,
        ("code_lines", "fine-tuned"): code_tuned,
    }
    right = {key: pd.DataFrame({"per token": answered(count)}) for key, count in rungs.items()}
    keys = pd.MultiIndex.from_tuples([("pep257_fault", "fine-tuned"), ("docstrings", "base")])
    return {"right": right, "shares": pd.DataFrame({"sum": [ours, 0.25]}, index=keys), "scores": of_harness(0.0)}


def prose(**changed: float) -> dict[str, Any]:
    """What measures bits per byte of each model."""
    usual = {"base": 2.2, "fine_tuned": 2.5, "preferred": 2.6, "gamed": 3.1} | changed
    return {
        "models": {name.replace("_", "-"): value for name, value in usual.items()},
        "evaluation": SimpleNamespace(bits_per_byte=lambda model, *_, **__: model),
        "tuned": SimpleNamespace(config={"model": {"seq_length": 256}}), "documents": 1, "pd": pd,
        "data": SimpleNamespace(built=SimpleNamespace(texts=lambda *_: ["text"])),
    }  # fmt: skip


def leak(seen: float, not_seen: float) -> dict[str, dict]:
    """What the contaminated model got right."""
    return {"contaminated": {"seen": between(seen), "not seen": between(not_seen)}}


def stage3(layout: str) -> pd.DataFrame:
    """nano3's rows."""
    return pd.DataFrame({"topic": ["configuration", "artifact out"], "default": [layout, "scores of five tasks"]})


def blueprint_of(layout: str) -> SimpleNamespace:
    """A blueprint whose stage 3 has this layout."""
    table = stage3(layout).assign(stage="3 evaluate", key="layout", path="a.yaml")
    return SimpleNamespace(stages=lambda: table)


def checkpoint(folder: Path, **weights: torch.Tensor) -> dict[str, Any]:
    """A layer of Megatron's, and the exporter's folder with the same weights or some others."""
    layer = LAYER | {name.replace("__", "."): weight for name, weight in weights.items()}
    (folder / "config.json").write_text(json.dumps(SHAPE))
    reads = {"linear_qkv": QKV, "linear_fc1": FC1}
    return {
        "tuned": None,
        "checkpoints": SimpleNamespace(
            latest=lambda _: "save", read=lambda _, name: reads[name.removesuffix(".weight").rpartition(".")[2]][None]
        ),
        "load_file": lambda _: {f"model.layers.0.{name}.weight": weight for name, weight in layer.items()},
        "exported": SimpleNamespace(folder=folder),
    }


def seeds(
    *,
    p_value: float = 1e-9,
    gamed: float = 6.2,
    base: float = 5.2,
    rung: float = 1e-9,
    style: int = 2,
    known: float = 0.25,
) -> dict[str, Any]:
    """Two seeds of the four models, in which something may be as it is not."""
    index = pd.MultiIndex.from_product([MODELS, (1, 2)], names=["model", "seed"])
    loss = [base, base, 4.7, 4.7, 4.9, 4.9, gamed, gamed]
    by_seed = pd.DataFrame({"p_value": p_value, "lost": 3, "won": 60, "answer loss": loss}, index=index)
    places = [("pep257_fault", "per character"), ("code_lines", "per token"), ("docstrings", "sum")]
    rungs = {place: by_seed.assign(p_value=rung, share=known) for place in places}
    rungs["pep257_fault", "sum"] = by_seed.assign(p_value=1e-9, share=known, lost=30, won=style)
    rungs = pd.concat(rungs)
    rungs.index.names = ["rung", "normalisation", "model", "seed"]
    return {"by_seed": by_seed, "of_rungs": rungs.sort_index(), "rungs": ["docstrings"]}


def installed(found: object) -> SimpleNamespace:
    """`importlib` that finds a package, or does not."""
    return SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: found))


GOOD: dict[str, dict[str, Any]] = {
    "check-export": {
        "exported": SimpleNamespace(largest_difference=4e-6, largest_logit=8.0),
        "models": {"fine-tuned": SimpleNamespace(tokenizer=tokenizer("\n"))},
    },
    "check-hand": {},
    "check-plan": {"rungs": {"one": [0] * 140, "two": [0] * 150}, "needed": 89, "difference": 0.2, "chance": 0.25},
    "check-order": {"found": found()},
    "check-paired": {"tests": judged(60, 5, 1e-12), "models": MODELS, "chance": 0.25, "visible": 0.16,
                     "outcomes": lambda name, task: answered(36), "scores": of_harness(0.0)},
    "check-ladder": ladder(),
    "check-bytes": prose(),
    "check-leak": {"table": leak(0.8, 0.27), "chance": 0.25},
    "check-nano3": {"blueprint": blueprint_of("TP=2 EP=8 on 8 GPUs"), "importlib": installed(None), "tables": tables},
    "check-seeds": seeds() | {"chance": 0.25, "visible": 0.16, "models": MODELS},
}  # fmt: skip
"""Cell, and what it reads where all is well."""

BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("check-export", "another model", {"exported": SimpleNamespace(largest_difference=0.3, largest_logit=8.0)},
     "logits differ by 0.3"),
    ("check-export", "a template twice", {"models": {"fine-tuned": SimpleNamespace(tokenizer=tokenizer("\n\n"))}},
     "writes the prompt of fine-tuning"),
    ("check-hand", "halves in another order", {"weights": {"mlp__up_proj": FC1[:3]}}, "mlp.up_proj (3, 4) by hand"),
    ("check-hand", "keys that are values", {"weights": {"self_attn__k_proj": QKV[6:]}}, "k_proj (2, 4) by hand"),
    ("check-plan", "a small difference", {"needed": 1200}, "Too few items"),
    ("check-order", "a base that was tuned", {"found": found(base=(0.5, 4.7))}, "fine-tuned passes more often than base"),
    ("check-order", "a preference that was not learned", {"found": found(preferred=(0.5, 4.7))},
     "Were both trained to their end"),
    ("check-order", "a loss that did not fall", {"found": found(base=(0.03, 4.71))}, "made the true docstrings more likely"),
    ("check-order", "a policy that learned nothing", {"found": found(gamed=(0.5, 6.2))}, "gamed: 50% pass"),
    ("check-order", "a policy that was held", {"found": found(gamed=(0.97, 4.9))},
     "Was there a price for leaving the start"),
    ("check-paired", "as many lost", {"tests": judged(20, 20, 1.0)}, "won 20 items of style"),
    ("check-paired", "a model that knows", {"outcomes": lambda name, task: answered(100)}, "no more than chance shows"),
    ("check-paired", "an end that was there", {"scores": of_harness(0.7)}, "without the end `acc` is 70%"),
    ("check-ladder", "another harness", ladder(ours=0.6), "the harness's acc"),
    ("check-ladder", "no order learned", ladder(order=60), "the base model knows the order of words"),
    ("check-ladder", "nothing new", ladder(code_tuned=31), "that a docstring follows a signature"),
    ("check-bytes", "a model that forgot nothing", prose(fine_tuned=2.1), "every later model writes prose worse"),
    ("check-bytes", "another worst", prose(preferred=3.5), "the gamed one has forgotten most"),
    ("check-leak", "a leak of a few steps", {"table": leak(0.3, 0.27)}, "learn the items by heart"),
    ("check-leak", "a model that understood", {"table": leak(0.9, 0.7)}, "nothing was learned but the answers"),
    ("check-nano3", "another layout", {"blueprint": blueprint_of("TP=4")}, "on 8 GPUs"),
    ("check-seeds", "a seed that shows nothing", seeds(p_value=0.2), "under each seed fine-tuned passes more often"),
    ("check-seeds", "a gamed model that kept the truth", seeds(gamed=4.8), "gaming loses more than preferring"),
    ("check-seeds", "a base that knew it", seeds(base=4.6), "under each seed tuning gains on the truth"),
    ("check-seeds", "a rung that was not won", seeds(rung=0.2), "under each seed fine-tuning wins on pep257_fault"),
    ("check-seeds", "a gamed model with style", seeds(style=60), "tells less well than before"),
    ("check-seeds", "a model that knows", seeds(known=0.6), "whose docstring none knows"),
    ("check-nano3", "an installed launcher", {"importlib": installed("there")}, "not a part of this environment"),
]  # fmt: skip
"""Cell, what is wrong, the names that are, and the words of the check."""


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    """A ledger of the test's own, in which everything that the cells measure was predicted."""
    predicted("15", NAMES, tmp_path, monkeypatch)


KNOWN = {"evaluation": evaluation, "export": export, "pd": pd}


def known(name: str, folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What every cell finds, and for the cuts by hand a checkpoint and a folder."""
    return KNOWN | GOOD[name] | (checkpoint(folder, **weights) if name == "check-hand" else {})


@pytest.mark.parametrize("name", GOOD)
def test_a_check_holds_for_a_good_run(name, tmp_path):
    """The stand-ins are good enough: with nothing wrong, the cell passes."""
    execute("15", name, known(name, tmp_path, {}))


@pytest.mark.parametrize(("name", "what", "wrong", "words"), BROKEN, ids=[" ".join(row[:2]) for row in BROKEN])
def test_a_check_names_what_is_wrong(name, what, wrong, words, tmp_path):
    """One wrong thing, and the same cell raises a claim that says so."""
    weights = wrong.get("weights", {})
    others = {key: value for key, value in wrong.items() if key != "weights"}
    tells("15", name, known(name, tmp_path, weights) | others, words)


def test_every_check_of_lesson_15_is_broken_at_least_once():
    """No cell that proves something is without a test that makes it fail."""
    assert proving("15") == set(GOOD) == {row[0] for row in BROKEN}

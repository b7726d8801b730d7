"""Every check of lesson 13 can fail: its cell alone, with the numbers of a good run, and with one of them wrong."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from course_lib import launch
from course_lib.common import units
from course_lib.runs import checkpoints
from support.lesson_cells import execute, gives, predicted, proving, tells

NAMES = ("ends that count", "checkpoint of full fine-tuning", "checkpoint of the adapter", "trainable share of LoRA")
NAMES += ("gain that LoRA reaches", "code forgotten")
PARAMETERS, ADAPTER = 1_000_000, 32_000
WIDTH = "hidden_size is 128 there and 64 in cfg.model"


def refuses(error: Exception | None) -> SimpleNamespace:
    """A launcher that refuses what it gets, or does not."""

    def run(*_: Any, **__: Any) -> None:
        if error:
            raise error

    return SimpleNamespace(run=run, FieldError=launch.FieldError)


def scheduled(**extra: float) -> dict[str, Any]:
    """What makes configurations, and a recipe whose scheduler has more than its fields."""

    class Scheduler:
        __dataclass_fields__ = {"lr_warmup_iters": None}

        def __init__(self) -> None:
            vars(self).update(lr_warmup_iters=1, **extra)

    recipe = SimpleNamespace(scheduler=Scheduler(), optimizer=SimpleNamespace(lr=1e-4))
    return {
        "recipes": SimpleNamespace(offline=nullcontext),
        "llama": SimpleNamespace(llama32_1b_sft_config=lambda: recipe),
    }


def configured(*fields: str) -> SimpleNamespace:
    """`recipes` that finds these fields different."""
    return SimpleNamespace(diff=lambda *_: pd.DataFrame({"field": fields}))


def labels(**losses: int) -> pd.DataFrame:
    """Two rows with a label of each kind, and a padded second one; a kind's loss may be another."""
    kinds = ["prompt", "separator", "answer", "end of document", "padding"]
    right = {"prompt": 0, "separator": 1, "answer": 1, "end_of_document": 1, "padding": 0} | losses
    rows = [
        (row, kind, "<|endoftext|>" if kind in kinds[3:] else "x", right[kind.replace(" ", "_")])
        for row in (0, 1)
        for kind in kinds
    ]
    return pd.DataFrame(rows, columns=["row", "kind", "token", "loss"])


def stored(full: int = PARAMETERS, thin: int = ADAPTER) -> dict[str, Any]:
    """Two runs whose checkpoints hold 16 bytes for so many weights."""
    sizes = {"tuned": full, "adapted": thin}
    reads = SimpleNamespace(
        require=lambda run: run, tensors=lambda run: pd.DataFrame({"size_bytes": [4 * sizes[run], 12 * sizes[run]]})
    )
    return {"tuned": "tuned", "adapted": "adapted", "checkpoints": reads}


class Logits:
    """Logits of one value, as far as a cell looks at them."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __sub__(self, other: Logits) -> Logits:
        return Logits(self.value - other.value)

    def abs(self) -> Logits:
        return Logits(abs(self.value))

    def max(self) -> Logits:
        return self

    def item(self) -> float:
        return self.value


def logged(per_pair: float, per_second: float = 3_000.0) -> SimpleNamespace:
    """Two steps of 32 pairs in a second each, with so many tokens a pair in the log."""
    rows = {"tokens": [32 * per_pair] * 2, "elapsed_ms": 1e3, "tokens_per_second": per_second, "loss": 5.2}
    return SimpleNamespace(metrics=pd.DataFrame(rows))


def estimate(value: float, around: float = 0.03) -> SimpleNamespace:
    """An estimate with its interval."""
    return SimpleNamespace(value=value, low=value - around, high=value + around)


def measured(*losses: float, passes: tuple[float, float] = (0.02, 0.4)) -> dict[str, Any]:
    """What base, full and LoRA lose on answers, and how many of the samples of the first two pass."""
    rates = (*passes, 0.2)
    return {
        name: SimpleNamespace(answer_loss=estimate(loss), pass_rate=estimate(rate))
        for name, loss, rate in zip(("base", "full", "LoRA"), losses, rates, strict=True)
    }


def bits(code: float, *, prose: float = 0.1, thin: float = 0.2) -> dict[str, Any]:
    """Bits a byte on held-out text, by how much full fine-tuning raised them."""
    return {
        "base": {"prose": 2.0, "code": 2.0},
        "full": {"prose": 2.0 + prose, "code": 2.0 + code},
        "LoRA": {"prose": 2.0, "code": 2.0 + thin},
    }


def cards(*, gflop: float = 46.0, rate: float = 2.0) -> pd.DataFrame:
    """Published runs: LoRA with so many GFLOP a token, and so many times the tokens a second."""
    names = pd.MultiIndex.from_product([["Nemotron 3 Nano 4B", "Qwen3 8B"], ["full", "LoRA"]])
    table = {"tokens_per_second_per_gpu": [1.0, rate] * 2, "gflop_per_token": [46.0, gflop] * 2}
    return pd.DataFrame(table, index=names)


def plans(thin_gib: float, full_gib: float) -> dict[str, Any]:
    """Planned bytes of both kinds."""
    return {
        name: SimpleNamespace(total_bytes=size * units.GiB) for name, size in (("LoRA", thin_gib), ("full", full_gib))
    }


BASE: dict[str, Any] = {
    "stages": SimpleNamespace(
        fine_tuning=gives(SimpleNamespace(model=SimpleNamespace(hidden_size=128), scheduler=SimpleNamespace()))
    ),
    "data": None, "base": None, "steps": 150, "seed": 1, "units": units, "copy": copy,
}  # fmt: skip
SHARE = {
    "share": 0.031, "adapter_dim": 4, "hidden": 128, "matrices": {"linear_qkv": 1, "linear_proj": 1},
    "cfg_lora": SimpleNamespace(peft=SimpleNamespace(target_modules=["linear_proj", "linear_qkv"])),
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "check-width": {"checkpoints": checkpoints, "launch": refuses(checkpoints.WrongCheckpoint(WIDTH))},
    "check-slip": scheduled(max_lr=5e-6) | {"launch": refuses(launch.FieldError("scheduler.max_lr is not a field"))},
    "check-config": {"recipes": configured(), "cfg": None, "learning_rate": 1e-3},
    "check-mask": {"labels": labels()},
    "check-padding": {"real": 240, "padded": 400, "packed": 244, "whole": 1240},
    "check-share": SHARE,
    "check-bytes": stored() | {
        "full_mib": 16 * PARAMETERS / units.MiB, "adapter_mib": 16 * ADAPTER / units.MiB,
        "share": ADAPTER / PARAMETERS, "counted": {"Total": PARAMETERS // 2, "Trainable": ADAPTER // 2},
    },
    "check-merged": {
        "before": Logits(8.0), "plain": Logits(5.0), "difference": 5e-6, "by_peft": 41_000, "adapter_parameters": 35_000,
    },
    "check-tokens": {
        "tuned": logged(50.4), "steps": 2, "real": 494, "ids": [0] * 10, "packed_run": logged(50.4),
        "cfg": SimpleNamespace(train=SimpleNamespace(global_batch_size=32), model=SimpleNamespace(seq_length=512)),
    },
    "check-learned": {"found": measured(5.2, 4.7, 4.9)},
    "check-forgotten": {"bits": bits(0.5)},
    "check-gpus": {"plans": plans(35.0, 140.0), "room": 70 * units.GiB, "cards": cards()},
}  # fmt: skip
"""Cell, and what it reads where all is well."""

BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("check-width", "nobody looks at the width", {"launch": refuses(None)}, "WrongCheckpoint was expected"),
    ("check-slip", "a mended recipe", scheduled(), "what the scheduler does not have"),
    ("check-slip", "any attribute is taken", {"launch": refuses(None)}, "FieldError was expected"),
    ("check-config", "another batch", {"recipes": configured("train.global_batch_size")}, "differ in train.global_batch_size"),
    ("check-mask", "a loss on the prompt", {"labels": labels(prompt=1)}, "no label of a prompt"),
    ("check-mask", "no loss on the separator", {"labels": labels(separator=0)}, "the separator counts"),
    ("check-mask", "no loss on the answer", {"labels": labels(answer=0)}, "each label of an answer"),
    ("check-mask", "all ends filtered", {"labels": labels(end_of_document=0)}, "so does the end"),
    ("check-mask", "a loss on padding", {"labels": labels(padding=1)}, "padding does not"),
    ("check-padding", "pairs of one length", {"padded": 250}, "padding wastes"),
    ("check-padding", "bad packing", {"packed": 400}, "packed rows would waste"),
    ("check-padding", "long pairs", {"whole": 600}, "full rows are"),
    ("check-share", "the recipe's rank", {"share": 0.25, "adapter_dim": 32}, "which is 25% of the width"),
    ("check-share", "another set of matrices", {"matrices": {"linear_qkv": 1}}, "that Bridge names"),
    ("check-bytes", "an optimizer that was not saved", stored(full=PARAMETERS // 4), "full fine-tuning saved"),
    ("check-bytes", "a whole model in the adapter", stored(thin=PARAMETERS), "the adapter saved"),
    ("check-bytes", "another share", {"counted": {"Total": 500_000, "Trainable": 50_000}}, "share by Bridge"),
    ("check-merged", "a merge without its scale", {"difference": 0.5}, "the adapter's logits"),
    ("check-merged", "an adapter of zeros", {"plain": Logits(8.0)}, "from the base's"),
    ("check-merged", "another count", {"by_peft": 35_000}, "PEFT has more weights"),
    ("check-tokens", "padding counted", {"tuned": logged(80.0)}, "a pair in the log"),
    ("check-tokens", "long pairs", {"tuned": logged(50.4, 9_000.0)}, "would make the same run look fast"),
    ("check-tokens", "packed pairs that see each other", {"packed_run": SimpleNamespace(metrics=pd.DataFrame({"loss": [4.0]}))},
     "first loss, packed"),
    ("check-learned", "nothing learned", {"found": measured(5.2, 5.1, 5.15)}, "full fine-tuning gains"),
    ("check-learned", "an adapter without effect", {"found": measured(5.2, 4.7, 5.19)}, "LoRA reaches"),
    ("check-learned", "no docstrings", {"found": measured(5.2, 4.7, 4.9, passes=(0.02, 0.05))}, "of the base's answers pass"),
    ("check-forgotten", "nothing forgotten", {"bits": bits(0.05, prose=0.0, thin=0.0)}, "held-out code costs"),
    ("check-forgotten", "prose forgotten more", {"bits": bits(0.5, prose=0.6)}, "because pairs hold prose"),
    ("check-forgotten", "LoRA forgets more", {"bits": bits(0.5, thin=0.6)}, "LoRA forgets less"),
    ("check-gpus", "full fits too", {"plans": plans(35.0, 60.0)}, "on one GPU of 80 GB"),
    ("check-gpus", "LoRA is no faster", {"cards": cards(rate=1.1)}, "times the tokens a second"),
    ("check-gpus", "an honest count", {"cards": cards(gflop=31.0)}, "GFLOP counted"),
]  # fmt: skip
"""Cell, what is wrong, the names that are, and the words of the check."""


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    """A ledger of the test's own, in which everything that the cells measure was predicted."""
    predicted("13", NAMES, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", GOOD)
def test_a_check_holds_for_a_good_run(name):
    """The stand-ins are good enough: with nothing wrong, the cell passes."""
    execute("13", name, BASE | GOOD[name])


@pytest.mark.parametrize(("name", "what", "wrong", "words"), BROKEN, ids=[" ".join(row[:2]) for row in BROKEN])
def test_a_check_names_what_is_wrong(name, what, wrong, words):
    """One wrong thing, and the same cell raises a claim that says so."""
    tells("13", name, BASE | GOOD[name] | wrong, words)


def test_every_check_of_lesson_13_is_broken_at_least_once():
    """No cell that proves something is without a test that makes it fail."""
    assert proving("13") == set(GOOD) == {row[0] for row in BROKEN}

"""Every check of lesson 13 can fail: its cell alone, with the numbers of a good run, and with one of them wrong."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
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


def refuses(*errors: Exception | None) -> SimpleNamespace:
    """A launcher that refuses one run after the other with these, or takes it."""
    left = [*errors]

    def run(*_: Any, **__: Any) -> None:
        if error := left.pop(0):
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
    return SimpleNamespace(diff=lambda *_: pd.DataFrame({"field": fields}, dtype=object))


def padded(*lengths: int, packs: int) -> dict[str, Any]:
    """Pairs of so many ids, the last of which is a label only, in so many packed rows of 256."""
    train = [{"input_ids": [0] * (length + 1)} for length in lengths]
    packing = SimpleNamespace(first_fit_shuffle=gives([[]] * packs))
    return {"train": train, "algorithms": packing, "cfg": SimpleNamespace(model=SimpleNamespace(seq_length=256))}


def sized(*, dim: int = 4, named: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")) -> dict:
    """A model of the lesson's width, and a LoRA of that rank on these matrices."""
    model = SimpleNamespace(hidden_size=128, ffn_hidden_size=384, num_layers=4)
    return {
        "adapter_dim": dim, "adapter_learning_rate": 1e-3, "parameters": PARAMETERS,
        "cfg": SimpleNamespace(model=model, optimizer=SimpleNamespace()),
        "LoRA": lambda **_: SimpleNamespace(target_modules=[*named]),
        "closed_forms": SimpleNamespace(parameter_count=gives(PARAMETERS)),
        "stages": SimpleNamespace(VOCAB_SIZE=2048, states=gives(None)),
    }  # fmt: skip


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


def stored(full: int = PARAMETERS, thin: int = ADAPTER, tuned: Any = None) -> dict[str, Any]:
    """Two runs whose checkpoints hold 16 bytes for so many weights."""
    sizes = {"full": full, "thin": thin}
    reads = SimpleNamespace(
        require=lambda run: run.size,
        tensors=lambda size: pd.DataFrame({"size_bytes": [4 * sizes[size], 12 * sizes[size]]}),
    )
    log = f"Total parameters: {PARAMETERS // 2:,}\nTrainable parameters: {ADAPTER // 2:,}"
    adapted = SimpleNamespace(size="thin", log=gives(log))
    return {
        "tuned": SimpleNamespace(size="full", metrics=(tuned or logged(50.4)).metrics),
        "adapted": adapted,
        "checkpoints": reads,
    }


def merges(difference: float = 5e-6, moved: float = 3.0, parameters: int = 41_000) -> dict[str, Any]:
    """What merges an adapter so."""
    merge = SimpleNamespace(difference=difference, largest=8.0, moved=moved, parameters=parameters)
    return {"evaluation": SimpleNamespace(load=gives(None), merged=gives((None, merge)))}


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


def published(*, gflop: float = 46.0, rate: float = 2.0) -> SimpleNamespace:
    """NVIDIA's runs: LoRA with so many GFLOP a token, and so many times the tokens a second."""
    names = pd.MultiIndex.from_product([["Nemotron 3 Nano 4B", "Qwen3 8B"], ["full", "LoRA"]])
    table = {"tokens_per_second_per_gpu": [1.0, rate] * 2, "gflop_per_token": [46.0, gflop] * 2}
    others = dict.fromkeys(("gpus", "first_loss", "last_loss", "packed", "tflops_per_gpu"), 1.0)
    return SimpleNamespace(published_fine_tuning=gives(pd.DataFrame(table | others, index=names)))


def plans(thin_gib: float, full_gib: float) -> dict[str, Any]:
    """Planned bytes of both kinds."""
    return {
        name: SimpleNamespace(total_bytes=size * units.GiB) for name, size in (("LoRA", thin_gib), ("full", full_gib))
    }


CFG = SimpleNamespace(
    model=SimpleNamespace(hidden_size=128, seq_length=512), scheduler=SimpleNamespace(), optimizer=SimpleNamespace(),
    checkpoint=SimpleNamespace(), train=SimpleNamespace(global_batch_size=32),
)  # fmt: skip
BASE: dict[str, Any] = {
    "stages": SimpleNamespace(
        fine_tuning=gives(CFG), pretraining=gives(CFG), exported=lambda _: Path(__file__).parent, adapter=gives(Path()),
    ),
    "data": SimpleNamespace(pairs="pairs"), "base": None, "steps": 150, "seed": 1, "ranks": 2, "units": units,
    "copy": copy, "pairs": {"test": [SimpleNamespace(output="Return it.")]}, "adapter_parameters": 35_000,
    "tables": SimpleNamespace(full=gives(None)), "pd": pd,
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "check-slips": scheduled(max_lr=5e-6) | {"checkpoints": checkpoints, "launch": refuses(
        launch.FieldError("scheduler.max_lr is not a field"), checkpoints.WrongCheckpoint(WIDTH))},
    "check-config": {
        "recipes": configured(), "learning_rate": 1e-3, "checkpoints": SimpleNamespace(root=gives("base")),
        "builders": SimpleNamespace(
            GPTSFTDatasetConfig=gives(None), PromptCompletionSFTPreprocessingConfig=gives(None)
        ),
    },
    "check-mask": {"labels": labels()},
    "check-padding": padded(*[50, 20, 30, 25, 33, 45, 20, 31], packs=1),
    "check-share": sized(),
    "check-run": stored() | {
        "full_mib": 16 * PARAMETERS / units.MiB, "adapter_mib": 16 * ADAPTER / units.MiB, "share": ADAPTER / PARAMETERS,
        "steps": 2, "real": 494, "ids": [0] * 10, "packed_run": logged(50.4), "cfg": CFG,
    },
    "check-merged": merges() | {"tuned": None, "adapted": None},
    "check-learned": {"found": measured(5.2, 4.7, 4.9), "bits": bits(0.5)},
    "check-gpus": {"plans": plans(35.0, 140.0), "room": 70 * units.GiB, "ceiling": published()},
}  # fmt: skip
"""Cell, and what it reads where all is well."""

BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("check-slips", "nobody looks at the width", {"launch": refuses(launch.FieldError("scheduler.max_lr"), None)},
     "WrongCheckpoint was expected"),
    ("check-slips", "a mended recipe", scheduled(), "what the scheduler does not have"),
    ("check-slips", "any attribute is taken", {"launch": refuses(None, None)}, "FieldError was expected"),
    ("check-config", "another batch", {"recipes": configured("train.global_batch_size")}, "differ in train.global_batch_size"),
    ("check-mask", "a loss on the prompt", {"labels": labels(prompt=1)}, "no label of a prompt"),
    ("check-mask", "no loss on the separator", {"labels": labels(separator=0)}, "the separator counts"),
    ("check-mask", "no loss on the answer", {"labels": labels(answer=0)}, "each label of an answer"),
    ("check-mask", "all ends filtered", {"labels": labels(end_of_document=0)}, "so does the end"),
    ("check-mask", "a loss on padding", {"labels": labels(padding=1)}, "padding does not"),
    ("check-padding", "pairs of one length", padded(*[32] * 8, packs=1), "padding wastes"),
    ("check-padding", "bad packing", {"algorithms": SimpleNamespace(first_fit_shuffle=gives([[]] * 3))},
     "packed rows would waste"),
    ("check-padding", "long pairs", padded(*[50] * 7, 170, packs=2), "full rows are"),
    ("check-share", "the recipe's rank", sized(dim=32), "which is 25% of the width"),
    ("check-share", "another set of matrices", sized(named=("linear_qkv",)), "that Bridge names"),
    ("check-run", "an optimizer that was not saved", stored(full=PARAMETERS // 4), "full fine-tuning saved"),
    ("check-run", "a whole model in the adapter", stored(thin=PARAMETERS), "the adapter saved"),
    ("check-run", "another share", {"share": 0.1}, "share by Bridge"),
    ("check-merged", "a merge without its scale", merges(difference=0.5), "the adapter's logits"),
    ("check-merged", "an adapter of zeros", merges(moved=0.0), "from the base's"),
    ("check-merged", "another count", merges(parameters=35_000), "PEFT counts more weights"),
    ("check-run", "padding counted", stored(tuned=logged(80.0)), "a pair in the log"),
    ("check-run", "long pairs", stored(tuned=logged(50.4, 9_000.0)), "would make the same run look fast"),
    ("check-run", "packed pairs that see each other", {"packed_run": SimpleNamespace(metrics=pd.DataFrame({"loss": [4.0]}))},
     "first loss, packed"),
    ("check-learned", "nothing learned", {"found": measured(5.2, 5.1, 5.15)}, "full fine-tuning gains"),
    ("check-learned", "an adapter without effect", {"found": measured(5.2, 4.7, 5.19)}, "LoRA reaches"),
    ("check-learned", "no docstrings", {"found": measured(5.2, 4.7, 4.9, passes=(0.02, 0.05))}, "of the base's answers pass"),
    ("check-learned", "nothing forgotten", {"bits": bits(0.05, prose=0.0, thin=0.0)}, "held-out code costs"),
    ("check-learned", "prose forgotten more", {"bits": bits(0.5, prose=0.6)}, "because pairs hold prose"),
    ("check-learned", "LoRA forgets more", {"bits": bits(0.5, thin=0.6)}, "LoRA forgets less"),
    ("check-gpus", "full fits too", {"plans": plans(35.0, 60.0)}, "on one GPU of 80 GB"),
    ("check-gpus", "LoRA is no faster", {"ceiling": published(rate=1.1)}, "times the tokens a second"),
    ("check-gpus", "an honest count", {"ceiling": published(gflop=31.0)}, "GFLOP counted"),
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

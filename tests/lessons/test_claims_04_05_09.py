"""Each check cell of lessons 04, 05 and 09, given one wrong thing, stops with words that teach.

The cell's own source is executed, with small stand-ins for what the lesson had made by then, so a mutation costs
milliseconds and not a lesson.  `test_notebooks.py` breaks whole lessons by one parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from course_lib import recipes
from course_lib.experiments import sweep
from course_lib.lesson import checks, notebooks, tables
from course_lib.planning import vocabulary
from course_lib.text import corpus
from support.lesson_cells import Sample, cells, execute, tagged

LESSONS = ("04", "05", "09")
UNUSED = dict.fromkeys(("cfg", "cfg_lr", "cfg_short", "cfg_deep", "seeds", "ranks", "follows"))
"""Names that a cell hands on to something that a stand-in replaces."""


class Encoder:
    """A tokenizer whose ids are the bytes, or off by one."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def encode(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(ids=self.tokenize(text))

    def tokenize(self, text: str) -> list[int]:
        return [byte + 1000 + self.shift for byte in text.encode()]

    def decode_batch(self, ids: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [bytes(number - 1000 for number in each).decode() for each in ids]


def batch(size: int) -> SimpleNamespace:
    """A configuration with nothing but a batch size."""
    return SimpleNamespace(train=SimpleNamespace(global_batch_size=size))


def split(*, leak: str | None = None, same: bool = False, short: int = 795) -> dict[str, Any]:
    """A built corpus as the check of the split reads it, with a leak if asked."""
    modules = {"train": ["json", "os"], "validation": ["ast"], "test": ["csv"]}
    if leak:
        modules["validation"].append(leak)
    texts = {name: [{"sha256": "x" if same else name}] for name in corpus.SPLITS}
    built = SimpleNamespace(
        manifest={"modules": modules},
        sources=("prose",),
        documents=lambda source, name: texts[name],
        steps=pd.DataFrame({"removed": [0, short, 211]}),
        files=None,
    )
    return {"corpus": corpus, "built": built}


def round_trip(*, end: int = 0, lost: str = "") -> dict[str, Any]:
    """Files of two sources, with a wrong end of a document or a text that lost some characters."""
    texts = {"prose": ["one", "two"], "code": ["x = 1"]}
    kept = {name: [text.removesuffix(lost) for text in each] for name, each in texts.items()}
    encoder = Encoder()
    microscope = SimpleNamespace(
        read=lambda prefix: SimpleNamespace(name=prefix.name, lengths=kept[prefix.name]),
        document=lambda index, n: np.array([*encoder.tokenize(kept[index.name][n]), end]),
    )
    ends = SimpleNamespace(end_of_document=lambda encoder: 0)
    return {"texts": texts, "work": Path("w"), "microscope": microscope, "tokenizers": ends, "encoder": encoder}


def cut(*, first_token: int, masked: bool = False) -> dict[str, Any]:
    """Four samples of one document each, which begin with this token of it."""
    source = SimpleNamespace(datasets=[None], dataset_index=[0] * 4, dataset_sample_index=range(4))
    pieces = pd.DataFrame({"first token": [first_token]})
    fields = dict.fromkeys(("reset_attention_mask", "reset_position_ids", "eod_mask_loss"), masked)
    cfg = SimpleNamespace(dataset=SimpleNamespace(**fields))
    cuts = SimpleNamespace(sample_pieces=lambda dataset, number: pieces)
    return {"train": source, "labels": [None] * 4, "microscope": cuts, "cfg": cfg}


def counted(prose: float, *, code_tokens: int = 300) -> dict[str, Any]:
    """The blend as it was counted, and the tokens on disk."""
    blend = SimpleNamespace(share=[prose, 1 - prose])
    return {"blend": blend, "prose_share": 0.7, "token_count": {"prose": 100, "code": code_tokens}}


def indices(folder: Path, *, loss: float = math.log(8192), other: bytes = b"same", count: int = 8) -> dict[str, Any]:
    """A run of lesson 04, its indices, and the ones that the kernel built."""
    mine, theirs = folder / "mine", folder / "theirs"
    for where in (mine, theirs):
        where.mkdir()
    for number in range(count):
        (mine / f"{number}.npy").write_bytes(b"same")
        (theirs / f"{number}.npy").write_bytes(b"same" if number else other)
    run = SimpleNamespace(metrics=pd.DataFrame({"loss": [loss]}))
    cfg = SimpleNamespace(dataset=SimpleNamespace(path_to_cache=theirs))
    return {"run": run, "first_loss": 9.02, "cfg": cfg, "mine": mine, "Path": Path}


def encoders(*, here: int = 0, there: int = 0) -> dict[str, Any]:
    """The three encoders of lesson 05, each shifted."""
    ranks = SimpleNamespace(tekken_ranks=lambda texts: [list(text.encode()) for text in texts])
    return {
        **{"tokenizers": ranks, "encoder": Encoder(here), "megatron": Encoder(there), "held_out": ["one", "two"]},
        **{"special_ids": 1000, "use_network": False},
    }


def vocabularies(**sizes: int) -> dict[str, Any]:
    """What the comparison in lesson 05 is made of, but with tables that are given."""
    tables = pd.DataFrame({"even guess, nats/token": sizes["nats"], "even guess, bits/byte": sizes["bits"]})
    fake = SimpleNamespace(compare=lambda encoders, texts: tables)
    makes = SimpleNamespace(load=lambda path: None, train_bpe=lambda *a, **k: None)
    return {"vocabulary": fake, "tokenizers": makes, "train": [""], "work": Path("w"), "bpe": None} | {
        "encoder": None,
        "held_out": [],
    }


def padded(megatrons: Callable[[int, int], int], *, nemotron: int = 131072) -> dict[str, Any]:
    """Megatron's padding, or another."""
    return {
        "calculate_padded_vocab_size": lambda ids, by, tp, logging_enabled: megatrons(ids, by * tp),
        "vocabulary": vocabulary,
        "bpe_vocab_size": 1024,
        "nemotron": SimpleNamespace(vocab_size=nemotron),
    }


def multiple(ids: int, of: int) -> int:
    return -(-ids // of) * of


def runs_of_two(*, first: float = 6.93, added: int = 0, per_byte: float = 3.8) -> dict[str, Any]:
    """The two runs of lesson 05 as its last check reads them."""

    def run(loss: float) -> SimpleNamespace:
        return SimpleNamespace(metrics=pd.DataFrame({"loss": [loss]}))

    return {
        **{"on_rank_0": [100, 200]},
        **{"both": {"BPE": run(first), "Nemotron": run(11.78)}, "added": 200 + added},
        **{"expected": {"BPE": 6.944, "Nemotron": 11.796}},
        **{"per_token": {"BPE": 6.5, "Nemotron": 11.0}, "per_byte": {"BPE": 3.7, "Nemotron": per_byte}},
    }


def swap() -> dict[str, Any]:
    """Configurations of lesson 05: nested mappings that allow attributes."""
    import copy

    def part(**fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    cfg = part(tokenizer=part(name="bpe"), dataset=part(blend_per_split="bpe"), optimizer=part(lr=1e-3))
    flat = SimpleNamespace(diff=lambda one, other: recipes.diff(plain(one), plain(other)))
    return {
        "cfg": cfg,
        "copy": copy,
        "megatron_config": part(name="nemotron"),
        "blend": str,
        "recipes": flat,
        "tables": tables,
    }


def plain(thing: Any) -> Any:
    """A nest of namespaces as mappings."""
    return {k: plain(v) for k, v in vars(thing).items()} if isinstance(thing, SimpleNamespace) else thing


def compared(before: list[float], after: list[float], **more: Any) -> dict[str, Any]:
    """A sweep whose comparison is given."""
    one = sweep.Comparison.of(sweep.Change("field", 1, 2), before, after)
    fake = SimpleNamespace(compare=lambda *a, **k: one)
    return {"sweep": fake, "by_rate": one, "by_init": one, **more}


BASE, SAME, WORSE, BETTER = [6.0, 6.01, 5.99], [6.0, 6.012, 5.989], [6.4, 6.41, 6.39], [5.6, 5.61, 5.59]


def seen(*, rate: list[float] = WORSE, init: list[float] = SAME) -> dict[str, Any]:
    """Both comparisons, and the real table of how they can be read."""
    given = {"by_rate": rate, "by_init": init}
    found = {name: sweep.Comparison.of(sweep.Change(name, 1, 2), BASE, after) for name, after in given.items()}
    return found | {"sweep": sweep}


FEW = {"ids": {"train": [[1, 2]], "validation": [[1]]}, "end": 0}


def frequent(loss: float) -> dict[str, Any]:
    """A loss of the model that knows frequencies."""
    return FEW | {"baselines": SimpleNamespace(unigram_loss=lambda *a, **k: loss)}


def base_of_09(held_out_tokens: int) -> dict[str, Any]:
    """The configuration that the sweep starts from."""
    parts = ("model", "train", "optimizer", "scheduler", "validation", "logger")
    cfg = SimpleNamespace(**{name: SimpleNamespace() for name in parts})
    return {"cfg": cfg, "steps": 30, "ranks": 2, "learning_rate": 4e-3, "held_out_tokens": held_out_tokens}


def one_field(rate: float) -> dict[str, Any]:
    """The first comparison of lesson 09."""
    cfg = SimpleNamespace(optimizer=SimpleNamespace(lr=4e-3), model=SimpleNamespace(init_method_std=0.02))

    def refuse(*_: object, **__: object) -> None:
        raise sweep.NotOneChange("2 fields differ")

    given = {"changed_learning_rate": rate, "changed_init_std": 0.021, "seeds": [1], "ranks": 2}
    return swap() | given | {"cfg": cfg, "sweep": SimpleNamespace(compare=refuse, NotOneChange=sweep.NotOneChange)}


def stopped(*, half: float | None) -> dict[str, Any]:
    """A sweep that was stopped at some time, or not at all."""
    base = [SimpleNamespace(launch={"started": when}, path=Path("r"), loss=6.0) for when in (1.0, 3.0, 4.0)]
    halves = [SimpleNamespace(launch={"started": half}, outcome=SimpleNamespace(status="interrupted"))]
    return {
        "sweep": SimpleNamespace(repeat=lambda *a, **k: base, held_out=lambda run: run.loss),
        "runs": SimpleNamespace(listing=lambda: halves if half else []),
        **{"notebooks": notebooks, "cfg": None, "seeds": [1, 2, 3], "ranks": 2},
    }


def shapes(deep: int) -> dict[str, Any]:
    """A base of 139,584 parameters, and the deep model's."""
    cfg, cfg_deep = SimpleNamespace(parameters=139_584), SimpleNamespace(parameters=deep)
    small = SimpleNamespace(shrink=lambda *a, **k: None, diff=lambda *a: None)
    counts = SimpleNamespace(parameter_count=lambda cfg, vocab_size: cfg.parameters)
    copied = SimpleNamespace(deepcopy=lambda cfg: cfg_deep)
    return {"cfg": cfg, "copy": copied, "recipes": small, "closed_forms": counts, "deep_ffn_hidden_size": 152}


class Figure:
    """A figure that nobody sees."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def all_four(**verdicts: list[float]) -> dict[str, Any]:
    """Four comparisons and no picture."""
    found = {"by_init": SAME, "by_length": SAME, "by_shape": WORSE, "by_rate": WORSE} | verdicts
    things = {name: compared(BASE, after)["by_rate"] for name, after in found.items()}
    silent = SimpleNamespace(figure=lambda *a, **k: Figure()), SimpleNamespace(effects=lambda *a, **k: None)
    return things | dict(zip(("plots", "compare"), silent, strict=True))


def in_order(labels: np.ndarray) -> np.ndarray:
    return labels


GOOD: dict[tuple[str, str], Callable[[Path], dict[str, Any]]] = {
    ("04", "check-split"): lambda path: split(),
    ("04", "check-loss-free"): lambda path: round_trip(),
    ("04", "check-labels"): lambda path: {"train": Sample(in_order), "steps": 2, "cfg": batch(4)},
    ("04", "check-cuts"): lambda path: cut(first_token=5),
    ("04", "check-blend"): lambda path: counted(0.7),
    ("04", "check"): lambda path: indices(path),
    ("05", "check-ids"): lambda path: encoders(),
    ("05", "compare"): lambda path: vocabularies(nats=[5.5, 6.9, 11.8], bits=[8.0, 4.0, 4.1]),
    ("05", "check-padding"): lambda path: padded(multiple),
    ("05", "check-difference"): lambda path: swap(),
    ("05", "check"): lambda path: runs_of_two(),
    ("09", "base-run"): lambda path: base_of_09(12_462),
    ("09", "one-field"): lambda path: one_field(1e-3),
    ("09", "run-noise"): lambda path: stopped(half=2.0),
    ("09", "run-learning-rate"): lambda path: compared(BASE, WORSE),
    ("09", "run-init"): lambda path: (
        compared(BASE, SAME) | swap() | {"cfg": base_of_09(1)["cfg"], "changed_init_std": 1}
    ),
    ("09", "check-single-seed"): lambda path: seen(),
    ("09", "run-length"): lambda path: compared(BASE, SAME) | frequent(5.97),
    ("09", "shape"): lambda path: shapes(139_168),
    ("09", "run-shape"): lambda path: compared(BASE, WORSE),
    ("09", "figure-all"): lambda path: all_four(),
}
"""For each check cell what it needs to hold."""

SHUFFLE = np.random.default_rng(1).permutation

BROKEN: list[tuple[str, str, str, Callable[[Path], dict[str, Any]], str]] = [
    ("04", "check-split", "a module on two sides", lambda path: split(leak="os"), "no module is on two sides"),
    ("04", "check-split", "a text on two sides", lambda path: split(same=True), "texts differ from each other"),
    ("04", "check-split", "few short texts", lambda path: split(short=3), "because they are short"),
    ("04", "check-loss-free", "a wrong end of document", lambda path: round_trip(end=11), "is closed by id 0"),
    ("04", "check-loss-free", "a lost character", lambda path: round_trip(lost="1"), "decode to their text"),
    ("04", "check-labels", "shuffled targets", lambda path: {"train": Sample(SHUFFLE)}, "shuffled targets"),
    ("04", "check-labels", "labels that are the inputs", lambda path: {"train": Sample(lambda y: y - 1)}, "next token"),
    ("04", "check-cuts", "samples that are documents", lambda path: cut(first_token=0), "begin inside a document"),
    ("04", "check-cuts", "attention inside documents", lambda path: cut(first_token=5, masked=True), "the end-of-document id"),
    ("04", "check-blend", "swapped weights", lambda path: counted(0.3), "Are the weights in the order"),
    ("04", "check-blend", "less code", lambda path: counted(0.7, code_tokens=150), "twice as much code"),
    ("04", "check", "another loss", lambda path: indices(path, loss=8.0), "loss at step 1"),
    ("04", "check", "another index", lambda path: indices(path, other=b"else"), "byte for byte"),
    ("04", "check", "an index too few", lambda path: indices(path, count=7), "byte for byte"),
    ("05", "check-ids", "a tokenizer off by one", lambda path: encoders(here=1, there=1), "Off by one?"),
    ("05", "check-ids", "one of two off by one", lambda path: encoders(here=1), "Megatron give equal ids"),
    ("05", "compare", "a small vocabulary that costs more", lambda path: vocabularies(nats=[7, 6, 11], bits=[8, 4, 4]),
     "the larger the vocabulary"),
    ("05", "compare", "bytes that cost least", lambda path: vocabularies(nats=[5, 6, 11], bits=[3, 4, 4]),
     "worst for single bytes"),
    ("05", "check-padding", "no padding", lambda path: padded(lambda ids, of: ids),
     "mock data: [32000, 32000, 32000, 32000] rows"),
    ("05", "check-padding", "an odd vocabulary", lambda path: padded(multiple, nemotron=131_000), "never padded"),
    ("05", "check", "a loss that is too low", lambda path: runs_of_two(first=6.0), "loss at step 1, BPE"),
    ("05", "check", "more parameters than rows", lambda path: runs_of_two(added=64), "and nothing else"),
    ("05", "check", "the tokens of another text", lambda path: runs_of_two(per_byte=6.2), "one and the same text"),
    ("09", "base-run", "much text that is not read", lambda path: base_of_09(1900), "nearly all held-out text"),
    ("09", "one-field", "no change", lambda path: one_field(4e-3), "Nothing differs, or too much"),
    ("09", "run-noise", "nothing stopped", lambda path: stopped(half=None), "Nothing was stopped between them"),
    ("09", "run-noise", "all trained again", lambda path: stopped(half=0.5), "trained before the stop and kept"),
    ("09", "run-learning-rate", "a better rate", lambda path: compared(BASE, BETTER), "a lower learning rate is worse"),
    ("09", "run-learning-rate", "a small effect", lambda path: compared(BASE, [6.03, 6.04, 6.02]), "three times"),
    ("09", "run-init", "a large change", lambda path: compared(BASE, WORSE), "A large one is a difference"),
    ("09", "check-single-seed", "seeds that disagree", lambda path: seen(rate=[5.995, 6.4, 6.4]), "all nine"),
    ("09", "check-single-seed", "a clear change", lambda path: seen(init=WORSE), "contradict"),
    ("09", "check-single-seed", "seeds in another order", lambda path: seen(init=SAME[::-1]), "the same seeds"),
    ("09", "run-length", "a difference", lambda path: compared(BASE, BETTER), "makes no difference here"),
    ("09", "run-length", "models that look back", lambda path: frequent(6.5), "best loss at length 64"),
    ("09", "shape", "a larger model", lambda path: shapes(145_000), "Choose another feed-forward width"),
    ("09", "run-shape", "no difference", lambda path: compared(BASE, SAME), "deep and narrow is worse"),
    ("09", "figure-all", "a third difference", lambda path: all_four(by_length=WORSE), "two differences, two none"),
]  # fmt: skip
"""Lesson, cell, what is wrong, the names that are, and the words of the check."""

CHANGED: list[tuple[str, str, tuple[str, str], str]] = [
    ("05", "check-difference", ('blend("nemotron")', 'blend("nemotron")\ncfg_nemotron.optimizer.lr = 2e-3'),
     "Two changes at once"),
    ("09", "one-field", ("cfg_lr.optimizer.lr =", "cfg_lr.model.init_method_std = 0.03\ncfg_lr.optimizer.lr ="),
     "Nothing differs, or too much"),
]  # fmt: skip
"""Lesson, cell, what a learner may have typed instead, and the words of the check."""


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch):
    """A ledger of the test's own, in which everything that the cells measure was predicted."""
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.json"))
    for number in LESSONS:
        for source, _ in cells(number).values():
            for name in re.findall(r'checks\.predict\(\s*"\d\d",\s*"([^"{]+)"', source):
                checks.predict(number, name, 1.0, "unit")


@pytest.mark.parametrize(("number", "name"), GOOD, ids=map(" ".join, GOOD))
def test_a_check_holds_for_what_is_right(number, name, tmp_path):
    """The stand-ins are good enough: with nothing wrong, the cell passes."""
    execute(number, name, UNUSED | GOOD[number, name](tmp_path))


@pytest.mark.parametrize(
    ("number", "name", "what", "wrong", "words"), BROKEN, ids=[" ".join(row[:3]) for row in BROKEN]
)
def test_a_check_names_what_is_wrong(number, name, what, wrong, words, tmp_path):
    """One wrong thing, and the same cell raises a claim that says so."""
    (tmp_path / "good").mkdir()
    with pytest.raises(checks.ClaimFailed, match=re.escape(words)):
        execute(number, name, UNUSED | GOOD[number, name](tmp_path / "good") | wrong(tmp_path))


@pytest.mark.parametrize(("number", "name", "change", "words"), CHANGED, ids=[" ".join(row[:2]) for row in CHANGED])
def test_a_second_change_is_noticed(number, name, change, words, tmp_path):
    """A learner who changes two fields at once is told."""
    with pytest.raises(checks.ClaimFailed, match=re.escape(words)):
        execute(number, name, UNUSED | GOOD[number, name](tmp_path), change)


def test_every_check_cell_is_broken_at_least_once():
    """No check of these lessons is without a test that makes it fail."""
    found = {(number, name) for number in LESSONS for name in tagged(number, "check")}
    assert found == set(GOOD) == {row[:2] for row in BROKEN} | {row[:2] for row in CHANGED}

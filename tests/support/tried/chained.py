"""Answers to the exercises of lesson 20."""

from __future__ import annotations

from pathlib import Path

from course_lib.experiments.lineage import Store
from course_lib.lesson.exercises import chained
from support.tried import Tried


def _store(folder: Path) -> Store:
    """Five artifacts as the lesson chains them, two evaluations of two alignments, and one of another fine-tuning."""
    store = Store(folder / "artifacts")
    made_of = {
        "nano3-sft-data": [],
        "nano3-pretrain-model": [],
        "nano3-sft-model": ["nano3-sft-data", "nano3-pretrain-model"],
        "nano3-aligned-model": ["nano3-sft-model"],
        "nano3-evaluation": ["nano3-aligned-model"],
    }
    for name, inputs in made_of.items():
        _again(store, name, inputs)
    return store


def _again(store: Store, name: str, inputs: list[str]) -> str:
    place = store.root.parent / f"{name}-{len(list((store.root / name).glob('v*')))}"
    place.write_text(place.name)
    return store.publish(name, place, kind="any", inputs=inputs).ref


def made_again(folder: Path) -> Tried:
    """Four of five go back to the pairs."""
    store = _store(folder)
    scores = store.read("nano3-evaluation")
    return Tried(4, [(3, "count them, too"), (5, "all of them"), (1, "Follow the arrows")], [store, scores])


def own_evaluation(folder: Path) -> Tried:
    """An alignment made anew, one from another fine-tuned model, and things that are no evaluation."""
    store = _store(folder)
    scores = store.read("nano3-evaluation")
    aligned = _again(store, "nano3-aligned-model", ["nano3-sft-model"])
    good = _again(store, "nano3-evaluation", [aligned])
    _again(store, "nano3-sft-model", ["nano3-sft-data", "nano3-pretrain-model"])
    elsewhere = _again(store, "nano3-aligned-model", ["nano3-sft-model"])
    other = _again(store, "nano3-evaluation", [elsewhere])
    wrong = [(scores.ref, "was there before"), (aligned, "is no evaluation"), (other, "another fine-tuned model")]
    wrong += [("nano3-evaluation:v9", "no artifact"), (7, "a ref is asked for")]
    return Tried(good, wrong, [store, scores])


def whole_again(folder: Path) -> Tried:
    """The file put back, a store that nobody mended, and one whose text was published anew with all that follows."""
    store, untouched, anew = (chained.tidied(folder / name) for name in ("mended", "untouched", "anew"))
    text = folder / "mended/text"
    (text / "prose.jsonl.old").replace(text / "prose.jsonl")
    for name, path, inputs in (("text", "text", []), ("model", "model", ["text"]), ("score", "score.json", ["model"])):
        anew.publish(name, folder / "anew" / path, kind="any", inputs=inputs)
    wrong = [(untouched, "prose.jsonl is not the file"), (anew, "a new version hides"), (3, "the store is asked for")]
    return Tried(store, wrong, [text])

"""Lesson 20: what a mended input makes again, an alignment of one's own, and a store in which somebody tidied up."""

from __future__ import annotations

import shutil
from pathlib import Path

from course_lib.experiments.lineage import Artifact, Changed, NoArtifact, Store
from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong

__all__ = ["made_again", "own_evaluation", "tidied", "whole_again"]


def made_again(answer: int, store: Store, scores: Artifact) -> Verdict:
    """How many artifacts on the way to the scores go back to the pairs, themselves included?"""
    refs = set(store.back(scores.ref).ref)
    touched = {ref for ref in refs if any(above.startswith("nano3-sft-data:") for above in store.back(ref).ref)}
    return value(
        answer,
        len(touched),
        why="the pairs, and all that has them among its inputs or above those; pretraining never saw a pair.",
        otherwise="Follow the arrows forward from the pairs: an artifact counts if its walk back meets them.",
        hints=[
            (len(touched) - 1, "The mended pairs are a new artifact as well: count them, too."),
            (len(refs), "Those are all of them, and what does not go back to the pairs is found again."),
        ],
    )


def own_evaluation(answer: str, store: Store, *known: Artifact) -> Verdict:
    """The ref of an evaluation of your own alignment of the same fine-tuned model."""
    if not isinstance(answer, str):
        raise Unfit(f"a ref is asked for, such as {known[0].ref!r}; yours is of type {type(answer).__name__}")
    try:
        walked = store.back(answer).ref
    except (NoArtifact, Changed) as error:
        return wrong(str(error))
    if not walked.iloc[0].startswith("nano3-evaluation:"):
        return wrong(f"{walked.iloc[0]} is no evaluation: judge the model, and give the ref of that.")
    made = {ref for ref in walked if ref.startswith("nano3-aligned-model:")}
    before = {ref for one in known for ref in store.back(one.ref).ref}
    if made <= before:
        return wrong(f"It goes back to {', '.join(made)}, which was there before: give `align` a beta of your own.")
    tuned = {ref for ref in walked if ref.startswith("nano3-sft-model:")}
    if not tuned <= before:
        return wrong(f"It goes back to {', '.join(tuned - before)}: another fine-tuned model than that of the scores.")
    return right("two artifacts are new, and everything above them was found by its digest.")


def tidied(folder: Path) -> Store:
    """Text, model and score, and somebody who sorted the text after it was used and kept a copy of it as it was."""
    shutil.rmtree(folder, ignore_errors=True)
    store = Store(folder / "artifacts")
    for name in ("text", "model"):
        (folder / name).mkdir(parents=True)
    lines = [f'{{"text": "Sentence number {number}."}}\n' for number in (3, 1, 2)]
    (folder / "text/prose.jsonl").write_text("".join(lines))
    (folder / "text/code.jsonl").write_text("".join(lines[:1]))
    (folder / "model/weights").write_text("0.1 0.2\n")
    (folder / "score.json").write_text("{}\n")
    store.publish("text", folder / "text", kind="dataset")
    store.publish("model", folder / "model", kind="model", inputs=["text:v1"])
    store.publish("score", folder / "score.json", kind="evaluation", inputs=["model:v1"])
    (folder / "text/prose.jsonl").replace(folder / "text/prose.jsonl.old")
    (folder / "text/prose.jsonl").write_text("".join(sorted(lines)))
    return store


def whole_again(answer: Store, text: Path) -> Verdict:
    """The store, once the walk from its score holds."""
    if not isinstance(answer, Store):
        raise Unfit(f"the store is asked for; yours is of type {type(answer).__name__}")
    try:
        walked = answer.back("score")
    except Changed as error:
        return wrong(f"The walk still fails: {error}")
    if list(walked.ref) != ["score:v1", "model:v1", "text:v1"]:
        return wrong(
            f"The score now goes back to {', '.join(walked.ref[1:])}: a new version hides what the old one was made of. "
            f"Put the file back into {text}."
        )
    return right("the old file had the digest that was published, so every link holds again.")

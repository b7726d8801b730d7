"""Lesson 01: who shares a folder, which repository answers a question, and what a flag is called in Bridge."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib.lesson.verdicts import Unfit, Verdict, right, wrong
from course_lib.machine import stack_map

if TYPE_CHECKING:
    from course_lib.machine.stack_map import Question

COMMAND = "pretrain_gpt.py --tensor-model-parallel-size 2 --lr 3e-4 --save-interval 500"
"""A line from an older cluster; only its flags count."""


def colleagues_note() -> dict[str, object]:
    """The same command as fields of Bridge, as somebody guessed them: one is right."""
    return {"model.tensor-model-parallel-size": 2, "train.lr": 3e-4, "checkpoint.save_interval": 500}


def systems_in_one_folder(answer: set[str]) -> Verdict:
    """Which systems of the map have their code in the folder `megatron`?"""
    if isinstance(answer, str) or not all(isinstance(name, str) for name in answer):
        raise Unfit('names of systems are asked for, such as `{"NeMo Run", "Nemotron"}`')
    boxes = {box.name: box for box in stack_map.boxes()}
    if unknown := sorted(set(answer) - set(boxes)):
        return wrong(f"{', '.join(unknown)}: that is no system of the map; its names are {', '.join(boxes)}.")
    expected = {name for name, box in boxes.items() if box.module.split(".")[0] == "megatron"}
    if extra := sorted(set(answer) - expected):
        return wrong(f"{', '.join(extra)}: look at the file that it is imported from; a like name is no folder.")
    if set(answer) != expected:
        return wrong(
            "One is missing: the wheel megatron-core fills two of the folders, and belongs to which repository?"
        )
    return right("two systems are imported as `megatron`, and a package with an `__init__.py` of that name hides both.")


def repositories(answer: Mapping[int, str], asked: Sequence[Question]) -> Verdict:
    """Which repository does one open for each question?"""
    if not isinstance(answer, Mapping):
        raise Unfit('a dictionary is asked for, such as `{1: "Megatron-Bridge", 2: "Nemotron"}`')
    expected = {number: question.answer for number, question in enumerate(asked, 1)}
    names = {box.name for box in stack_map.boxes()}
    if unknown := sorted({str(name) for name in answer.values()} - names):
        return wrong(f"{', '.join(unknown)}: write the names as on the map, {', '.join(sorted(names))}.")
    missed = [number for number, name in expected.items() if answer.get(number) != name]
    if not missed:
        return right(f"all {len(expected)} of them; the reasons stand in the solution.")
    inside = [n for n in missed if (answer.get(n), expected[n]) == ("Megatron-Bridge", "Megatron-LM")]
    if inside:
        return wrong(
            f"Look again at {inside}: Bridge calls the code in question, and a layer or a schedule computes it."
        )
    if plans := [n for n in missed if (answer.get(n), expected[n]) == ("Megatron-Bridge", "Nemotron")]:
        return wrong(
            f"Look again at {plans}: Bridge has the recipe, and who says which stages and data belong to nano3?"
        )
    open_ = [number for number in missed if number not in answer]
    return wrong(f"Not answered: {open_}." if open_ else f"Look again at {missed}: who owns the thing in question?")


def flags_as_fields(answer: Mapping[str, object], fields: Container[str]) -> Verdict:
    """Which fields of Bridge's configuration say what the command says?

    Args:
        answer: Values by field.
        fields: The names of the recipe's fields.
    """
    if not isinstance(answer, Mapping):
        raise Unfit('a dictionary is asked for, such as `{"train.micro_batch_size": 1}`')
    if dashes := [name for name in answer if "-" in name]:
        return wrong(
            f"{', '.join(dashes)}: a field is a name of Python, so it has underscores where the flag has dashes."
        )
    if unknown := [name for name in answer if name not in fields]:
        return wrong(f"{', '.join(unknown)}: the recipe has no such field; which part of the configuration holds it?")
    expected = {"model.tensor_model_parallel_size": 2, "optimizer.lr": 3e-4, "checkpoint.save_interval": 500}
    if dict(answer) != expected:
        return wrong("The fields exist; hold names and values against the flags of the command, one by one.")
    return right("underscores for dashes, and the learning rate belongs to the optimizer and not to the loop.")

"""Answers to the exercises of lesson 01."""

from __future__ import annotations

from pathlib import Path

from course_lib.lesson.exercises import stack
from course_lib.machine import stack_map
from support.tried import Tried


def systems_in_one_folder(folder: Path) -> Tried:
    """A name that only sounds like it, one alone, and a package that is no system."""
    wrong = [
        ({"Megatron-Bridge", "Nemotron"}, "a like name"),
        ({"Megatron-Bridge"}, "One is missing"),
        ({"core"}, "no system"),
    ]
    return Tried({"Megatron-Bridge", "Megatron-LM"}, wrong)


def repositories(folder: Path) -> Tried:
    """Bridge for what Core computes and for what the blueprint plans, a gap, and a name of another map."""
    asked = stack_map.questions()
    right = {number: question.answer for number, question in enumerate(asked, 1)}
    layer = next(number for number, name in right.items() if name == "Megatron-LM")
    plan = next(number for number, name in right.items() if name == "Nemotron")
    gap = {number: name for number, name in right.items() if number != 4}
    wrong = [
        (right | {layer: "Megatron-Bridge"}, f"[{layer}]: Bridge calls"),
        (right | {plan: "Megatron-Bridge"}, "which stages and data"),
        (gap, "Not answered: [4]"),
        (right | {1: "NeMo"}, "NeMo: write the names"),
    ]
    return Tried(right, wrong, [asked])


def flags_as_fields(folder: Path) -> Tried:
    """Dashes, and the learning rate in the training loop."""
    fields = {"model.tensor_model_parallel_size", "optimizer.lr", "checkpoint.save_interval"}
    right = {"model.tensor_model_parallel_size": 2, "optimizer.lr": 3e-4, "checkpoint.save_interval": 500}
    moved = {("train.lr" if name == "optimizer.lr" else name): value for name, value in right.items()}
    wrong = [
        (stack.colleagues_note(), "underscores"),
        (moved, "train.lr: the recipe has no such field"),
        (right | {"checkpoint.save_interval": 50}, "one by one"),
    ]
    return Tried(right, wrong, [fields])

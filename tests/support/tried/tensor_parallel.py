"""Answers to the exercises of lesson 11."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from course_lib.lesson.exercises import tensor_parallel
from support import tried
from support.tried import Tried


def ratio_of_bytes(folder: Path) -> Tried:
    """The ring alone, the microbatches alone, and fewer microbatches instead of more."""
    wrong = [
        (1.5, "one microbatch"),
        (2, "counts the microbatches"),
        (0.75, "not half as many"),
        (4, "Two things change"),
    ]
    return Tried(3, wrong, [2, 4])


def other_size(folder: Path) -> Tried:
    """The size of before, another batch, too few steps, and other losses."""

    def run(name: str, size: int, *, batch: int = 16, **more: Any) -> Any:
        layout = {"layout": {"tensor_model_parallel_size": size}}
        return tried.run(folder, name, config={"train": {"global_batch_size": batch}}, launch=layout, **more)

    wrong = [
        (run("same", 2), "TP is 2"),
        (run("batch", 4, batch=8), "reads 8 sequences"),
        (run("short", 4, losses=[7.0]), "only a whole"),
        (run("other", 4, losses=[7.0, 6.5, 6.1]), "must not change"),
    ]
    return Tried(run("yours", 4), wrong, [run("before", 2), 4])


def backward_passes(folder: Path) -> Tried:
    """A sum too many, a sum too few, and both functions turned round."""
    summed = tensor_parallel.colleagues_backward()[0]

    def handed_on(gradients: list) -> list:
        return gradients

    wrong = [
        (tensor_parallel.colleagues_backward(), "4 times too large"),
        ((handed_on, handed_on), "not whole"),
        ((lambda gradients: gradients[:1], summed), "one a rank"),
    ]
    return Tried((handed_on, summed), wrong)

"""Answers to the exercises of lesson 06, with a planner that knows two numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

from course_lib.common.units import GiB
from course_lib.lesson.exercises import plan
from support.tried import Tried


def bytes_of_a_parameter(folder: Path) -> Tried:
    """Gradients in fp32, an optimizer that is not shared, and everything shared."""
    return Tried(5.5, [(7.5, "fp32 gradients"), (16, "distributed optimizer"), (2, "as FSDP does"), (6, "Add")], [8, 2])


def cfg(tp: int = 1, *, pp: int = 1, again: str | None = None, layers: int = 0, bf16: bool = False) -> dict[str, Any]:
    """What the planner of these tests reads."""
    model = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": 1}
    model |= {"sequence_parallel": tp > 1, "recompute_granularity": again, "recompute_num_layers": layers}
    return {"model": model, "mixed_precision": {"grad_reduce_in_fp32": not bf16}}


def planned(one: dict[str, Any], *, ranks: int) -> Some:
    """96 GiB over TP, and 15 for fp32 gradients."""
    model = one["model"]
    gib = 96 / model["tensor_model_parallel_size"] - 4 * model["recompute_num_layers"]
    return Some(total_bytes=int((gib + 15 * one["mixed_precision"]["grad_reduce_in_fp32"]) * GiB))


def smallest_cut(folder: Path) -> Tried:
    """Too little, too much, a pipeline, and recomputation."""
    wrong = [
        (cfg(1), "111.0 GiB planned at TP=1"),
        (cfg(8), "so does TP=4"),
        (cfg(2, pp=2), "TP alone"),
        (cfg(2, again="full"), "costs a forward pass"),
        (cfg(2, bf16=True), "mixed_precision.grad_reduce_in_fp32 changed as well"),
    ]
    return Tried(cfg(4), wrong, [planned, cfg(1), 40.0])


def lever_at_its_place(folder: Path) -> Tried:
    """The lever at the place where it does nothing, another lever, and more recomputation."""
    before = cfg(layers=5)
    wrong = [
        (before, "as large as they were"),
        (cfg(2, layers=5), "another lever"),
        (cfg(layers=8), f"{plan.RECOMPUTED} changed"),
    ]
    return Tried(cfg(layers=5, bf16=True), wrong, [planned, before, 78.0])

"""Lesson 06: bytes of a parameter, the smallest cut for a smaller GPU, and a lever that was pulled at the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from course_lib.common import config
from course_lib.common.units import GiB
from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong

RANKS = 8
RECOMPUTED = "model.recompute_num_layers"
STAGES = "model.pipeline_model_parallel_size"
TENSOR = "model.tensor_model_parallel_size"
CONTEXT = "model.context_parallel_size"
SEQUENCE = "model.sequence_parallel"
AGAIN = "model.recompute_granularity"

Planner = Callable[..., Any]
"""`memory.plan`: a plan of a configuration, with its `total_bytes`."""


def bytes_of_a_parameter(answer: float, copies: int, gradient_bytes: int) -> Verdict:
    """How many bytes of states does a rank hold for each parameter that it has, in bf16 training?

    Args:
        copies: Ranks that hold the same weights, DP x CP; the distributed optimizer shares its states among them.
        gradient_bytes: Bytes of a gradient.
    """
    return value(
        answer,
        2 + gradient_bytes + 12 / copies,
        why="weight and gradient stand on every rank, and the optimizer's 12 bytes are shared.",
        otherwise="Add the weight, the gradient, and the share of the optimizer's 12 bytes.",
        hints=[
            (2 + 4 + 12 / copies, "That has fp32 gradients; how many bytes has a gradient in bf16?"),
            (2 + gradient_bytes + 12, "That is without the distributed optimizer, which shares the 12 bytes."),
            (
                (2 + gradient_bytes + 12) / copies,
                "That shares everything, as FSDP does; here weight and gradient are whole.",
            ),
        ],
    )


def smallest_cut(answer: Any, plan: Planner, before: Any, limit_gib: float) -> Verdict:
    """Which configuration has the smallest tensor-parallel size that fits, without a pipeline and without recomputation?

    Args:
        answer: A configuration.
        plan: What plans it.
        before: The one whose layout was to be changed.
        limit_gib: What a plan may use of the GPU.
    """
    tensor = _cut(answer)
    mine, theirs = config.flatten(answer), config.flatten(before)
    layout = (TENSOR, STAGES, CONTEXT, SEQUENCE, AGAIN)
    if other := sorted(name for name in theirs if name not in layout and mine.get(name) != theirs[name]):
        return wrong(f"{', '.join(other[:3])} changed as well: the same model and the same training were asked for.")
    if config.value(answer, STAGES) != 1 or config.value(answer, CONTEXT) != 1:
        return wrong("The exercise is about TP alone: PP and CP are 1.")
    if config.value(answer, AGAIN):
        return wrong("Recomputation makes room as well, and costs a forward pass: here it is off.")
    if tensor > 1 and not config.value(answer, SEQUENCE):
        return wrong(
            "Without sequence parallelism the tensors between the matrix products are kept whole on every rank."
        )
    needed = plan(answer, ranks=RANKS).total_bytes / GiB
    if needed > limit_gib:
        return wrong(f"{needed:.1f} GiB planned at TP={tensor}, and {limit_gib:.1f} GiB may be used.")
    if tensor > 1:
        half = config.changed(answer, {TENSOR: tensor // 2, SEQUENCE: tensor > 2})
        if plan(half, ranks=RANKS).total_bytes / GiB <= limit_gib:
            return wrong(f"TP={tensor} fits, and so does TP={tensor // 2}, whose layers wait for fewer messages.")
    return right(f"{needed:.1f} of {limit_gib:.1f} GiB at TP={tensor}, and half of it does not fit.")


def lever_at_its_place(answer: Any, plan: Planner, before: Any, limit_gib: float) -> Verdict:
    """Which configuration reduces its gradients in bf16, and fits, with the layout and the recomputation of `before`?

    Args:
        answer: The mended configuration.
        plan: What plans it.
        before: The configuration in which the lever did nothing.
        limit_gib: What a plan may use of the GPU.
    """
    _cut(answer)
    kept = (TENSOR, STAGES, CONTEXT, RECOMPUTED)
    if other := [name for name in kept if config.value(answer, name) != config.value(before, name)]:
        return wrong(f"{', '.join(other)} changed: that makes room too, and is another lever.")
    needed, was = (plan(one, ranks=RANKS).total_bytes / GiB for one in (answer, before))
    if needed > was - 1:
        return wrong(
            f"{needed:.1f} GiB planned, and before it was {was:.1f}: the gradients are as large as they were. "
            "Which object has the last word about the number formats?"
        )
    if needed > limit_gib:
        return wrong(f"{needed:.1f} GiB planned, and {limit_gib:.1f} may be used.")
    return right(
        f"{needed:.1f} GiB instead of {was:.1f}: the number format's object overrides `cfg.ddp` when a run starts."
    )


def _cut(answer: Any) -> int:
    if not config.has(answer, TENSOR):
        raise Unfit(f"a configuration is asked for; yours is of type {type(answer).__name__}")
    return config.value(answer, TENSOR)

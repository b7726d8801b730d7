"""Lesson 11: what another tensor-parallel size sends, a run of it, and the two backward passes of a cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong

if TYPE_CHECKING:
    import numpy as np

    Backward = Callable[[list[np.ndarray]], Sequence[np.ndarray]]

RANKS = 4
"""Of the cut whose backward passes are repaired."""


def ratio_of_bytes(answer: float, before: int, after: int) -> Verdict:
    """How many times as many bytes does a rank send in its TP group, at the same global batch on the same ranks?

    Args:
        before: The tensor-parallel size before.
        after: The one after.
    """

    def ring(size: int) -> float:
        return 2 * (size - 1) / size

    share, batches = ring(after) / ring(before), after / before
    return value(
        answer,
        share * batches,
        rtol=0.005,
        why="the ring takes more of each tensor from a rank, and with fewer copies each rank sees more microbatches.",
        otherwise="Two things change: what a ring takes from each rank, and how many microbatches a rank sees.",
        hints=[
            (
                share,
                "That is for one microbatch: with a larger TP, DP is smaller, and each copy reads more of the batch.",
            ),
            (batches, "That counts the microbatches; a ring of more ranks takes more of each tensor as well."),
            (share / batches, "With half as many copies a rank sees twice as many microbatches, and not half as many."),
        ],
    )


def other_size(answer: runs.Run | str, before: runs.Run, size: int) -> Verdict:
    """Which run does the same training at this tensor-parallel size?

    Args:
        answer: A run, recorded.
        before: The run that it has to repeat.
        size: The tensor-parallel size that it has to have.
    """
    run = own_run(answer)
    layout = run.launch.get("layout", {})
    if layout.get("tensor_model_parallel_size") != size:
        return wrong(f"TP is {layout.get('tensor_model_parallel_size')} in that run, and {size} was asked for.")
    if len(run.metrics) < len(before.metrics):
        return wrong(
            f"It has {len(run.metrics)} steps, and the run of above {len(before.metrics)}: only a whole repeats it."
        )
    batches = [each.config["train"]["global_batch_size"] for each in (run, before)]
    if batches[0] != batches[1]:
        return wrong(f"A step of it reads {batches[0]} sequences, and of the run of above {batches[1]}.")
    distance = runs.difference(run, before)
    if before.launch["device"] == "cpu" and not distance < 1e-4:  # on GPUs the first weights depend on TP
        return wrong(
            f"Losses or gradient norms differ by {distance:.1e} of their size: a layout must not change what is computed."
        )
    return right(f"TP={size} trains the same, to {distance:.1e} of the size of losses and gradient norms.")


def colleagues_backward() -> tuple[Backward, Backward]:
    """Two backward passes of a cut, of `SumOut` and of `CopyIn`, of which one is wrong."""
    return _summed, _summed


def _summed(gradients: list[np.ndarray]) -> list[np.ndarray]:
    """An all-reduce: every rank gets the sum of what all ranks have."""
    total = sum(gradients)
    return [total] * len(gradients)


def backward_passes(answer: tuple[Backward, Backward]) -> Verdict:
    """Which backward passes of `SumOut` and `CopyIn` give the gradients of the layers that are not cut?

    Args:
        answer: Both functions: each takes the gradients that the ranks have, and returns what each rank goes on with.
    """
    import numpy as np

    if not (isinstance(answer, tuple | list) and len(answer) == 2 and all(map(callable, answer))):
        raise Unfit("two functions are asked for, the backward pass of SumOut and that of CopyIn, as a pair")
    draw = np.random.default_rng(1234)
    x, a, b, upstream = (draw.normal(size=size) for size in ((3, 5), (8, 5), (5, 8), (3, 5)))
    middle = x @ a.T
    inner = (upstream @ b) * (middle > 0)  # of y = relu(x A^T) B^T
    cut = np.array_split(np.arange(8), RANKS)
    arrived = _called(answer[0], [upstream.copy() for _ in cut])
    parts = [(grad @ b[:, rows]) * (middle[:, rows] > 0) for grad, rows in zip(arrived, cut, strict=True)]
    weights = np.concatenate([part.T @ x for part in parts])
    if np.allclose(weights, RANKS * inner.T @ x):
        return wrong(
            f"The gradients of A are {RANKS} times too large: behind SumOut every rank holds the same output, so each has "
            "its whole gradient already."
        )
    if not np.allclose(weights, inner.T @ x):
        return wrong(
            "The gradients of A are not those of the layers that are not cut: what does each rank know behind SumOut?"
        )
    ahead = _called(answer[1], [part @ a[rows] for part, rows in zip(parts, cut, strict=True)])
    if not all(np.allclose(each, inner @ a) for each in ahead):
        return wrong(
            "The gradient of the input is not whole: in front of CopyIn every rank had the same input, and each now knows "
            "only what its own features say of it."
        )
    return right(
        "SumOut sends forward and hands back, CopyIn hands on and sends backward: one message in each direction."
    )


def _called(function: Callable[[Any], Any], gradients: list[np.ndarray]) -> list[np.ndarray]:
    found = list(function(gradients))
    if len(found) != RANKS:
        raise Unfit(f"each function returns a list of {RANKS} gradients, one a rank, not {len(found)}")
    return found

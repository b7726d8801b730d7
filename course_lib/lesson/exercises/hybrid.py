"""Lesson 17: where a scan begins to be wrong, a hybrid over a shared sequence, and states that are added along the wrong axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong

if TYPE_CHECKING:
    import torch

    from course_lib.experiments.state_spaces import Chunks

__all__ = ["first_wrong", "handed_on", "shared_sequence"]


ROUNDING = 1e-4
"""Sums of fp32 in another order stay below it, as a share of the largest output."""


def first_wrong(answer: int, given: Mapping[str, torch.Tensor], theirs: torch.Tensor) -> Verdict:
    """Which is the first token whose output is not what the recurrence makes of the same inputs?"""
    from course_lib.experiments import state_spaces

    definition = state_spaces.recurrence(**given)
    apart = (theirs - definition).abs().amax((0, 2, 3)) / definition.abs().max()
    wrong_ones = (apart > ROUNDING).nonzero().flatten().tolist()
    first = wrong_ones[0]
    before, there = apart[:first].max(), apart[first]
    return value(
        answer,
        first,
        why=f"before it the two agree to {before:.0e} of the largest output, and it is off by {there:.1e} of it.",
        otherwise="Take the largest difference of each token, over heads and channels, and look where it jumps.",
        hints=[
            (first + 1, "Tokens are counted from 0 here."),
            (int(apart.nonzero()[0]), "That difference is of the seventh digit: the same sums in another order."),
            (int(apart.argmax()), "There it is largest; it was wrong before."),
            (len(wrong_ones), "That is how many tokens are wrong; the question asks for the first."),
        ],
    )


def shared_sequence(answer: Any, alone: runs.Run, tolerance: float) -> Verdict:
    """A run of yours, from the same checkpoint, in which two ranks share each sequence."""
    run = own_run(answer)
    if run.launch["layout"]["context_parallel_size"] != 2:
        return wrong("In that run each rank has whole sequences: with CP=2 two ranks share each.")
    apart = runs.difference(run, alone)
    if not len(run.metrics.step) or run.metrics.step.iloc[0] == 1:
        return wrong("That run began with fresh weights: give `load=` the run that saved the checkpoint.")
    if apart > tolerance:
        return wrong(f"Its losses and gradient norms are {apart:.1e} from the others: is anything else different?")
    return right(
        "heads are shared among the ranks while a sequence is scanned, so each scans all of it for half of them."
    )


def handed_on(answer: Callable[[Any, Any], Any], given: Chunks) -> Verdict:
    """A function of `decay` and `left` that returns the state before each chunk."""
    import torch

    if not callable(answer):
        raise Unfit(f"a function of decay and left is asked for; yours is of type {type(answer).__name__}")
    begins = answer(given.decay, given.left)
    if not isinstance(begins, torch.Tensor) or begins.shape != given.begins.shape:
        raise Unfit(f"the function should return a tensor of shape {tuple(given.begins.shape)}, as `left` has it")
    if torch.allclose(begins, given.begins):
        return right("each chunk adds up what all earlier ones left, and the axis of those is gone.")
    if torch.allclose(begins, (given.decay[..., None, None] * given.left[:, :, None]).sum(2)):
        return wrong("That is the sum as transformers takes it: it adds up the chunks that receive.")
    if torch.allclose(begins, given.left):
        return wrong("You return what each chunk leaves, and nothing of what came before it.")
    return wrong("Compare one number: `begins[:, :, 2]` is `left[:, :, 2]` and what decay leaves of the ones before.")

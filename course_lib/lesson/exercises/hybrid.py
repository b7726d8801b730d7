"""Lesson 17: a cache against a state, a hybrid over a shared sequence, and states that are added along the wrong axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong

if TYPE_CHECKING:
    from course_lib.experiments.state_spaces import Chunks

__all__ = ["equal_cache", "handed_on", "shared_sequence"]


def equal_cache(answer: float, kept: Mapping[str, int]) -> Verdict:
    """From how many tokens on do keys and values hold more than the states?"""
    tokens = kept["state"] / kept["a token"]
    return value(
        answer,
        tokens,
        why="that many tokens of keys and values are as large as the states, which never grow.",
        otherwise="The states have one size; keys and values have a size for each token: divide the one by the other.",
        hints=[
            (kept["state"], "Those are the bytes of the states; the question asks for tokens."),
            (1 / tokens, "You divided the other way round: that is one token's share of the states."),
            (tokens / 2, "Keys and values are both in `a token` already."),
        ],
        rtol=0.01,
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
        raise Unfit(f"a function of decay and left is asked for, not a {type(answer).__name__}")
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

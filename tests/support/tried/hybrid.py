"""Answers to the exercises of lesson 17."""

from __future__ import annotations

from pathlib import Path

import torch

from course_lib.experiments import state_spaces
from support.tried import Tried, run


def first_wrong(folder: Path) -> Tried:
    """A scan of 12 tokens that loses what was before each chunk of four."""
    given = state_spaces.sample(12)
    kept = state_spaces.recurrence(**given)
    kept[:, 1] *= 1 + 1e-6  # another order of sums
    parts = [state_spaces.recurrence(**{name: one[:, k : k + 4] if one.ndim > 1 else one for name, one in given.items()})
             for k in (0, 4, 8)]  # fmt: skip
    theirs = torch.cat([kept[:, :4], *parts[1:]], 1)
    largest = int((theirs - kept).abs().amax((0, 2, 3)).argmax())
    wrong = [(5, "counted from 0"), (1, "seventh digit"), (largest, "was wrong before"), (8, "how many tokens")]
    return Tried(4, [*wrong, (3, "look where it jumps")], [given, theirs])


def shared_sequence(folder: Path) -> Tried:
    """Runs of the second and third step, one of them with another layout, and one from fresh weights."""
    layout = {"layout": {"context_parallel_size": 2}}
    alone, good = run(folder, "alone"), run(folder, "good", launch=layout)
    whole = run(folder, "whole", launch={"layout": {"context_parallel_size": 1}})
    other = run(folder, "other", losses=(7.0, 6.5, 5.0), launch=layout)
    for one in (alone, good, whole, other):
        lines = (one.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (one.path / "metrics.jsonl").write_text("".join(lines[1:]))
    fresh = run(folder, "fresh", launch=layout)
    wrong = [(whole, "whole sequences"), (other, "from the others"), (fresh, "fresh weights")]
    return Tried(good, wrong, [alone, 1e-5])


def handed_on(folder: Path) -> Tried:
    """The sum over the chunks that left a state, and the one that transformers takes."""

    def over(axis):
        return lambda decay, left: (decay[..., None, None] * left[:, :, None]).sum(axis)

    wrong = [(over(2), "as transformers"), (lambda _, left: left, "nothing of what came before"), (3, "a function")]
    return Tried(over(3), wrong, [state_spaces.chunks()])

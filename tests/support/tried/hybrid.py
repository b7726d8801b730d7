"""Answers to the exercises of lesson 17."""

from __future__ import annotations

from pathlib import Path

from course_lib.experiments import state_spaces
from support.tried import Tried, run

KEPT = {"state": 4096, "a token": 16}


def equal_cache(folder: Path) -> Tried:
    """Bytes of states, and bytes a token."""
    return Tried(256, [(4096, "asks for tokens"), (1 / 256, "the other way round"), (7, "divide the one")], [KEPT])


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

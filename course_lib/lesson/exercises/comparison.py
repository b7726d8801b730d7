"""Lesson 09: steps at equal tokens, a fair comparison of batches, and a report that claims too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from course_lib import runs
from course_lib.common import config
from course_lib.experiments import sweep
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong

NO_VERDICT = "no verdict"

Report = Mapping[str, tuple[Sequence[float], Sequence[float], str]]
"""By claim: held-out losses before and after, one a seed, and the verdict that somebody gave."""


def steps_at_equal_tokens(answer: int, cfg: Any, batch: int) -> Verdict:
    """How many steps take as many sequences, with another global batch?"""
    steps, old = cfg.train.train_iters, cfg.train.global_batch_size
    return value(
        answer,
        steps * old / batch,
        why="batch x steps stays the same, so both runs read the same number of sequences.",
        otherwise="A run reads batch x steps sequences; keep that product.",
        hints=[
            (steps, "With as many steps the larger batch reads more text, and a better loss may be the text's."),
            (steps * batch / old, "That is the other way round: a larger batch needs fewer steps for the same text."),
        ],
    )


def fair_batches(answer: Sequence[runs.Run], base: Sequence[runs.Run], batch: int) -> Verdict:
    """Which runs ask about the batch alone?

    Args:
        answer: Runs of the larger batch, one a seed.
        base: The runs that they are held against.
        batch: Their global batch.
    """
    if isinstance(answer, runs.Run | str) or not hasattr(answer, "__len__"):
        raise Unfit("several runs are asked for, one a seed: what `sweep.repeat` returns")
    found = [own_run(one) for one in answer]
    if len(found) < len(base):
        return wrong(f"{len(found)} run(s) against {len(base)}: a single seed has no interval, so ask all seeds.")
    old, new = config.flatten(base[0].config), config.flatten(found[0].config)
    if new["train.global_batch_size"] != batch:
        return wrong(f"The batch is {new['train.global_batch_size']} there, and {batch} was asked for.")
    read = [each["train.global_batch_size"] * each["train.train_iters"] for each in (old, new)]
    if read[0] != read[1]:
        return wrong(
            f"These runs read {read[1]:,} sequences, and the base reads {read[0]:,}: was it the batch, or the text?"
        )
    parts = ("model.", "optimizer.")
    if other := sorted(name for name in old if name.startswith(parts) and new.get(name) != old[name]):
        return wrong(f"{', '.join(other[:3])} differ as well, so nobody could say which of them did it.")
    losses = [[sweep.held_out(run) for run in group] for group in (base, found)]
    change = sweep.Change("train.global_batch_size", old["train.global_batch_size"], batch)
    return right(f"at equal tokens, {sweep.Comparison.of(change, *losses)}.")


def colleagues_report() -> dict[str, tuple[list[float], list[float], str]]:
    """Three claims of a colleague: losses of the seeds before and after, in nats per token, and what he says of them."""
    return {
        "longer warm-up": ([3.02, 3.10, 2.96], [2.99, 3.06, 2.95], "better"),
        "wider feed-forward": ([3.02, 3.03, 3.02], [2.95, 2.94, 2.96], "better"),
        "another initialization": ([3.02], [2.90], "better"),
    }


def verdicts_of_a_report(answer: Mapping[str, str], report: Report) -> Verdict:
    """Which verdicts do these losses carry, crossed, each seed a seed of its own?"""
    words = ("better", "worse", "no difference beyond noise", NO_VERDICT)
    if not isinstance(answer, Mapping) or not set(answer.values()) <= set(words):
        raise Unfit(f"a dictionary is asked for, from each claim to one of {', '.join(map(repr, words))}")
    if missing := sorted(set(report) - set(answer)):
        return wrong(f"Not judged: {', '.join(missing)}.")
    for name, (before, after, _) in report.items():
        change = sweep.Change(name, None, None)
        if min(len(before), len(after)) < 2:
            if answer[name] != NO_VERDICT:
                return wrong(
                    f"{name}: one seed has no spread, so these numbers carry no verdict, however far they are apart."
                )
            continue
        found = sweep.Comparison.of(change, before, after)
        if answer[name] != found.verdict:
            holds = "contains" if abs(found.difference) <= found.noise else "does not contain"
            interval = f"the difference is {found.difference:+.3f} +- {found.noise:.3f}"
            return wrong(f"{name}: {interval}, and that interval {holds} zero.")
    return right("one of three claims is left; the others need more seeds, and not other words.")

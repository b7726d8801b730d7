"""Lesson 14: read a reward in nats, make a run that keeps nearer to its start, and mend preferences that were mixed up."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.text import docstrings

if TYPE_CHECKING:
    from course_lib import runs
    from course_lib.experiments.preferences import Preference

__all__ = ["gentler_run", "lowest_chosen", "mended_rows", "mixed_up"]

LEAST_RIGHT = 0.8
"""Of the held-out pairs."""


def lowest_chosen(answer: float, run: runs.Run) -> Verdict:
    """By how many nats were the chosen answers less likely where the log has them lowest?"""
    beta, rewards = run.config["trainer"]["beta"], run.metrics.rewards_chosen
    lowest, last = float(rewards.min()), float(rewards.iloc[-1])
    return value(
        answer,
        -lowest / beta,
        why="TRL's reward is beta times the change in nats, so you divided by beta.",
        otherwise="Take the smallest value of the column `rewards_chosen`, and ask what its unit is.",
        hints=[
            (-lowest, "That is the reward, and a reward is beta times nats."),
            (-lowest * beta, "Beta is in the reward already: divide by it."),
            (lowest / beta, "The size is right; so many nats *less* likely is a positive number."),
            (-last / beta, "That is the last step; the question is about the lowest one."),
        ],
        rtol=0.01,
    )


def gentler_run(answer: object, alone: runs.Run) -> Verdict:
    """A run with the margin alone whose chosen answers lose at most half as many nats, and that still tells pairs apart."""
    run = own_run(answer)
    if run.launch.get("trainer") != "DPOTrainer" or run.validation.empty:
        raise Unfit("a DPO run with an evaluation at its end is asked for, such as `dpo` returns")
    if run.config["trainer"]["loss_type"] != ["sigmoid"]:
        return wrong("It has another loss: the question is what holds the chosen answers without a second term.")
    mine, most = _lost_nats(run), _lost_nats(alone) / 2
    share = float(run.validation.rewards_accuracies.iloc[-1])
    if mine > most:
        return wrong(
            f"Its chosen answers lose {mine:.1f} nats, of {most:.1f} at most: how far may a policy go, and how fast?"
        )
    if share <= LEAST_RIGHT:
        return wrong(
            f"Its chosen answers lose only {mine:.1f} nats, and {share:.0%} of the pairs are the right way round: more than "
            f"{LEAST_RIGHT:.0%} are asked for."
        )
    return right(f"chosen answers lose {mine:.1f} nats, and {share:.0%} of the pairs are the right way round.")


def _lost_nats(run: runs.Run) -> float:
    """How much less likely the chosen answers of held-out pairs became."""
    return -float(run.validation.rewards_chosen.iloc[-1]) / run.config["trainer"]["beta"]


def mixed_up(rows: Sequence[Preference], seed: int) -> list[Preference]:
    """The same preferences after two accidents: some have their answers exchanged, some their separator twice.

    Args:
        rows: As `preferences.preferences` makes them.
        seed: Draws which ones.
    """
    dice = random.Random(seed)
    found = []
    for row in rows:
        if dice.random() < 0.25:
            row = dataclasses.replace(row, chosen=row.rejected, rejected=row.chosen)
        if dice.random() < 0.25:
            row = dataclasses.replace(row, prompt=row.prompt + "\n")
        found.append(row)
    return found


def mended_rows(answer: Sequence[Preference], broken: Sequence[Preference]) -> Verdict:
    """The preferences as they were before the accidents."""
    if isinstance(answer, str) or not hasattr(answer, "__len__"):
        raise Unfit(f"a list of preferences is asked for; yours is of type {type(answer).__name__}")
    if len(answer) != len(broken):
        return wrong(f"{len(answer)} rows, of {len(broken)}: a row can be mended, so none has to go.")
    if exchanged := sum(not docstrings.passes(row.chosen) for row in answer):
        return wrong(f"{exchanged} chosen answers have a fault still: the model would learn to make it.")
    if twice := sum(row.prompt.endswith("\n\n") for row in answer):
        return wrong(f"The answers are in order, and {twice} prompts end with the separator twice.")
    if list(answer) != [_mended(row) for row in broken]:
        return wrong(
            "No program finds a fault any more, and some rows differ from what they were: what else was changed?"
        )
    return right("answers and prompts are what they were; neither accident would have stopped the trainer.")


def _mended(row: Preference) -> Preference:
    rejected, chosen = sorted((row.chosen, row.rejected), key=docstrings.passes)
    return dataclasses.replace(row, prompt=row.prompt.rstrip("\n") + "\n", chosen=chosen, rejected=rejected)

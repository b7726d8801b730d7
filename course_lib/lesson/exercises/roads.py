"""Lesson 19: what FSDP2 sends of gradients, replicas of shards, and another person's settings that part from Bridge's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_lib import runs
from course_lib.common import config
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong
from course_lib.planning import messages

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["gradient_share", "mended", "replicated", "theirs"]


def gradient_share(answer: float, sent: pd.DataFrame) -> Verdict:
    """Which share of the bytes that leave a rank of FSDP2 are gradients?"""
    leaving = [messages.sent_bytes(row.operation, row.bytes, row.group_size) * row.count for row in sent.itertuples()]
    total = sum(leaving)
    gradients = sum(one for one, kind in zip(leaving, sent.operation, strict=True) if kind == "reduce_scatter")
    counts = sent["count"].sum()
    return value(
        answer,
        gradients / total,
        why="weights travel more often than gradients: most layers are made whole twice a step.",
        otherwise="Multiply bytes by count; what a reduce-scatter moves are gradients. Then divide by the sum of all rows.",
        hints=[
            (100 * gradients / total, "That is in percent; a share lies between 0 and 1."),
            (1 - gradients / total, "That is the share of everything else."),
            (gradients, "Those are bytes; the question asks for a share of all."),
            (
                sent[sent.operation == "reduce_scatter"]["count"].sum() / counts,
                "That is their share of the messages, and messages have different sizes.",
            ),
        ],
        rtol=0.02,
    )


def replicated(answer: Any, bridge: runs.Run, bound: float) -> Verdict:
    """A run of AutoModel on 8 ranks, in two groups that each hold the whole model, with Bridge's losses."""
    run = own_run(answer)
    if run.launch.get("trainer") != "AutoModel":
        return wrong("That run is not AutoModel's: give what `automodel.train` returned.")
    if run.launch["ranks"] != 8:
        return wrong(f"That run has {run.launch['ranks']} ranks, and 8 are asked for.")
    said = run.config.get("distributed") or {}
    copies = said.get("dp_replicate_size")
    if said.get("strategy") != "fsdp2" or copies in (None, 1):
        return wrong(
            "In that run there is one copy of the model or eight: `dp_replicate_size` says how many groups hold one."
        )
    if copies != 2:
        return wrong(f"There are {copies} copies of the model in that run, and two are asked for.")
    if "mp_policy" not in said:
        return wrong("Its matrix products are in bf16: replicas change nothing about `mp_policy`.")
    apart = runs.difference(run, bridge)
    if not apart < bound:
        return wrong(f"Its losses and gradient norms are {apart:.0e} from Bridge's: is anything else different?")
    return right("shards are gathered among four ranks, and gradients are summed over the two groups besides.")


def theirs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as somebody else typed them, with one slip."""
    return config.changed(settings, {"optimizer.betas": settings["optimizer"]["betas"][::-1]})


def mended(answer: Mapping[str, Any], settings: Mapping[str, Any]) -> Verdict:
    """Their settings without the slip."""
    if not isinstance(answer, Mapping):
        raise Unfit(f"settings are asked for, as `broken` has them; yours is of type {type(answer).__name__}")
    wanted, found = config.flatten(settings), config.flatten(answer)
    fields = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    slip = "optimizer.betas"
    if not fields:
        return right(
            "Adam's first step is as long whatever the betas are, so they show in the third norm and not before."
        )
    if others := [name for name in fields if name != slip]:
        return wrong(
            f"{others[0]} was as Bridge has it before you changed it: look at what still agrees, and leave that alone."
        )
    if found.get(slip) == [0.9, 0.999]:
        return wrong("Those are PyTorch's own; Bridge's recipe has others, in `cfg.optimizer`.")
    return wrong(
        "The rates agree, so it is not the schedule; the first loss and norm agree, so it is not weights or data. "
        "What does an optimizer remember from one step to the next?"
    )

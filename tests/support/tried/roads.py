"""Answers to the exercises of lesson 19."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from course_lib.common import config
from course_lib.lesson.exercises import roads
from support.tried import Tried, run

SENT = pd.DataFrame(
    {
        "operation": ["all_gather", "all_gather", "reduce_scatter"],
        "bytes": [400, 100, 400],
        "group_size": [8, 8, 8],
        "count": [1, 3, 1],
    }
)
SETTINGS = {"optimizer": {"betas": [0.9, 0.95], "lr": 1e-3}, "dataset": {"seed": 1234}}


def gradient_share(folder: Path) -> Tried:
    """400 of 1,100 bytes."""
    return Tried(
        4 / 11, [(400 / 11, "percent"), (7 / 11, "everything else"), (350.0, "bytes"), (0.2, "messages")], [SENT]
    )


def replicated(folder: Path) -> Tried:
    """Two groups of four, and what people try instead."""
    policy = {"param_dtype": "float32"}

    def made(name, *, losses=(7.0, 6.5), ranks=8, trainer="AutoModel", **distributed):
        about = {"ranks": ranks, "trainer": trainer}
        return run(folder, name, losses=losses, config={"distributed": distributed}, launch=about)

    two = {"strategy": "fsdp2", "dp_replicate_size": 2, "mp_policy": policy}
    bridge = made("bridge", trainer="Bridge")
    wrong = [
        (bridge, "not AutoModel's"),
        (made("few", ranks=2, **two), "8 are asked for"),
        (made("sharded", strategy="fsdp2", mp_policy=policy), "one copy of the model or eight"),
        (made("plain", strategy="ddp"), "one copy of the model or eight"),
        (made("four", **two | {"dp_replicate_size": 4}), "two are asked for"),
        (made("narrow", strategy="fsdp2", dp_replicate_size=2), "bf16"),
        (made("other", losses=(7.0, 6.0), **two), "is anything else different"),
    ]
    return Tried(made("good", **two), wrong, [bridge, 1e-5])


def mended(folder: Path) -> Tried:
    """Betas in their order."""
    broken = roads.theirs(SETTINGS)
    theirs = {"optimizer.betas": [0.9, 0.999]}
    seed = config.changed(broken, {"dataset.seed": 1})
    wrong = [(broken, "optimizer remember"), (seed, "dataset.seed was as Bridge has it")]
    wrong += [(config.changed(SETTINGS, theirs), "PyTorch's own"), (0.9, "settings are asked for")]
    return Tried(SETTINGS, wrong, [SETTINGS])

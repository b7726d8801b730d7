"""A planted fault for lesson 08: one rank keeps memory that nobody needs, step after step.  Runs in rank processes."""

from __future__ import annotations

import os

from course_lib.ranks import train

__all__ = ["BYTES_PER_STEP", "RANK", "rank_main"]

RANK = 3
BYTES_PER_STEP = 16 * 2**20


class _Leak:
    """At the start of each step, puts 16 MiB into a list and forgets them."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def on_train_step_start(self, context: object) -> None:
        import torch

        self.kept.append(torch.ones(BYTES_PER_STEP // 4, device="cuda"))  # the CPU in a CPU rank


def rank_main(run_directory: str, cfg: object = None) -> None:
    """Train as always, but rank 3 leaks."""
    leaks = int(os.environ["RANK"]) == RANK
    train.rank_main(run_directory, cfg, callbacks=[_Leak()] if leaks else [])

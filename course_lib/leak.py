"""A planted fault for lesson 08: one rank keeps memory that nobody needs, step after step.  Runs in rank processes."""

from __future__ import annotations

import os

from course_lib import train

__all__ = ["BYTES_PER_STEP", "RANK", "rank_main"]

RANK = 3
BYTES_PER_STEP = 16 * 2**20


def rank_main(run_directory: str) -> None:
    """Train as always, but on rank 3 a callback puts 16 MiB into a list at the end of each step and forgets them."""
    if int(os.environ["RANK"]) == RANK:
        _leak_in(train)
    train.rank_main(run_directory)


def _leak_in(module: object) -> None:
    import torch

    original, kept = module.recorder, []

    def recorder(*args: object, **kwargs: object) -> object:
        callback = original(*args, **kwargs)
        kind = type(callback)
        before = kind.on_train_step_end

        def on_train_step_end(self: object, context: object) -> None:
            kept.append(torch.ones(BYTES_PER_STEP // 4))
            before(self, context)

        kind.on_train_step_end = on_train_step_end
        return callback

    module.recorder = recorder

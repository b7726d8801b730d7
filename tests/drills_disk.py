"""The full-disk drill: rank 1 fills what is left of the run's file system, then training goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

from course_lib import train


def fills_the_disk(run_directory: str) -> None:
    """Fill the disk in the second step of rank 1; whoever writes next meets it."""
    if os.environ["RANK"] == "1":
        original = train.recorder

        def recorder(*args: object, **kwargs: object) -> object:
            callback = original(*args, **kwargs)
            kind = type(callback)
            before = kind.on_train_step_end

            def on_train_step_end(self: object, context: object) -> None:
                before(self, context)
                if context.state.train_state.step + 1 == 2:
                    time.sleep(0.5)  # the other rank has written its line of this step by now
                    with open(Path(run_directory) / "filler", "wb", buffering=0) as filler:
                        while True:
                            filler.write(b"0" * 1024)

            kind.on_train_step_end = on_train_step_end
            return callback

        train.recorder = recorder
    train.rank_main(run_directory)

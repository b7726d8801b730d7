"""What recording costs: steps with and without it take turns within one run."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from course_lib import launch
from course_lib.ranks import recording, train
from tests import bench

__all__ = ["figures", "rank_main"]

STEPS = 60
WARM_STEPS = 6


class _Alternating:
    """Records every second step, and notes how long each took, on the clock and on the processor."""

    def __init__(self, path: Path, rank: int) -> None:
        self.recorder = recording.Recorder(path, rank)
        self.rows: list[tuple[int, float, float]] = []

    def on_train_step_start(self, context: object) -> None:
        import torch

        step = context.state.train_state.step
        if step % 2:
            self.recorder.install()
            self.recorder.know(context.model)
        torch.distributed.barrier()
        if step % 2:
            self.recorder.step = step + 1
        self.begin = time.perf_counter(), time.process_time()

    def on_train_step_end(self, context: object) -> None:
        step = context.state.train_state.step
        if step % 2:
            self.recorder.write()
            self.recorder.step = None
        self.rows.append((step % 2, time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))
        self.recorder.remove()


def rank_main(run_directory: str, cfg: object = None) -> list[tuple[int, float, float]]:
    """Train, and record every second step."""
    alternating = _Alternating(Path(run_directory), int(os.environ["RANK"]))
    train.rank_main(run_directory, cfg, callbacks=[alternating])
    return alternating.rows[WARM_STEPS:]


def figures(config: Path) -> list[bench.Figure]:
    """Two rows: a recorded step over one that is not, by the clock and by processor time.

    Args:
        config: The benchmark's configuration, at TP=2 on 8 ranks.
    """
    path, ratios = bench.changed(config, train__train_iters=STEPS), []
    for _ in range(bench.REPEATS):
        run = launch.run(path, ranks=8, name="recorder", show=None, target="tests.bench.recorder:rank_main")
        steps = [
            (of_all[0][0], max(row[1] for row in of_all), sum(row[2] for row in of_all))
            for of_all in zip(*run.answers(), strict=True)
        ]
        with_it, without = ([row for row in steps if row[0] == on] for on in (1, 0))
        ratios.append(
            [statistics.median(r[i] for r in with_it) / statistics.median(r[i] for r in without) for i in (1, 2)]
        )
    note = "TP=2 DP=4, every collective; steps in turn"
    return [
        bench.figure(f"an 8-rank step recorded / not recorded, {kind}", r, "x", must, "1.02", note)
        for kind, must, r in zip(("clock", "processor"), ("at most 1.05", "-"), zip(*ratios, strict=True), strict=True)
    ]

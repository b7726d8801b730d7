"""How long a save and a resume take, against the bytes of the checkpoint and against plain writing of as many bytes."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from course_lib import launch, runs
from course_lib.ranks import train
from course_lib.runs import checkpoints
from tests import bench

__all__ = ["figures", "rank_main"]

TARGET = "tests.bench.checkpoints:rank_main"
WIDTHS = (128, 512)
"""Hidden sizes of the two models, so that what each byte costs and what each save costs can be told apart."""


class _Clock:
    """Notes when the model is ready, which includes a checkpoint's loading, and how long each save takes."""

    def __init__(self) -> None:
        self.began, self.ready, self.step_ended = time.perf_counter(), 0.0, 0.0
        self.saves: list[float] = []

    def on_data_init_start(self, context: object) -> None:
        self.ready = time.perf_counter() - self.began

    def on_train_step_end(self, context: object) -> None:
        self.step_ended = time.perf_counter()

    def on_checkpoint_save(self, context: object) -> None:
        self.saves.append(time.perf_counter() - self.step_ended)


def rank_main(run_directory: str, cfg: object = None) -> dict:
    """Train as always, with a clock."""
    clock = _Clock()
    train.rank_main(run_directory, cfg, callbacks=[clock])
    return {"ready_seconds": clock.ready, "save_seconds": clock.saves}


def figures(work: Path, config: Path) -> list[bench.Figure]:
    """Rows for two sizes of a model, on 8 ranks with the distributed optimizer.

    Args:
        work: A directory for files of a few hundred megabytes.
        config: The benchmark's configuration.
    """
    found = []
    for width in WIDTHS:
        layers = {"model__hidden_size": width, "model__ffn_hidden_size": 2 * width}
        sharded = {"ddp__use_distributed_optimizer": True, "optimizer__use_distributed_optimizer": True}
        save = {"checkpoint__save_interval": 1, "checkpoint__most_recent_k": 1}
        portable = {"checkpoint__dist_ckpt_optim_fully_reshardable": True}
        cfg = bench.changed(config, train__train_iters=3, **layers, **sharded, **save, **portable)
        saves, loads, plain, size_megabytes = [], [], [], 0.0
        for _ in range(bench.REPEATS):
            saved = launch.run(cfg, ranks=8, name="saves", show=None, save=True, target=TARGET)
            resumed = launch.run(cfg, ranks=8, name="resumes", show=None, load=saved, target=TARGET)
            size_megabytes = checkpoints.latest(saved).size_bytes / 1e6
            saves.append(statistics.median(max(times) for times in zip(*_clocks(saved, "save_seconds"), strict=True)))
            loads.append(max(_clocks(resumed, "ready_seconds")) - max(_clocks(saved, "ready_seconds")))
            plain.append(_write_seconds(work, int(size_megabytes * 1e6)))
        of = f"{size_megabytes:.0f} MB"
        ratios = [mine / theirs for mine, theirs in zip(saves, plain, strict=True)]
        found += [
            _figure(f"save of {of}, 8 ranks", saves, "s", "end of a step to the callback; median of 3 saves"),
            _figure(f"save of {of} / plain write", ratios, "x", "one process, one file, fsync"),
            _figure(
                f"resume from {of}, 8 ranks", loads, "s", "time until the model is ready, less that without loading"
            ),
        ]
    return found


def _figure(name: str, samples: list[float], unit: str, note: str) -> bench.Figure:
    return bench.figure(name, samples, unit, "report", "-", note)


def _clocks(run: runs.Run, name: str) -> list:
    return [answer[name] for answer in run.answers()]


def _write_seconds(work: Path, size_bytes: int) -> float:
    content = os.urandom(2**20) * (size_bytes // 2**20 + 1)
    begin = time.perf_counter()
    with open(work / "plain.bin", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin

"""The bench's figure of memory: what eight ranks share, because they are forks of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from course_lib import launch, runs
from tests import bench

__all__ = ["shared"]


def shared(config: Path) -> bench.Figure:
    """Proportional set size of eight ranks in training, over eight times that of a run with one rank."""

    def total_bytes(ranks: int, layout: dict[str, int]) -> float:
        path = bench.changed(config, train__train_iters=1000, **layout)
        return _while_training(path, ranks, _proportional_bytes)

    ratios = []
    for _ in range(bench.REPEATS):
        eight = total_bytes(8, {"model__tensor_model_parallel_size": 2})
        ratios.append(eight / (8 * total_bytes(1, {"model__tensor_model_parallel_size": 1})))
    return bench.figure(
        "memory of 8 ranks / 8 times one rank",
        ratios,
        "x",
        "at most 0.5",
        "0.3",
        "proportional set size, after some steps",
    )


class _Seen(Exception):
    """What there was to see was seen."""


def _while_training(path: Path, ranks: int, look: Callable[[list[int]], float]) -> float:
    """Start a run, look at its ranks after three steps, and stop it."""
    found: list[float] = []

    def watch(run: runs.Run) -> None:
        if len(run.metrics) >= 3:
            found.append(look([entry["pid"] for entry in run.ranks().values()]))
            raise _Seen

    with contextlib.suppress(_Seen):
        launch.run(path, ranks=ranks, name="memory", show=None, watch=watch)
    return found[0]


def _proportional_bytes(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total

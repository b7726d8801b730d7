"""The bench's figures of the time until something runs: imports, launches, and `make run` in a fresh clone."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from course_lib import launch
from course_lib.common.project import PROJECT
from course_lib.experiments import hello
from tests import bench

__all__ = ["figures", "fresh_clone", "import_ratio", "slope"]


def import_ratio() -> bench.Figure:
    """Processor time of all that a rank imports, over that of torch alone."""
    rank = "from course_lib.ranks import preload"
    for code in ("import torch", rank):
        _processor_seconds(code)  # writes the bytecode that is missing
    ratios = [_processor_seconds(rank) / _processor_seconds("import torch") for _ in range(bench.REPEATS)]
    return bench.figure(
        "import of a rank / import torch", ratios, "x", "at most 3.1", "2.5", "processor time, compiled bytecode"
    )


def _processor_seconds(code: str) -> float:
    """User and system time of a fresh Python that runs some code."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "TORCHDYNAMO_DISABLE")}
    before = os.times()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def figures(config: Path) -> list[bench.Figure]:
    """Seconds of a warm launch and of torchrun, of the ranks until they live, and of a step.

    Args:
        config: A small configuration of five steps, TP=2.
    """

    def seconds(launcher: str) -> tuple[float, float]:
        begin = time.perf_counter()
        run = launch.run(config, ranks=8, name=launcher, launcher=launcher, show=None)
        return time.perf_counter() - begin, run.metrics.elapsed_ms[1:].median()

    hello.ranks(8)  # the fork server has imported the stack
    seconds("warm")
    warm = [seconds("warm") for _ in range(bench.REPEATS)]
    cold = [seconds("torchrun")]
    alive = [float(hello.ranks(8).seconds.max()) for _ in range(bench.REPEATS)]
    warm_median = statistics.median(w for w, _ in warm)
    long = bench.changed(config, train__train_iters=20)
    steps = [
        launch.run(long, ranks=8, name="steps", show=None).metrics.elapsed_ms[3:].median() for _ in range(bench.REPEATS)
    ]
    return [
        bench.figure(
            "8 ranks, 5 tiny steps: torchrun / warm",
            [c / warm_median for c, _ in cold],
            "x",
            "at least 10",
            "20",
            "end to end",
        ),
        bench.figure("8 ranks, 5 tiny steps, warm", [w for w, _ in warm], "s", "-", "-", "end to end"),
        bench.figure("ranks alive after a warm launch", alive, "s", "at most 1", "0.5", "the last of 8 ranks"),
        bench.figure(
            "one 8-rank step, TP=2 DP=4", steps, "ms", "report", "0.8 of the prototype", "the prototype's shape"
        ),
    ]


def slope() -> bench.Figure:
    """Slope of the time until the last rank is alive, over 1, 2, 4, 8 and 16 ranks."""
    import numpy as np

    counts = [1, 2, 4, 8, 16]
    slopes = []
    for _ in range(bench.REPEATS):
        seconds = [float(hello.ranks(count).seconds.max()) for count in counts]
        slopes.append(float(np.polyfit(counts, seconds, 1)[0]) * 1e3)
    return bench.figure(
        "launch time for each further rank", slopes, "ms", "linear", "at most 50", "fit over 1, 2, 4, 8, 16 ranks"
    )


def fresh_clone(work: Path) -> bench.Figure:
    """Seconds from `make run` in a fresh clone, with packages cached, to the first loss."""
    clone = work / "clone"
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("COURSE_RUNS", "VIRTUAL_ENV")}
    if shutil.which("uv") is None and (PROJECT / ".tools" / "bin").exists():
        environment["PATH"] = f"{PROJECT / '.tools' / 'bin'}{os.pathsep}{environment['PATH']}"
    begin = time.time()
    with open(work / "fresh.txt", "w") as log:
        process = subprocess.Popen(
            ["make", "run"], cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        metrics = clone / "runs" / "smoke" / "metrics.jsonl"
        try:
            while not (metrics.exists() and metrics.read_text().count("\n")):
                if process.poll() is not None:
                    raise RuntimeError(f"make run ended early:\n{(work / 'fresh.txt').read_text()[-2000:]}")
                time.sleep(0.1)
            seconds = time.time() - begin
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 15)
                process.wait()
    return bench.figure(
        "fresh clone to the first loss of `make run`", [seconds], "s", "at most 120", "60", "packages cached"
    )

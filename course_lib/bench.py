"""How fast the engine is: ratios measured within one run, medians of interleaved repeats.

A ratio of two things measured side by side says something on a busy machine too; seconds do not.  Nothing here is a
test: the figures are written to `bench/` and shown beside what they should reach.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Figure", "changed", "figure", "main"]

REPEATS = 3
PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: What was measured.
        value: The median, in `unit`.
        unit: Its unit; "x" for a ratio.
        must: The bound it must reach, as text.
        aim: The bound it should reach, as text.
        samples: All repeats.
        note: How it was measured.
    """

    name: str
    value: float
    unit: str
    must: str
    aim: str
    samples: tuple[float, ...]
    note: str


def main() -> int:
    """Measure everything, write `bench/results.json`, and print a table; returns 0."""
    from rich.console import Console
    from rich.table import Table

    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="course-bench-") as work:
        os.environ["COURSE_RUNS"] = work
        config = _tiny_config(Path(work))
        for measure in (
            lambda: [_import_ratio()],
            lambda: _launches(config),
            lambda: _recorder_overhead(config),
            lambda: _checkpoints(Path(work), config),
            lambda: [_against_hugging_face(config)],
            lambda: [_shared_memory(config)],
            lambda: [_launch_against_ranks()],
            lambda: _text(Path(work)),
            lambda: _course_run(Path(work)),
            lambda: _planner(),
            lambda: [_fresh_clone(Path(work))],
        ):
            found = measure()
            figures += found
            for figure in found:
                print(f"{figure.name}: {figure.value:.2f} {figure.unit}", file=sys.stderr, flush=True)
    home = PROJECT / "bench"
    home.mkdir(exist_ok=True)
    (home / "results.json").write_text(
        json.dumps({"machine": _machine(), "figures": [asdict(figure) for figure in figures]}, indent=1) + "\n"
    )
    table = Table("figure", "measured", "must reach", "aim", "spread", "how")
    for figure in figures:
        spread = f"{min(figure.samples):.2f} to {max(figure.samples):.2f}"
        table.add_row(figure.name, f"{figure.value:.2f} {figure.unit}", figure.must, figure.aim, spread, figure.note)
    Console(width=160 if not sys.stdout.isatty() else None).print(table)
    print(f"written to {home / 'results.json'}")
    return 0


def figure(name: str, samples: list[float], unit: str, must: str, aim: str, note: str) -> Figure:
    """A figure whose value is the median of its samples."""
    return Figure(name, statistics.median(samples), unit, must, aim, tuple(samples), note)


def _machine() -> dict[str, Any]:
    import platform

    import psutil

    from course_lib import stack

    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": stack.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _checkpoints(work: Path, config: Path) -> list[Figure]:
    from course_lib import bench_checkpoints

    return bench_checkpoints.figures(work, config)


def _text(work: Path) -> list[Figure]:
    from course_lib import bench_text

    return bench_text.figures(work / "text")


def _course_run(work: Path) -> list[Figure]:
    from course_lib import bench_step

    return bench_step.course_run(work / "course-run")


def _planner() -> list[Figure]:
    from course_lib import bench_planner

    return bench_planner.figures()


def _processor_seconds(code: str) -> float:
    """User and system time of a fresh Python that runs some code."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "TORCHDYNAMO_DISABLE")}
    before = os.times()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _import_ratio() -> Figure:
    rank = (
        "from course_lib import stack; stack.prepare_imports();"
        "from megatron.bridge.training.pretrain import pretrain;"
        "from megatron.bridge.training.finetune import finetune;"
        "from megatron.bridge.training.gpt_step import forward_step"
    )
    for code in ("import torch", rank):
        _processor_seconds(code)  # writes the bytecode that is missing
    ratios = [_processor_seconds(rank) / _processor_seconds("import torch") for _ in range(REPEATS)]
    return figure(
        "import of a rank / import torch", ratios, "x", "at most 4.0", "3", "processor time, compiled bytecode"
    )


def _tiny_config(work: Path) -> Path:
    """The prototype's shape: 787,584 parameters, sequence 128, global batch 16, micro batch 2, TP=2."""
    from course_lib import stack

    stack.prepare_imports()
    import torch.nn.functional as F
    from megatron.bridge.recipes.gpt.vanilla_gpt import vanilla_gpt_pretrain_config

    cfg = vanilla_gpt_pretrain_config()
    m = cfg.model
    m.num_layers, m.hidden_size, m.num_attention_heads, m.ffn_hidden_size, m.seq_length = 4, 128, 4, 256, 128
    m.activation_func, m.gated_linear_unit, m.normalization, m.position_embedding_type = F.silu, True, "RMSNorm", "rope"
    m.add_bias_linear = False
    m.hidden_dropout = m.attention_dropout = 0.0
    m.tensor_model_parallel_size, m.make_vocab_size_divisible_by = 2, 8
    cfg.tokenizer.vocab_size = 1023
    cfg.dataset.seq_length = 128
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 5, 16, 2
    cfg.validation.eval_interval, cfg.validation.eval_iters = 1000, 0
    cfg.logger.log_interval = 1
    cfg.optimizer.lr, cfg.scheduler.lr_warmup_iters = 1e-3, 2
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = False
    cfg.checkpoint.save = cfg.checkpoint.load = cfg.logger.tensorboard_dir = None
    cfg.to_yaml(str(work / "tiny.yaml"))
    return work / "tiny.yaml"


def changed(config: Path, **fields: object) -> Path:
    """A copy of a configuration file with some top-level or nested scalar fields changed, as `section__field`."""
    import yaml

    content = yaml.safe_load(config.read_text())
    for name, value in fields.items():
        section, field = name.split("__")
        content[section][field] = value
    path = config.with_name("-".join([config.stem, *map(str, fields.values())]) + ".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def _launches(config: Path) -> list[Figure]:
    from course_lib import hello, launch

    def seconds(launcher: str) -> tuple[float, float]:
        begin = time.perf_counter()
        run = launch.run(config, ranks=8, name=launcher, launcher=launcher, show=None)
        return time.perf_counter() - begin, run.metrics.elapsed_ms[1:].median()

    hello.ranks(8)  # the fork server has imported the stack
    seconds("warm")
    warm = [seconds("warm") for _ in range(REPEATS)]
    cold = [seconds("torchrun")]
    alive = [float(hello.ranks(8).seconds.max()) for _ in range(REPEATS)]
    warm_median = statistics.median(w for w, _ in warm)
    long = changed(config, train__train_iters=20)
    steps = [launch.run(long, ranks=8, name="steps", show=None).metrics.elapsed_ms[3:].median() for _ in range(REPEATS)]
    return [
        figure(
            "8 ranks, 5 tiny steps: torchrun / warm",
            [c / warm_median for c, _ in cold],
            "x",
            "at least 10",
            "20",
            "end to end",
        ),
        figure("8 ranks, 5 tiny steps, warm", [w for w, _ in warm], "s", "-", "-", "end to end"),
        figure("ranks alive after a warm launch", alive, "s", "at most 1", "0.5", "the last of 8 ranks"),
        figure("one 8-rank step, TP=2 DP=4", steps, "ms", "report", "0.8 of the prototype", "the prototype's shape"),
    ]


def _recorder_overhead(config: Path) -> list[Figure]:
    from course_lib import bench_recorder

    return bench_recorder.figures(config)


def _against_hugging_face(config: Path) -> Figure:
    from course_lib import bench_step

    path = changed(config, train__train_iters=60, train__global_batch_size=4, model__tensor_model_parallel_size=1)
    seconds = bench_step.in_one_rank(path, threads=1)
    pairs = list(zip(seconds["bridge"], seconds["hugging face"], strict=False))
    groups = [pairs[i : i + 10] for i in range(0, len(pairs) - 9, 10)]
    ratios = [statistics.median(b for b, _ in g) / statistics.median(h for _, h in g) for g in groups]
    return figure(
        "one step of a 1-rank Bridge run / Hugging Face Llama",
        ratios,
        "x",
        "at most 1.30",
        "1.15",
        "same size, interleaved",
    )


def _shared_memory(config: Path) -> Figure:
    """Proportional set size of eight ranks in training, over eight times that of a run with one rank."""

    def total_bytes(ranks: int, layout: dict[str, int]) -> float:
        path = changed(config, train__train_iters=1000, **layout)
        return _while_training(path, ranks, _proportional_bytes)

    ratios = []
    for _ in range(REPEATS):
        eight = total_bytes(8, {"model__tensor_model_parallel_size": 2})
        ratios.append(eight / (8 * total_bytes(1, {"model__tensor_model_parallel_size": 1})))
    return figure(
        "memory of 8 ranks / 8 times one rank",
        ratios,
        "x",
        "at most 0.5",
        "0.3",
        "proportional set size, after some steps",
    )


def _while_training(path: Path, ranks: int, look: Callable[[list[int]], float]) -> float:
    """Start a run, look at its ranks after three steps, and stop it."""
    from course_lib import runs, warm

    run = runs.Run(runs.create("memory"))
    shutil.copyfile(path, run.path / "config.yaml")
    runs.write_json(run.path / "launch.json", {"ranks": ranks, "device": "cpu"})
    launched = warm.lease().launch(
        "course_lib.train:rank_main", str(run.path), ranks=ranks, log=run.path / "log.txt", env={"OMP_NUM_THREADS": "1"}
    )
    try:
        while len(run.again().metrics) < 3:
            if launched.wait(0.2) is not None:
                raise RuntimeError(f"the run ended early: {run.outcome}")
        return look([entry["pid"] for entry in run.ranks().values()])
    finally:
        launched.stop()
        launched.wait_for(30)
        launched.close()


def _proportional_bytes(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def _launch_against_ranks() -> Figure:
    """Slope of the time until the last rank is alive, over 1, 2, 4, 8 and 16 ranks."""
    import numpy as np

    from course_lib import hello

    counts = [1, 2, 4, 8, 16]
    slopes = []
    for _ in range(REPEATS):
        seconds = [float(hello.ranks(count).seconds.max()) for count in counts]
        slopes.append(float(np.polyfit(counts, seconds, 1)[0]) * 1e3)
    return figure(
        "launch time for each further rank", slopes, "ms", "linear", "at most 50", "fit over 1, 2, 4, 8, 16 ranks"
    )


def _fresh_clone(work: Path) -> Figure:
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
    return figure("fresh clone to the first loss of `make run`", [seconds], "s", "at most 120", "60", "packages cached")

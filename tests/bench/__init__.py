"""How fast the engine is: ratios measured within one run, medians of interleaved repeats.

A ratio of two things measured side by side says something on a busy machine too; seconds do not.  Nothing here is a
test: the figures are written to `bench/` and shown beside what they should reach.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course_lib import runs
from course_lib.common.config import changed as copied_with
from course_lib.common.project import PROJECT

__all__ = ["Figure", "UnknownPart", "changed", "figure", "main", "parts"]

REPEATS = 3


class UnknownPart(ValueError):
    """The bench has no part of that name."""


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


def main(only: Sequence[str] = ()) -> int:
    """Measure everything, write `bench/results.json`, and print a table; returns 0.

    Args:
        only: Parts to measure instead of all of them; then nothing is written, and the table is all.

    Raises:
        UnknownPart: If a part does not exist; the message names those that do.
    """
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="course-bench-") as work:
        os.environ["COURSE_RUNS"] = work
        every = parts(Path(work))
        if unknown := sorted(set(only) - every.keys()):
            raise UnknownPart(f"no part of the bench is named {', '.join(unknown)}: choose from {', '.join(every)}")
        for measure in (every[name] for name in only or every):
            found = measure()
            figures += found
            for figure in found:
                print(f"{figure.name}: {figure.value:.2f} {figure.unit}", file=sys.stderr, flush=True)
    _print(figures)
    if not only:
        home = PROJECT / "bench"
        home.mkdir(exist_ok=True)
        results = {"machine": _machine(), "figures": [asdict(figure) for figure in figures]}
        runs.write_json(home / "results.json", results)
        print(f"written to {home / 'results.json'}")
    return 0


def parts(work: Path) -> dict[str, Callable[[], list[Figure]]]:
    """What the bench measures, by name, in the order in which it does.

    Args:
        work: An empty directory for texts and runs.
    """
    from tests.bench import checkpoints, launch, memory, planner, recorder, step, text

    config = functools.cache(lambda: _tiny_config(work))
    return {
        "import": lambda: [launch.import_ratio()],
        "launch": lambda: launch.figures(config()),
        "recorder": lambda: recorder.figures(config()),
        "checkpoints": lambda: checkpoints.figures(work, config()),
        "tiny-step": lambda: [_against_hugging_face(config())],
        "memory": lambda: [memory.shared(config())],
        "slope": lambda: [launch.slope()],
        "text": lambda: text.figures(work / "text"),
        "course-run": lambda: step.course_run(work / "course-run"),
        "planner": lambda: planner.figures(),
        "fresh-clone": lambda: [launch.fresh_clone(work)],
    }


def _print(figures: list[Figure]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "measured", "must reach", "aim", "spread", "how")
    for figure in figures:
        spread = f"{min(figure.samples):.2f} to {max(figure.samples):.2f}"
        table.add_row(figure.name, f"{figure.value:.2f} {figure.unit}", figure.must, figure.aim, spread, figure.note)
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


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

    values = {name.replace("__", "."): value for name, value in fields.items()}
    content = copied_with(yaml.safe_load(config.read_text()), values)
    path = config.with_name("-".join([config.stem, *map(str, fields.values())]) + ".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def _against_hugging_face(config: Path) -> Figure:
    from tests.bench import step

    path = changed(config, train__train_iters=60, train__global_batch_size=4, model__tensor_model_parallel_size=1)
    seconds = step.in_one_rank(path, threads=1)
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

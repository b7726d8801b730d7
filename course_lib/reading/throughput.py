"""What a run's log says about its speed: steady steps, tokens per second, and FLOPs by two accountings.

A step's work is counted, never measured: a formula gives the floating-point operations that the *model* needs, and the
log gives the time.  Everybody counts the matrix multiplications as two operations for each weight and token, three
times over (once forward, twice backward).  Accountings differ in attention: half of its score matrix is masked, and
some count the masked half.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = [
    "Throughput",
    "as_printed",
    "bridge_lines",
    "bridge_log",
    "bridge_state_bytes",
    "machine_flops_per_second",
    "steady",
    "throughput",
]

LINE = re.compile(r"iteration +(\d+)/ *\d+ \|.*")
FIELDS = {
    "elapsed_ms": r"elapsed time per iteration \(ms\): ([\d.]+)",
    "tflops_per_rank": r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)",
    "learning_rate": r"learning rate: ([\d.E+-]+)",
    "global_batch_size": r"global batch size: +(\d+)",
    "loss": r"(?i)lm loss: ([\d.E+-]+|nan|-?inf)",
    "grad_norm": r"(?i)grad norm: ([\d.]+|nan|inf)",
    "skipped": r"number of skipped iterations: +(\d+)",
    "nan": r"number of nan iterations: +(\d+)",
}
"""Name here to pattern in Bridge's line.  Source: megatron-bridge 0.6.2 training/utils/train_utils.py training_log."""


@dataclass(frozen=True)
class Throughput:
    """How fast a run was over some steps.

    Attributes:
        tokens_per_second: All tokens divided by all seconds; this is the rate that a budget needs.
        mean_of_rates: The average of each step's own rate, tokens/s; never below `tokens_per_second`.
    """

    steps: int
    tokens_per_second: float
    mean_of_rates: float
    median_step_ms: float


def steady(run: Run, *, skip: int = 5) -> pd.DataFrame:
    """The steps that say how fast a run is: without the first ones, and without steps that changed no weight.

    Args:
        run: A run with `metrics`.
        skip: Steps to leave out at the start; they open connections, allocate memory and build caches.

    Returns:
        The other rows of `run.metrics`.

    Raises:
        ValueError: If no step is left.
    """
    metrics = run.metrics
    kept = metrics.iloc[skip:]
    kept = kept[~kept["skipped"].astype(bool)]
    if kept.empty:
        raise ValueError(f"skip={skip} leaves none of {len(metrics)} steps: train longer, or skip fewer")
    return kept


def throughput(steps: pd.DataFrame) -> Throughput:
    """Tokens per second over some steps, and the average that is often mistaken for it.

    Args:
        steps: Rows of `run.metrics`, such as those of :func:`steady`.

    Raises:
        ValueError: If there is no step, or none that took time.

    >>> import pandas as pd
    >>> two = pd.DataFrame({"tokens": [100, 100], "elapsed_ms": [1000.0, 3000.0], "tokens_per_second": [100, 100 / 3]})
    >>> throughput(two).tokens_per_second, round(throughput(two).mean_of_rates, 1)
    (50.0, 66.7)
    """
    seconds = steps["elapsed_ms"].sum() / 1e3
    if not seconds > 0:
        raise ValueError(f"{len(steps)} steps in {seconds:g} s have no throughput: give steps of a run that trained")
    return Throughput(
        steps=len(steps),
        tokens_per_second=float(steps["tokens"].sum() / seconds),
        mean_of_rates=float(steps["tokens_per_second"].mean()),
        median_step_ms=float(steps["elapsed_ms"].median()),
    )


def bridge_log(run: Run) -> pd.DataFrame:
    """Bridge's own lines, read from the log of the last rank; see `bridge_lines`.

    Args:
        run: A run that logged at least once.

    Raises:
        ValueError: If the log has no such line, or one without a loss.
    """
    found = bridge_lines(run.log(int(run.launch.get("ranks", 1)) - 1))
    if found.empty:
        raise ValueError(f"run {run.name!r} has no line 'iteration ...': is cfg.logger.log_interval above train_iters?")
    return found


def bridge_lines(text: str) -> pd.DataFrame:
    """Bridge's own lines in what a rank wrote, one row for each logging interval; none, and the table is empty.

    `loss` and `elapsed_ms` are averages over the interval that ends at `step`; `grad_norm` and `learning_rate` are
    those of its last step.

    Raises:
        ValueError: If a line has no loss.

    >>> bridge_lines(" iteration  3/ 4 | lm loss: 6.5E+00 | grad norm: 1.250 |")[["step", "loss", "grad_norm"]].values.tolist()
    [[3.0, 6.5, 1.25]]
    """
    import pandas as pd

    rows = []
    for line in LINE.finditer(text):
        found = {name: re.search(pattern, line.group()) for name, pattern in FIELDS.items()}
        if found["loss"] is None:
            raise ValueError(f"Bridge's line of step {line.group(1)} has no 'lm loss': {line.group()[:200]}")
        rows.append(
            {"step": int(line.group(1))} | {name: float(hit.group(1)) if hit else None for name, hit in found.items()}
        )
    return pd.DataFrame(rows, columns=["step", *FIELDS])


def as_printed(metrics: pd.DataFrame) -> pd.DataFrame:
    """Steps, losses and gradient norms with the digits that Bridge prints, to hold a run against what a log says.

    Args:
        metrics: `run.metrics`.
    """
    digits = {"loss": ".6E", "grad_norm": ".3f"}
    return metrics[["step"]].assign(
        **{name: [float(f"{v:{form}}") for v in metrics[name]] for name, form in digits.items()}
    )


def bridge_state_bytes(run: Run) -> float:
    """The theoretical memory of weights and optimizer that Bridge prints, in bytes on the most loaded rank.

    Bridge writes "MB" and divides by 2**20, so its number is in MiB.

    Source: megatron-bridge 0.6.2 training/utils/theoretical_memory_utils.py, report_theoretical_memory.
    """
    found = re.search(r"weight and optimizer=([\d.]+) MB", run.log(0))
    if found is None:
        raise ValueError(f"run {run.name!r} has no line 'Theoretical memory footprints' in the log of rank 0")
    return float(found.group(1)) * 2**20


def machine_flops_per_second(*, size: int = 1024, repeats: int = 40) -> float:
    """How fast does this machine multiply large fp32 matrices, with all cores?

    Other programs slow it down, so the fastest of many is taken; beside a run it is a hint, and no bound to assert.

    Returns:
        Floating-point operations per second.
    """
    import torch

    one, other = torch.rand(size, size), torch.rand(size, size)
    product = one @ other  # the first call starts the threads
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(one, other, out=product)  # no new memory: only the multiplication is timed
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)

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
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields
from course_lib.planning.closed_forms import mixers

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = [
    "Throughput",
    "as_printed",
    "bridge_lines",
    "bridge_log",
    "bridge_state_bytes",
    "flops_per_token",
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
        steps: Number of steps.
        tokens_per_second: All tokens divided by all seconds; this is the rate that a budget needs.
        mean_of_rates: The average of each step's own rate, tokens/s; never below `tokens_per_second`.
        median_step_ms: Time of the middle step.
    """

    steps: int
    tokens_per_second: float
    mean_of_rates: float
    median_step_ms: float


def flops_per_token(model: Any, *, vocab_size: int, seq_length: int | None = None, causal: bool = True) -> float:
    """How many floating-point operations does a model need to train on one token?

    With M weights that a token is multiplied with, L attention layers, a heads of c channels and s tokens in a sequence::

        6 M  +  6 L s a c      attention counted as it is masked: each token looks at s/2 tokens on average
        6 M  + 12 L s a c      the whole square counted

    M leaves out the norms and, where input and output embeddings differ, the input one: it is a lookup.  Of experts M holds
    the chosen ones at their own width, the shared one and the router; latent attention and each token predicted ahead count
    by their own matrices.  A Mamba layer adds 21 operations for each inner channel and state.

    Args:
        model: A Bridge model provider, a `ConfigContainer`, or a mapping with Megatron's field names.
        vocab_size: Rows of the output layer, padded already.
        seq_length: Tokens in a sequence; the model's own by default.
        causal: Count only the half of attention that is not masked, and of a window what it shows.

    Returns:
        FLOPs per token, forward and backward; optimizer and norms are not counted.

    Raises:
        ValueError: If a layer is of a kind that is not counted; the message names the field.

    Source: megatron-bridge 0.6.2 training/utils/flop_utils.py, which leaves the router out and takes a Mamba layer's inner
    width for twice the model's.

    >>> tiny = dict(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, gated_linear_unit=True)
    >>> tiny |= dict(normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope")
    >>> flops_per_token(tiny, seq_length=4, vocab_size=32) == 6 * (32 * 8 + 4 * 8 * 8 + 3 * 8 * 16) + 6 * 1 * 4 * 8
    True
    >>> llama = dict(num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8)
    >>> llama |= dict(ffn_hidden_size=14336, gated_linear_unit=True, seq_length=8192)
    >>> [round(flops_per_token(llama, vocab_size=128256, causal=causal) / 1e9, 1) for causal in (True, False)]
    [51.5, 57.9]
    >>> sparse = llama | dict(num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=4096)
    >>> round(flops_per_token(sparse, vocab_size=128256) / 1e9, 1)
    37.0
    """
    fields = Fields.of(model)
    met, tokens = mixers(fields), seq_length or fields.model("seq_length")
    seen = 0.0
    for channels, window in zip(met.score_channels, met.windows, strict=True):
        if window is None or window >= tokens or not causal:
            seen += channels * tokens / (2 if causal else 1)
        else:
            seen += channels * (window - window * (window - 1) / (2 * tokens))
    multiplied = met.weights + met.heads * fields.model("hidden_size") * vocab_size
    return 6 * (multiplied + seen) + 3 * met.scan


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

    Args:
        size: Rows and columns of two square matrices.
        repeats: Multiplications to time; the fastest counts.

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

"""How long would a step take at best: operations, bytes on the wire, and the ceiling that a GPU's data sheet sets.

Everything here is planned.  A ceiling is not a forecast: published runs reach a half of it, and the table of
`published` says which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.accounting import flops_per_token
from course_lib.layout import Layout
from course_lib.units import GB

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Ceiling", "Gpu", "ceiling", "counted_flops_per_token", "flops_per_token", "gpus", "published", "sent_bytes"]

_DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Gpu:
    """One GPU as its data sheet describes it.

    Attributes:
        name: Its name.
        memory_bytes: Memory.
        flops_per_second: Dense BF16 operations a second.
        link_bytes_per_second: What NVLink carries in one direction.
        source: The data sheet.
    """

    name: str
    memory_bytes: float
    flops_per_second: float
    link_bytes_per_second: float
    source: str


@dataclass(frozen=True)
class Ceiling:
    """The best that one step could do.

    Attributes:
        compute_seconds: Operations at the data sheet's rate, the pipeline bubble included.
        tensor_seconds: Messages inside the layers, which the layers wait for.
        data_seconds: Messages about gradients and weights, which hide behind the backward pass if they are shorter.
        tokens_per_second_per_gpu: What follows from them.
    """

    compute_seconds: float
    tensor_seconds: float
    data_seconds: float
    tokens_per_second_per_gpu: float


def gpus() -> dict[str, Gpu]:
    """The GPUs in ``data/gpus.json`` by name.

    >>> round(gpus()["H100 SXM 80GB"].memory_bytes / 2**30, 1)
    74.5
    """
    rows = json.loads((_DATA / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    return {
        row["name"]: Gpu(
            row["name"],
            row["memory_gb"] * GB,
            row["bf16_tflops"] * 1e12,
            row["nvlink_gb_per_second"] * GB / 2,
            row["source"],
        )
        for row in rows
    }


def published() -> pd.DataFrame:
    """Training speeds that others published, with their sources (``data/published_runs.json``)."""
    import pandas as pd

    return pd.DataFrame(json.loads((_DATA / "published_runs.json").read_text(encoding="utf-8"))["runs"])


def counted_flops_per_token(cfg: Any) -> float:
    """`flops_per_token(..., causal=False)`, counted by torch while a sequence goes through the meta model.

    Args:
        cfg: A Bridge ``ConfigContainer``; its layout is ignored.

    Returns:
        FLOPs a token; the backward pass is taken as twice the forward pass.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from course_lib import memory, meta_model

    whole = memory.with_layout(cfg, sequence_parallel=False)
    with meta_model.built(whole, ranks=1) as (model,), FlopCounterMode(display=False) as counter:
        losses = meta_model.forward(model, whole, ranks=1)
    return 3 * counter.get_total_flops() / losses.numel()


def sent_bytes(cfg: Any, *, ranks: int, parameters: int) -> dict[str, float]:
    """How many bytes does one rank of the first stage send in a step, with ring algorithms?

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set; 16-bit activations and fp32 gradients are assumed.
        ranks: World size.
        parameters: Parameters on the rank (``memory.States.parameters``).

    Returns:
        Bytes by kind of group: ``tensor`` (two all-reduces a layer forward, two backward), ``data`` (gradients are
        reduced, weights gathered), ``pipeline`` (activations forward, their gradients back), ``context`` (keys and
        values travel round the ring, and back with their gradients).
    """
    layout = Layout.from_config(cfg, ranks=ranks)
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    model, shares = cfg.model, layout.data_parallel_size * cp
    microbatches = cfg.train.global_batch_size / (cfg.train.micro_batch_size * layout.data_parallel_size)
    rows = model.seq_length // cp * cfg.train.micro_batch_size
    layers, hidden = model.num_layers / pp, rows * model.hidden_size * 2
    groups = model.num_query_groups or model.num_attention_heads
    keys = rows * 2 * groups * model.kv_channels / tp * 2
    return {
        "tensor": microbatches * layers * 4 * hidden * 2 * (tp - 1) / tp,
        "data": parameters * (4 + 2) * (shares - 1) / shares,
        "pipeline": microbatches * hidden / (tp if layout.sequence_parallel else 1) if pp > 1 else 0.0,
        "context": microbatches * layers * 3 * keys * (cp - 1),
    }


def ceiling(cfg: Any, *, ranks: int, gpu: Gpu, parameters: int, vocab_size: int) -> Ceiling:
    """The best tokens per second that a layout could reach on a GPU.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: Number of GPUs.
        gpu: The GPU.
        parameters: Parameters on a rank.
        vocab_size: Rows of the output layer.

    Returns:
        The ceiling.
    """
    layout = Layout.from_config(cfg, ranks=ranks)
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    microbatches = cfg.train.global_batch_size / (cfg.train.micro_batch_size * layout.data_parallel_size)
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    bubble = (layout.pipeline_model_parallel_size - 1) / (microbatches * chunks)
    recomputed = 4 / 3 if cfg.model.recompute_granularity == "full" else 1
    operations = flops_per_token(cfg, vocab_size=vocab_size) * tokens * recomputed
    compute = operations / (ranks * gpu.flops_per_second) * (1 + bubble)
    sent = sent_bytes(cfg, ranks=ranks, parameters=parameters)
    tensor = (sent["tensor"] + sent["pipeline"]) / gpu.link_bytes_per_second
    data = (sent["data"] + sent["context"]) / gpu.link_bytes_per_second
    return Ceiling(compute, tensor, data, tokens / (max(compute, data) + tensor) / ranks)

"""How long would a step take at best: operations, bytes on the wire, and the ceiling that a GPU's data sheet sets.

Everything here is planned.  A ceiling is not a forecast: published runs reach a half of it, and the table of
`published` says which.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields, changed
from course_lib.common.project import DATA
from course_lib.common.units import GB, MiB
from course_lib.planning.closed_forms import flops_per_token, mixers, stage_kinds
from course_lib.planning.layout import Layout
from course_lib.planning.layout.stages import stage_layers

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Ceiling",
    "Gpu",
    "counted_flops_per_token",
    "flops_per_token",
    "gpus",
    "named",
    "of",
    "published",
    "published_fine_tuning",
    "sent_bytes",
]


@dataclass(frozen=True)
class Gpu:
    """One GPU as its data sheet describes it, with the memory that its driver reports.

    Attributes:
        memory_bytes: Memory, as nvidia-smi shows it.  What the sheet calls 80 GB is 79.6 GiB, not 74.5.
        flops_per_second: Dense BF16 operations a second.
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
        compute_seconds: Operations of the slowest pipeline stage at the data sheet's rate, the bubble included.
        tensor_seconds: Messages inside the layers, which the layers wait for.
        data_seconds: Messages about gradients and weights, which hide behind the backward pass if they are shorter.
    """

    compute_seconds: float
    tensor_seconds: float
    data_seconds: float
    tokens_per_second_per_gpu: float


def gpus() -> dict[str, Gpu]:
    """The GPUs in ``data/gpus.json`` by name.

    >>> round(gpus()["H100 SXM 80GB"].memory_bytes / 2**30, 1)
    79.6
    """
    rows = json.loads((DATA / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    return {
        row["name"]: Gpu(
            row["name"],
            row["memory_mib"] * MiB,
            row["bf16_tflops"] * 1e12,
            row["nvlink_gb_per_second"] * GB / 2,
            row["source"],
        )
        for row in rows
    }


def named(words: str) -> Gpu | None:
    """The row of ``data/gpus.json`` for a GPU as `nvidia-smi` names it, or `None` if there is none.

    Model, form and size must fit: an H100 NVL is no H100 SXM.

    >>> named("NVIDIA H100 80GB HBM3, 81559 MiB").name, named("NVIDIA H200, 143771 MiB"), named("NVIDIA H100 PCIe, 81559 MiB")
    ('H100 SXM 80GB', None, None)
    """
    other_forms = ("PCIe", "NVL")
    for gpu in gpus().values():
        model, *_ = gpu.name.split()
        size = re.search(r"(\d+) MiB", words)
        fits = size is None or abs(int(size.group(1)) * MiB / gpu.memory_bytes - 1) < 0.02
        if re.search(rf"\b{model}\b", words) and fits and not any(form in words for form in other_forms):
            return gpu
    return None


def published() -> pd.DataFrame:
    """Training speeds that others published, one row a run (``data/published/throughput.json``).

    Returns:
        Columns `name, gpu, ranks, tp, pp, cp, micro_batch_size, global_batch_size, seq_length, precision,
        tokens_per_second_per_gpu, tflops_per_gpu, layout, peak_memory_gib, source`; what a source does not say is missing.
    """
    import pandas as pd

    data = json.loads((DATA / "published" / "throughput.json").read_text(encoding="utf-8"))
    return pd.DataFrame([*data["other_rows"], *data["rows"]])


def published_fine_tuning() -> pd.DataFrame:
    """Fine-tunings that NVIDIA verified, full and by LoRA, by `model` and `kind` (``data/published/fine_tuning.json``).

    Returns:
        What the file says, and what follows from it: `tokens_per_second_per_gpu`, padding included, and the GFLOP that
        Bridge counted for a token.
    """
    import pandas as pd

    data = json.loads((DATA / "published" / "fine_tuning.json").read_text(encoding="utf-8"))
    frame = pd.DataFrame(data["rows"]).set_index(["model", "kind"])
    frame["tokens_per_second_per_gpu"] = frame.token_slots / data["steps"] / (frame.step_seconds * frame.gpus)
    frame["gflop_per_token"] = frame.tflops_per_gpu * 1e3 / frame.tokens_per_second_per_gpu
    return frame


def counted_flops_per_token(cfg: Any) -> float:
    """`flops_per_token(..., causal=False)`, counted by torch while a sequence goes through the meta model.

    Args:
        cfg: A Bridge ``ConfigContainer``; its layout is ignored.

    Returns:
        FLOPs a token; the backward pass is taken as twice the forward pass.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from course_lib.planning import memory, meta_model

    whole = memory.with_layout(cfg, sequence_parallel=False)
    with meta_model.built(whole, ranks=1) as (model,), FlopCounterMode(display=False) as counter:
        losses = meta_model.forward(model, whole, ranks=1)
    return 3 * counter.get_total_flops() / losses.numel()


EXPERTS = ["ep", "expert-tp-ep"]
"""Groups in which tokens travel to their experts and back."""


def sent_bytes(cfg: Any, *, ranks: int) -> dict[str, float]:
    """How many bytes does a rank of the first stage send in a step, with ring algorithms?

    The operations are those of `course_lib.planning.messages`, which recorded runs are held to.  It counts context parallelism
    in the all-gather form only, and of recomputation that of experts, so the rest is added here: CP
    ranks share their gradients as DP ranks do, their keys and values travel round a ring and back with their gradients,
    and full recomputation repeats what the forward pass sends.

    Returns:
        Bytes by kind of group: ``tensor``, ``data``, ``pipeline``, ``context``, and ``experts`` for tokens on their way to
        experts and back.

    Raises:
        NotCounted: For models that the closed form does not cover.
    """
    from course_lib.planning import messages, meta_model

    layout, formats = Layout.from_config(cfg, ranks=ranks), meta_model.precision(cfg)
    cp, layers = layout.context_parallel_size, Counter("".join(stage_kinds(Fields.of(cfg))[0]))
    if cp > 1 and layers["M"]:
        raise messages.NotCounted(
            f"CP={cp} of a hybrid: its Mamba layers deal out heads, attention passes keys round a ring"
        )
    full, experts = cfg.model.recompute_granularity == "full", "moe" in (cfg.model.recompute_modules or ())
    plain = changed(
        cfg,
        {
            "model.context_parallel_size": 1,
            "model.recompute_granularity": "selective" if experts and not full else None,
            "model.recompute_modules": ["moe"] if experts and not full else None,
            "model.seq_length": cfg.model.seq_length // cp,
            "train.global_batch_size": cfg.train.global_batch_size * cp,  # as many micro-batches as before
        },
    )
    rows = messages.expected(plain, ranks=ranks, element_bytes=formats.weights, gradient_bytes=formats.gradients)
    if full:
        again = (rows.phase == "forward") & rows.group.isin(["tp", *EXPERTS])
        rows = rows.assign(count=rows["count"].where(~again, rows["count"] * 2))
    sent = messages.by_group(rows).sent_bytes
    model = cfg.model
    microbatches = cfg.train.global_batch_size / (cfg.train.micro_batch_size * layout.data_parallel_size)
    groups, channels = model.num_query_groups or model.num_attention_heads, Fields.of(cfg).head_channels
    keys = plain.model.seq_length * cfg.train.micro_batch_size * 2 * groups * channels * formats.weights
    return {
        "tensor": float(sent.get("tp", 0)),
        "data": float(sent.reindex(["dp-cp", "expert-dp", "embedding"]).sum()),
        "pipeline": float(sent.get("pp", 0)),
        "experts": float(sent.reindex(EXPERTS).sum()),
        "context": microbatches * layers["*"] * 3 * keys / layout.tensor_model_parallel_size * (cp - 1),
    }


def of(cfg: Any, *, ranks: int, gpu: Gpu, vocab_size: int) -> Ceiling:
    """The best tokens per second that a layout could reach on a GPU."""
    layout = Layout.from_config(cfg, ranks=ranks)
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    microbatches = cfg.train.global_batch_size / (cfg.train.micro_batch_size * layout.data_parallel_size)
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    bubble = (layout.pipeline_model_parallel_size - 1) / (microbatches * chunks)
    slowest = _slowest_stage_flops_per_token(cfg, vocab_size=vocab_size) * layout.pipeline_model_parallel_size
    compute = slowest * tokens / (ranks * gpu.flops_per_second) * (1 + bubble)
    sent = sent_bytes(cfg, ranks=ranks)
    tensor = (sent["tensor"] + sent["pipeline"] + sent["experts"]) / gpu.link_bytes_per_second
    data = (sent["data"] + sent["context"]) / gpu.link_bytes_per_second
    return Ceiling(compute, tensor, data, tokens / (max(compute, data) + tensor) / ranks)


def _slowest_stage_flops_per_token(cfg: Any, *, vocab_size: int) -> float:
    """Operations of the pipeline stage that computes most, for which the others wait: often the last, with the output layer.

    The layers are taken to cost alike; at PP=1 the one stage is the whole model.
    """
    layers = flops_per_token(cfg, vocab_size=0) + _repeated_flops_per_token(cfg)
    output = flops_per_token(cfg, vocab_size=vocab_size) - flops_per_token(cfg, vocab_size=0)
    if cfg.model.pipeline_model_parallel_size == 1:
        return layers + output
    counts = [sum(chunks) for chunks in stage_layers(cfg)]
    each = layers / sum(counts)
    return max(max(counts) * each, counts[-1] * each + output)


def _repeated_flops_per_token(cfg: Any) -> float:
    """What recomputation adds: a third of what the repeated layers or parts cost, for the forward pass is a third."""
    model = cfg.model
    if not model.recompute_granularity:
        return 0.0
    if model.recompute_granularity == "full":
        stage = model.num_layers / model.pipeline_model_parallel_size
        share = 1 if model.recompute_method == "uniform" else min(1, model.recompute_num_layers / stage)
        return flops_per_token(cfg, vocab_size=0) / 3 * share
    met = mixers(Fields.of(cfg))
    everything = flops_per_token(cfg, vocab_size=0)
    repeated = {name: 2 * met.parts[name] for name in ("mlp", "moe", "shared_experts")}
    repeated["moe"] += repeated["shared_experts"]  # the whole sparse layer
    repeated["core_attn"] = (everything - 6 * met.weights - 3 * met.scan) / 3
    repeated |= dict.fromkeys(("layernorm", "moe_act", "gdn_norm_out"), 0)  # they multiply no matrices
    parts = {"core_attn"} if model.recompute_modules is None else set(model.recompute_modules)
    if other := parts - set(repeated):
        raise ValueError(
            f"recompute_modules: the operations of {', '.join(sorted(other))} are not counted: leave them out"
        )
    if "moe" in parts:
        parts.discard("shared_experts")
    return float(sum(repeated[part] for part in parts))

"""Levers beside the layout: one change of a configuration each, what it saves for 1B, 3B and 8B, its price and its risk.

`book.builder.levers` writes what they do to `data/levers.json`, which the book shows.  Everything is planned; nothing was run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.common.config import changed
from course_lib.common.units import gib

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LEVERS", "Lever", "applied", "code", "effect", "table"]

FSDP = "Megatron FSDP"


@dataclass(frozen=True)
class Lever:
    """One change.

    Attributes:
        fields: Dotted fields of the configuration and their values; values of `torch` are given by their names.
    """

    name: str
    fields: Mapping[str, Any]
    price: str
    risk: str
    source: str


LEVERS = (
    Lever(
        "gradients in bf16",
        {"mixed_precision.grad_reduce_in_fp32": False},
        "none: half the bytes to reduce",
        "sums over micro-batches and ranks round to 8 bits; NVIDIA's verified 4B run and its performance recipes do it",
        "megatron-bridge 0.6.2 `perf_recipes/_common.py`, `recipes/nemotronh/h100/nemotron_3_nano_4b.py`",
    ),
    Lever(
        FSDP,
        {
            "dist.use_megatron_fsdp": True,
            "ddp.use_megatron_fsdp": True,
            "ddp.data_parallel_sharding_strategy": "optim_grads_params",
            "ddp.average_in_collective": False,
            "checkpoint.ckpt_format": "fsdp_dtensor",
        },
        "each micro-batch gathers every layer twice; CUDA_DEVICE_MAX_CONNECTIONS must not be 1",
        "gradients are bf16 unless `ddp.megatron_fsdp_main_grads_dtype` says more; other runs cannot load its checkpoints",
        "megatron-bridge 0.6.2 `training/config.py`; Megatron-Bridge docs/training/megatron-fsdp.md @ 067f987",
    ),
    Lever(
        "5 layers recomputed",
        {"model.recompute_granularity": "full", "model.recompute_method": "block", "model.recompute_num_layers": 5},
        "their forward pass once more",
        "none: the same numbers",
        "megatron-core 0.19.2 `transformer/transformer_block.py`",
    ),
    Lever(
        "loss kernel `native`",
        {"model.cross_entropy_fusion_impl": "native"},
        "an fp32 copy of the logits",
        "none: it is the remedy; Core warns that `te`, which the Llama recipes set, has known stability issues",
        "megatron-core 0.19.2 `model_parallel_config.py`; NVIDIA/Megatron-LM pull 5115, issues 1627 and 1750",
    ),
    Lever(
        "precision-aware optimizer, bf16 moments",
        {
            "optimizer.use_precision_aware_optimizer": True,
            "optimizer.exp_avg_dtype": "bfloat16",
            "optimizer.exp_avg_sq_dtype": "bfloat16",
        },
        "Transformer Engine's Adam",
        "moments round to 8 bits; with fp32 moments, the default, it saves nothing here",
        "megatron-core 0.19.2 `optimizer/optimizer_config.py`",
    ),
    Lever(
        "FP8, current scaling",
        {"mixed_precision": "bf16_with_fp8_current_scaling_mixed"},
        "none: matrix products may run twice as fast",
        "products of 8-bit numbers; the first and the last layer stay in bf16; hold the loss against a bf16 run",
        "megatron-bridge 0.6.2 `training/mixed_precision.py`; NVIDIA H100 data sheet",
    ),
)


def applied(cfg: Any, lever: Lever) -> Any:
    """A copy of a configuration with a lever pulled; a number format given by name becomes the object that has the fields.

    Raises:
        UnknownField: If the configuration has no such field.
    """
    import torch
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    mine = cfg
    if any(path.startswith("mixed_precision.") for path in lever.fields) and isinstance(cfg.mixed_precision, str):
        mine = changed(cfg, {"mixed_precision": get_mixed_precision_config(cfg.mixed_precision)})
    types = {path: getattr(torch, value) for path, value in lever.fields.items() if path.endswith("_dtype")}
    return changed(mine, {**lever.fields, **types})


def code(lever: Lever) -> str:
    """The lines that pull a lever, below those that made `cfg`."""
    first = []
    if any(path.startswith("mixed_precision.") for path in lever.fields):
        first = ["from megatron.bridge.training.mixed_precision import get_mixed_precision_config", ""]
        first += ["cfg.mixed_precision = get_mixed_precision_config(cfg.mixed_precision)"]
    if any(path.endswith("_dtype") for path in lever.fields):
        first = ["import torch", "", *first]
    values = {
        path: f"torch.{value}" if path.endswith("_dtype") else repr(value) for path, value in lever.fields.items()
    }
    return "\n".join([*first, *(f"cfg.{path} = {value}" for path, value in values.items())])


def effect(cfg: Any, lever: Lever, *, ranks: int, vocab_size: int) -> dict[str, Any]:
    """What a lever does to one configuration.

    Returns:
        `total_bytes`, `saved_bytes` (negative where it costs memory), and `ceiling_change`, the share by which the best
        tokens per second change; None where the data sheet's bf16 rate is no ceiling.  Megatron FSDP's total is its states and
        the most that it gathers, with the activations of the same layout.
    """
    from course_lib.planning import ceiling, fully_sharded, memory

    before, changed = memory.plan(cfg, ranks=ranks), applied(cfg, lever)
    if lever.name == FSDP:
        total = fully_sharded.states(changed, ranks=ranks).total_bytes + before.total_bytes - before.states.total_bytes
        return {"total_bytes": total, "saved_bytes": before.total_bytes - total, "ceiling_change": None}
    total = memory.plan(changed, ranks=ranks).total_bytes
    gpu = ceiling.gpus()["H100 SXM 80GB"]
    rates = [
        ceiling.of(one, ranks=ranks, gpu=gpu, vocab_size=vocab_size).tokens_per_second_per_gpu for one in (cfg, changed)
    ]
    eight_bit = "mixed_precision" in lever.fields
    return {
        "total_bytes": total,
        "saved_bytes": before.total_bytes - total,
        "ceiling_change": None if eight_bit else rates[1] / rates[0] - 1,
    }


def table(cfg: Any, *, ranks: int, vocab_size: int) -> pd.DataFrame:
    """Every lever on one configuration: GiB saved, GiB planned then, the ceiling's change, price and risk.

    Args:
        cfg: As for `effect`, like the other arguments.
    """
    import pandas as pd

    rows = {}
    for lever in LEVERS:
        found = effect(cfg, lever, ranks=ranks, vocab_size=vocab_size)
        change = found["ceiling_change"]
        rows[lever.name] = {
            "GiB saved": round(gib(found["saved_bytes"]), 1),
            "GiB planned": round(gib(found["total_bytes"]), 1),
            "ceiling": "not computed" if change is None else f"{change:+.0%}",
            "price": lever.price,
            "risk": lever.risk,
        }
    return pd.DataFrame.from_dict(rows, orient="index")

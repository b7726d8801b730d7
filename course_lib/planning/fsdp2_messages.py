"""What a step of FSDP2 or DDP sends as NeMo AutoModel sets it up, by closed form: weights and gradients, no activations.

Beside `messages`, which counts what Megatron's ways of cutting send.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.planning.messages import KEY

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["buckets", "expected", "replicas", "shapes", "units"]

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_USED = [
    *("model.embed_tokens", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("model.norm", "lm_head"),
]
"""Parts of a Llama in the order in which a forward pass uses them; gradients are ready in the opposite one."""
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
"""Sizes at which DDP closes a bucket where nobody gives one.  Source: torch nn/parallel/distributed.py @ 2.13.0."""


def shapes(model: Path | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that transformers gives a model; a tied one occurs once, and no weight is made.

    Args:
        model: A Hugging Face folder, or what a `config.json` says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    said = model if isinstance(model, Mapping) else json.loads((model / "config.json").read_text(encoding="utf-8"))
    given = {name: value for name, value in said.items() if name != "model_type"}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(said["model_type"], **given))
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}


def units(shapes: Mapping[str, Sequence[int]], *, ranks: int) -> list[int]:
    """How many numbers each unit of FSDP2 has once it is whole: the root with all that is in no layer, then the layers.

    Each tensor is cut by its first dimension into equal parts, the last of which is padded.

    Args:
        shapes: Names as transformers has them, and the shape of each parameter; a tied one occurs once.

    Example:
        >>> units({"model.embed_tokens.weight": (10, 4), "model.layers.0.mlp.up_proj.weight": (6, 4)}, ranks=4)
        [48, 32]
    """
    counts: dict[int, int] = {-1: 0}
    for name, shape in shapes.items():
        found = _LAYER.match(name)
        layer = int(found[1]) if found else -1
        counts[layer] = counts.get(layer, 0) + ranks * ceil(shape[0] / ranks) * prod(shape[1:])
    return [counts[layer] for layer in sorted(counts)]


def expected(
    shapes: Mapping[str, Sequence[int]],
    *,
    ranks: int,
    microbatches: int = 1,
    element_bytes: int = 4,
    gradient_bytes: int = 4,
) -> pd.DataFrame:
    """What one rank takes part in during one step.

    Every layer is made whole for the forward pass, and again for the backward pass, except for the last one, which is kept
    until then like the root.  Gradients are reduced after the last micro-batch, once.

    Args:
        shapes: As in `units`.
        microbatches: Of one rank in one step.
        element_bytes: Of a weight on its way: 4 for `param_dtype: float32`, 2 for AutoModel's default.
        gradient_bytes: Of a gradient on its way, by `reduce_dtype`.

    Returns:
        Rows `phase, operation, group, group_size, bytes, count, why`: `bytes` is the size of one operation.

    Source: nemo_automodel components/distributed/parallelizer.py and components/training/utils.py @ 0.6.0.
    """
    import pandas as pd

    root, *layers = units(shapes, ranks=ranks)
    rows = [("forward", "all_gather", "dp_shard", element_bytes * root, microbatches, "what is in no layer")]
    for number, layer in enumerate(layers):
        rows.append(("forward", "all_gather", "dp_shard", element_bytes * layer, microbatches, "layers"))
        if number < len(layers) - 1:
            rows.append(("backward", "all_gather", "dp_shard", element_bytes * layer, microbatches, "layers, again"))
    for unit in (root, *layers):
        rows.append(("backward", "reduce_scatter", "dp_shard", gradient_bytes * unit, 1, "gradients"))
    rows.append(("update", "all_reduce", "dp", 8, 3, "labels, tokens and FLOPs of the step"))
    rows.append(("update", "all_reduce", "dp", 4, 1, "the loss"))
    rows.append(("update", "all_reduce", "dp_shard", 8, 2, "norm of the gradient: the largest number, then the sum"))
    table = pd.DataFrame([(phase, kind, group, ranks, *rest) for phase, kind, group, *rest in rows])
    table.columns = [*KEY, "count", "why"]
    return table.groupby([*KEY, "why"], sort=False)["count"].sum().reset_index()[[*KEY, "count", "why"]]


def buckets(
    shapes: Mapping[str, Sequence[int]], *, gradient_bytes: int = 4, bucket_cap_mib: float | None = None
) -> list[int]:
    """Bytes of each of DDP's buckets from its second step on, when it has seen in which order gradients come.

    A gradient joins the bucket under way, and one that has reached its cap is closed; the first cap is smaller where none is
    given, so that sending can begin early.

    Args:
        shapes: As in `units`, of a Llama or of what has its parts.
        bucket_cap_mib: AutoModel's `distributed.bucket_cap_mb`, which counts MiB.

    Raises:
        ValueError: If a parameter has no place in the order.

    Source: torch csrc/distributed/c10d/reducer.cpp @ 2.13.0, `compute_bucket_assignment_by_size`.
    """
    first, later = (FIRST_BUCKET_BYTES, BUCKET_BYTES) if bucket_cap_mib is None else [int(bucket_cap_mib * 2**20)] * 2
    found, size = [], 0
    for name in sorted(shapes, key=_use, reverse=True):
        size += gradient_bytes * prod(shapes[name])
        if size >= (later if found else first):
            found.append(size)
            size = 0
    return found + [size] * (size > 0)


def _use(name: str) -> tuple[int, int]:
    """When a forward pass uses a parameter: what comes before the layers, the layers, what comes after them."""
    part = _LAYER.sub("", name)
    place = next((place for place, used in enumerate(_USED) if part.startswith(used)), None)
    if place is None:
        raise ValueError(f"{name}: when DDP reduces it is known of {', '.join(_USED)}, and not of this parameter")
    layer = int(found[1]) if (found := _LAYER.match(name)) else -1 if place == 0 else sys.maxsize
    return layer, place


def replicas(
    shapes: Mapping[str, Sequence[int]],
    *,
    ranks: int,
    gradient_bytes: int = 4,
    bucket_cap_mib: float | None = None,
) -> pd.DataFrame:
    """What one rank takes part in during one step of DDP: all gradients once, after the last micro-batch, and no weight.

    Args:
        shapes: As in `buckets`, and so is `bucket_cap_mib`.

    Returns:
        As `expected` does.
    """
    import pandas as pd

    sizes = buckets(shapes, gradient_bytes=gradient_bytes, bucket_cap_mib=bucket_cap_mib)
    rows = [("backward", "all_reduce", "world", ranks, size, 1, "gradients") for size in sizes]
    rows.append(("update", "all_reduce", "world", ranks, 8, 3, "labels, tokens and FLOPs of the step"))
    rows.append(("update", "all_reduce", "world", ranks, 4, 1, "the loss"))
    table = pd.DataFrame(rows, columns=[*KEY, "count", "why"])
    return table.groupby([*KEY, "why"], sort=False)["count"].sum().reset_index()[[*KEY, "count", "why"]]

"""Count the parameters of the model that a recipe really builds, by part, without its memory.

Megatron builds the whole model on PyTorch's meta device, where a tensor has a shape and no bytes.  That happens in a
child process, because a hybrid model asks for CUDA and for the Mamba kernels while it is built; the notebook's kernel
never fakes either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Census", "CensusFailed", "count", "part_of"]

_MARK = "census: "
_LIMIT_S = 300


class CensusFailed(RuntimeError):
    """A model could not be built; the message ends with the child's last lines."""


@dataclass(frozen=True)
class Census:
    """The parameters of one built model.

    Attributes:
        recipe: The recipe's function.
        parts: Number of parameters by part, in the order of the model.
        experts: Routed experts of a layer, 0 for a dense model.
        chosen: Routed experts that one token uses.
    """

    recipe: str
    parts: dict[str, int]
    experts: int
    chosen: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that take part in computing one token: all but the routed experts that it does not choose.

        >>> Census("x", {"routed experts": 128, "attention": 10}, experts=128, chosen=6).active
        16
        """
        routed = self.parts.get("routed experts", 0)
        return self.total - (routed // self.experts * (self.experts - self.chosen) if self.experts else 0)

    @property
    def active_without_input_embedding(self) -> int:
        """As `active`, without the table that looks the input ids up: a look-up multiplies nothing."""
        return self.active - self.parts["input embedding"]


def count(recipes: Iterable[str], *, vocab_size: int | None = None) -> dict[str, Census]:
    """Build the models of some recipes in a child process and count.

    Args:
        recipes: Functions as `module:function` below `megatron.bridge.recipes`.
        vocab_size: Rows of the embedding; the recipe's own if None.

    Returns:
        One census a recipe, by the name of its function.

    Raises:
        CensusFailed: If a recipe or its model cannot be built.
    """
    names = list(recipes)
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps({"recipes": names, "vocab_size": vocab_size})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or len(lines) != len(names):
        tail = "\n".join(done.stderr.splitlines()[-5:])
        raise CensusFailed(f"of {', '.join(names)} only {len(lines)} could be built:\n{tail}")
    return {row["recipe"]: Census(**row) for row in map(json.loads, lines)}


def part_of(name: str) -> str:
    """To which part of a model a parameter belongs, by its name in Megatron Core.

    >>> part_of("decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight")
    'routed experts'
    >>> part_of("decoder.layers.0.mixer.A_log")
    'Mamba'
    """
    rules: Mapping[str, str] = {
        "word_embeddings": "input embedding",
        "output_layer": "output layer",
        ".mixer.": "Mamba",
        ".experts.": "routed experts",
        ".shared_experts.": "shared expert",
        ".router.": "router",
        ".self_attention.": "attention",
        ".mlp.": "dense feed-forward",
        "norm": "norms",
    }
    return next((part for sign, part in rules.items() if sign in name), "other")


def _child(asked: Mapping[str, Any]) -> None:
    from course_lib import recipes as offline_recipes
    from course_lib import stack

    stack.prepare_imports()
    import importlib

    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _make_hybrid_models_buildable()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    for name in asked["recipes"]:
        module, function = name.split(":")
        with offline_recipes.offline():
            cfg = getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), function)()
        model = cfg.model
        if asked["vocab_size"]:
            model.vocab_size = asked["vocab_size"]
        parts: Counter[str] = Counter()
        for parameter, value in _build(model).named_parameters():
            parts[part_of(parameter)] += value.numel()
        experts, chosen = getattr(model, "num_moe_experts", None) or 0, getattr(model, "moe_router_topk", 0)
        row = {"recipe": function, "parts": parts, "experts": experts, "chosen": chosen if experts else 0}
        print(_MARK + json.dumps(row), flush=True)


def _make_hybrid_models_buildable() -> None:
    """What a hybrid model touches while it is built, and needs only when it computes."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import torch
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.post_training.modelopt.hybrid import model_specs
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class GatedNorm(torch.nn.Module):
        """The shape of mamba-ssm's gated RMSNorm: one weight a channel."""

        def __init__(self, channels: int, *, device: object = None, **_: object) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(channels, device=device))

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = GatedNorm
    mamba_mixer.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)
    torch.cuda.current_device = lambda: "meta"
    model_specs.Norm = hybrid_block.TENorm = WrappedTorchNorm


def _build(model: Any) -> Any:
    """The whole model on one rank, on the meta device, of Megatron's own unfused layers: the same parameters."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec

    model.transformer_impl = "local"
    if hasattr(model, "hybrid_stack_spec"):
        model.hybrid_stack_spec = get_hybrid_stack_modelopt_spec(local_core_attention=True)
    else:
        model.transformer_layer_spec = local_layer_spec
    for size in ("tensor_model", "pipeline_model", "context", "expert_model"):
        setattr(model, f"{size}_parallel_size", 1)
    model.sequence_parallel = False
    for fused in ("gradient_accumulation_fusion", "apply_rope_fusion", "persist_layer_norm", "bias_activation_fusion"):
        setattr(model, fused, False)
    model.cross_entropy_loss_fusion = model.moe_grouped_gemm = model.moe_permute_fusion = False
    model.moe_token_dispatcher_type, model.moe_flex_dispatcher_backend = "allgather", None
    model.moe_shared_expert_overlap, model.cuda_graph_impl = False, "none"
    model.init_model_with_meta_device, model.use_cpu_initialization, model.perform_initialization = True, True, False
    names = "tp pp cp dp dp_cp tp_cp tp_dp_cp ep tp_ep tp_ep_pp expt_tp expt_dp intra_expt_dp embd pos_embd mp".split()
    model._pg_collection = SimpleNamespace(**dict.fromkeys(names, dist.group.WORLD))
    model.finalize()
    with torch.device("meta"):
        return model.provide(pre_process=True, post_process=True)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))

"""What a rank holds under Megatron FSDP, by closed form: its share of all states, and the layers that are whole for a while.

Only states are counted.  Activations are those of the same configuration without it, which `memory.plan` counts, because
FSDP cuts weights and no activations.  How many whole layers live at once depends on time, so those lines are the most
that the two limits of Megatron FSDP allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from course_lib.planning import memory
from course_lib.planning.activations import as_a_gpu_has_it, built, refuse
from course_lib.planning.layout import Layout

__all__ = ["FIELDS", "Sharded", "states"]

FIELDS = {
    "dist.use_megatron_fsdp": True,
    "ddp.use_megatron_fsdp": True,
    "ddp.data_parallel_sharding_strategy": "optim_grads_params",
    "ddp.average_in_collective": False,
    "checkpoint.ckpt_format": "fsdp_dtensor",
}
"""What switches it on.  Source: Megatron-Bridge skills/nemo-mbridge-perf-megatron-fsdp/SKILL.md @ 067f987."""

_AT_LEAST = 1_000_000_000  # numbers: the smallest limit for gradients that wait, and twice that for gathered layers
_PLANNED = {
    "ddp.data_parallel_sharding_strategy": (("optim_grads_params",), "the other strategies shard less"),
    "ddp.suggested_communication_unit_size": ((None,), "the limits are counted as they are without it"),
    "ddp.fsdp_double_buffer": ((False,), "it keeps two buffers for good"),
    "ddp.nccl_ub": ((False,), "it keeps two buffers for good"),
    "ddp.outer_dp_sharding_strategy": (("no_shard",), "it shards over two kinds of ranks"),
    "model.fp8": ((None,), "8-bit copies of gathered weights are not counted"),
    "model.num_moe_experts": ((None,), "experts are sharded over other ranks"),
    "model.pipeline_model_parallel_size": ((1,), "a stage gathers its layers for each micro-batch again"),
    "optimizer.optimizer": (("adam",), "the states of other optimizers are not counted"),
    "optimizer.optimizer_cpu_offload": ((False,), "moments on the CPU are not counted"),
}


@dataclass(frozen=True)
class Sharded:
    """Bytes of one rank under Megatron FSDP.

    Attributes:
        weights_bytes: Its share of the weights.
        gradients_bytes: Its share of the gradients.
        optimizer_bytes: Its share of the weights' copy in higher precision and of the moments.
        ends_bytes: Embedding, output layer and final norm, which are no unit of their own and stay whole once gathered.
        gathered_bytes: Layers that are whole at once: the one at work and those gathered ahead, at most.
        waiting_bytes: Whole gradients that wait to be reduced, at most.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ends_bytes: int
    gathered_bytes: int
    waiting_bytes: int

    @property
    def sharded_bytes(self) -> int:
        """What the rank holds all the time."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """All lines."""
        return self.sharded_bytes + self.ends_bytes + self.gathered_bytes + self.waiting_bytes


def states(cfg: Any, *, ranks: int) -> Sharded:
    """How many bytes of states does a rank hold under Megatron FSDP, and of whole layers at most?

    The gradients' format is ``ddp.megatron_fsdp_main_grads_dtype``, and that of the weights where it is None:
    ``grad_reduce_in_fp32`` is not read here.

    Args:
        cfg: A Bridge ``ConfigContainer`` with the fields of `FIELDS`, or without: it is planned as if they were set.

    Returns:
        The lines.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        NotPlanned: If a field is set whose bytes are not counted.

    Source: megatron-core 0.19.2 ``distributed/fsdp/mcore_fsdp_adapter.py``, ``src/megatron_fsdp/megatron_fsdp.py`` (limits) and
    ``param_and_grad_buffer.py`` (``_resolve_group_grad_dtype``, ``AllGatherPipeline``, ``GradReducePipeline``).
    """
    mine = as_a_gpu_has_it(cfg)
    mine.ddp.data_parallel_sharding_strategy = FIELDS["ddp.data_parallel_sharding_strategy"]
    refuse(mine, _PLANNED)
    layout = Layout.from_config(cfg, ranks=ranks)
    shares = layout.data_parallel_size * layout.context_parallel_size
    with built(cfg, ranks=ranks, stage=0) as (model,):
        layers = [sum(one.numel() for one in layer.parameters()) for layer in model.decoder.layers]
        count = sum(one.numel() for one in model.parameters())
        weight = next(model.parameters()).dtype
    gradient = mine.ddp.megatron_fsdp_main_grads_dtype or weight
    main = mine.ddp.megatron_fsdp_main_params_dtype
    optimizer = memory.moment_bytes(mine.optimizer) + (main.itemsize if main else 0)
    limit = max(_AT_LEAST, sum(layers) // len(layers) * 2)
    largest = max(layers)
    whole = min(len(layers), 1 + math.ceil(limit // 2 / largest))
    waiting = min(count, limit + largest)
    return Sharded(
        weights_bytes=round(count * weight.itemsize / shares),
        gradients_bytes=round(count * gradient.itemsize / shares),
        optimizer_bytes=round(count * optimizer / shares),
        ends_bytes=(count - sum(layers)) * weight.itemsize,
        gathered_bytes=whole * largest * weight.itemsize,
        waiting_bytes=waiting * gradient.itemsize,
    )

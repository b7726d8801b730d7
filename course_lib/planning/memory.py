"""Bytes per rank, before the run: weights, gradients, optimizer states, activations and the loss.

States are counted on the model that Megatron really builds (:mod:`.meta_model`), activations on a micro-batch
that really goes through it (:mod:`.activations`).  A field that changes the bytes of a GPU is counted, or refused
by its name; a test says which, for every field of the model, the optimizer and the gradient buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.common.config import changed
from course_lib.common.units import gib
from course_lib.planning.activations import (
    Activations,
    NotPlanned,
    activations,
    as_a_gpu_has_it,
    built,
    kept_by,
    quantized,
    refuse,
    refuse_what_is_not_counted,
    without_recomputation,
)
from course_lib.planning.layout import Layout, embedding_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    import torch

__all__ = [
    "Activations",
    "NotPlanned",
    "Plan",
    "States",
    "activations",
    "bridge_estimate",
    "moment_bytes",
    "plan",
    "states",
    "table",
    "with_layout",
]

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss")

_GATHERED = (
    (False,),
    "how many gathered layers live at once depends on the speed of their messages (`fully_sharded.states` counts Megatron "
    "FSDP's states, and the most that can be gathered)",
)
_NOT_COUNTED = {
    "ddp.use_megatron_fsdp": _GATHERED,
    "ddp.use_custom_fsdp": _GATHERED,
    "dist.use_megatron_fsdp": _GATHERED,
    "dist.use_torch_fsdp2": _GATHERED,
    "optimizer.optimizer": (("adam", "sgd", "lion"), "the states of other optimizers are not counted"),
    "optimizer.use_layer_wise_distributed_optimizer": ((False,), "it deals out whole layers, not equal shares"),
}
"""Fields that change a rank's states: the values that can be planned, and why others cannot."""


@dataclass(frozen=True)
class States:
    """What one rank of a pipeline stage holds all the time.

    Attributes:
        stage: The pipeline stage.
        parameters: Parameters on the rank, those of its experts included.
        expert_parameters: Those of its experts.
        weights_bytes: The weights; of layers that compute in 8 bits the 8-bit copies too.
        gradients_bytes: The gradient buffers; frozen weights have none.
        optimizer_bytes: Copies of 16-bit weights in higher precision, and the optimizer's moments, on this GPU.
    """

    stage: int
    parameters: int
    expert_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All three."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Plan:
    """Planned bytes of the rank that needs the most.

    Attributes:
        layout: The layout.
        states: Its states.
        activations: Its activations.
    """

    layout: Layout
    states: States
    activations: Activations

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component, in the order of `COMPONENTS`."""
        kept = self.activations
        values = (
            self.states.weights_bytes,
            self.states.gradients_bytes,
            self.states.optimizer_bytes,
            kept.total_bytes,
            kept.loss_bytes,
        )
        return dict(zip(COMPONENTS, values, strict=True))

    @property
    def total_bytes(self) -> int:
        """The sum; what NCCL, CUDA and the allocator take comes on top (`ceiling.Gpu`)."""
        return sum(self.components.values())


def states(cfg: Any, *, ranks: int) -> list[States]:
    """How many bytes of weights, gradients and optimizer states does a rank of each pipeline stage hold?

    All ranks of a stage hold the same number.  Without the distributed optimizer each rank keeps the states of all its
    parameters; with it, of one share: 1/(DP x CP), or one part in as many as hold the same expert;
    ``num_distributed_optimizer_instances`` makes the shares so many times larger.  Memory that lives only while the
    optimizer steps, when the activations are gone, is not counted: an fp32 copy of its share of 16-bit gradients.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set; ``cfg.mixed_precision`` overrides the number formats of its
            other sections, as it does when a run starts.  ``cfg.peft`` is applied to the model.
        ranks: World size.

    Returns:
        One entry a stage.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        NotPlanned: If a field is set whose bytes are not counted.

    Source: megatron-core 0.19.2 ``distributed/param_and_grad_buffer.py``, ``optimizer/distrib_optimizer.py``;
    megatron-bridge 0.6.2 ``training/mixed_precision.py``.
    """
    count, found = _counting(cfg, ranks=ranks), []
    for stage in range(cfg.model.pipeline_model_parallel_size):
        with built(cfg, ranks=ranks, stage=stage) as chunks:
            found.append(count(stage, chunks))
    return found


def _counting(cfg: Any, *, ranks: int) -> Callable[[int, list[torch.nn.Module]], States]:
    """A function that counts the states of a stage on its built chunks; what is not counted is refused here, as `states` says."""
    from course_lib.planning import meta_model

    mine = as_a_gpu_has_it(cfg)
    refuse(mine, _NOT_COUNTED)
    layout, formats = Layout.from_config(cfg, ranks=ranks), meta_model.precision(cfg)
    sharded = mine.optimizer.use_distributed_optimizer
    instances = mine.ddp.num_distributed_optimizer_instances if sharded else 1
    shares = layout.data_parallel_size * layout.context_parallel_size if sharded else 1
    expert_shares = layout.expert_data_parallel_size if sharded else 1
    for name, size in (("", shares), ("expert ", expert_shares)):
        if size % instances:
            raise NotPlanned(
                f"ddp.num_distributed_optimizer_instances={instances} does not divide the {size} ranks of an {name}"
                f"optimizer: set it to a divisor of {size}"
            )
    each = _optimizer_bytes(mine.optimizer, weights=formats.dtype)
    in_fp32 = mine.ddp.param_name_patterns_for_fp32_local_accumulation

    def count(stage: int, chunks: list[torch.nn.Module]) -> States:
        parameters = expert = weights = gradients = 0
        optimizer = 0.0
        for chunk in chunks:
            eight_bit = quantized(chunk, mine.model)
            for name, one in chunk.named_parameters():
                size = one.numel() * getattr(one, "stands_for", 1)
                in_experts = not getattr(one, "allreduce", True)
                parameters, expert = parameters + size, expert + size * in_experts
                cast = name.rpartition(".")[0] in eight_bit
                weights += size * (_eight_bit_weight_bytes(mine.model) if cast else one.dtype.itemsize)
                if one.requires_grad:
                    gradients += size * formats.gradients
                    gradients += 4 * size * any(pattern in ("all", f"module.{name}") for pattern in in_fp32)
                    optimizer += size * each * instances / (expert_shares if in_experts else shares)
        return States(stage, parameters, expert, weights, gradients, round(optimizer))

    return count


_MOMENT_BYTES = {"adam": 8, "sgd": 4, "lion": 4}
"""Bytes of an optimizer's fp32 moments of one parameter; TE's SGD allocates its momentum whatever `sgd_momentum` is."""


def moment_bytes(optimizer: Any) -> int:
    """Bytes of the moments of one parameter, wherever they are; only a precision-aware optimizer stores them in other formats."""
    if optimizer.use_precision_aware_optimizer and not optimizer.optimizer_cpu_offload:
        return optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
    return _MOMENT_BYTES[optimizer.optimizer]


def _optimizer_bytes(optimizer: Any, *, weights: torch.dtype) -> float:
    """Bytes that the optimizer keeps on a GPU for a parameter that it steps, moments and copies of the weight.

    Megatron Core keeps the fp32 copy itself; a precision-aware Adam keeps it instead where nothing needs it for FP8, and
    then may store the 16 bits that a bf16 weight lacks.  Moving the optimizer to the CPU moves moments, and copies that
    Adam would keep: Core's own fp32 shards stay on the GPU.

    Source: megatron-core 0.19.2 ``optimizer/optimizer_config.py`` ``__post_init__``, ``optimizer/__init__.py``,
    ``optimizer/cpu_offloading/hybrid_optimizer.py``; Transformer Engine ``pytorch/optimizers/fused_adam.py``, ``fused_sgd.py``.
    """
    import torch

    aware, offloads = optimizer.use_precision_aware_optimizer, optimizer.optimizer_cpu_offload
    on_gpu = 1 - optimizer.optimizer_offload_fraction if offloads else 1.0
    adam_has_it = aware and (
        offloads or optimizer.main_params_dtype != torch.float32 or optimizer.fp8_recipe in (None, "delayed")
    )
    moments = moment_bytes(optimizer)
    if weights.itemsize == 4 or not (optimizer.use_distributed_optimizer or optimizer.bf16 or optimizer.fp16):
        copy = 0.0
    elif not adam_has_it:
        copy = 4.0
    elif offloads:
        copy = 4.0 * on_gpu
    else:
        remainder = optimizer.store_param_remainders and weights == torch.bfloat16
        full = optimizer.main_params_dtype.itemsize
        copy = 2.0 if remainder and full == 4 else full
    return moments * on_gpu + copy


def _eight_bit_weight_bytes(model: Any) -> int:
    """Bytes of a weight that is multiplied in 8 bits: itself, and the copies that are kept from one micro-batch to the next.

    Hopper multiplies 8-bit matrices in one orientation only, so the forward and the backward pass want a copy each.

    Source: megatron-core 0.19.2 ``extensions/transformer_engine.py`` ``disable_parameter_transpose_cache``.
    """
    own, copies = (1, 1) if model.fp8_param else (2, 2)
    return own + (0 if model.disable_parameter_transpose_cache else copies)


def plan(cfg: Any, *, ranks: int) -> Plan:
    """What does the rank that needs the most memory need?

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Returns:
        The plan of that rank: the first or the last stage, whichever needs more.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        NotPlanned: If a field is set whose bytes are not counted.
    """
    refuse_what_is_not_counted(as_a_gpu_has_it(cfg))
    count, plans = _counting(cfg, ranks=ranks), []
    layout = Layout.from_config(cfg, ranks=ranks)
    for stage in sorted({0, layout.pipeline_model_parallel_size - 1}):
        uncut = without_recomputation(cfg, ranks=ranks, stage=stage)
        with built(cfg, ranks=ranks, stage=stage) as chunks:
            plans.append(Plan(layout, count(stage, chunks), kept_by(chunks, cfg, uncut, ranks=ranks, stage=stage)))
    return max(plans, key=lambda one: one.total_bytes)


def with_layout(cfg: Any, *, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, **model_fields: Any) -> Any:
    """A copy of a configuration with another layout; other fields of the model can be given too.

    Args:
        cfg: A Bridge ``ConfigContainer``; it stays as it is.
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        cp: Context parallel size.
        ep: Expert parallel size.
        **model_fields: Fields of ``cfg.model``, such as ``sequence_parallel=True``.

    Returns:
        The copy.

    Raises:
        UnknownField: If the model has no such field.
    """
    sizes = {"tensor_model": tp, "pipeline_model": pp, "context": cp, "expert_model": ep}
    given = {f"{key}_parallel_size": size for key, size in sizes.items()} | model_fields
    return changed(cfg, {f"model.{name}": value for name, value in given.items()})


def bridge_estimate(cfg: Any, *, ranks: int) -> dict[str, float]:
    """What Bridge's own formula says: bytes of ``states`` and ``activations`` on the fullest rank.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Source: megatron-bridge 0.6.2 ``training/utils/theoretical_memory_utils.py``.
    """
    from megatron.bridge.training.utils.theoretical_memory_utils import estimate_training_memory

    layout = Layout.from_config(cfg, ranks=ranks)
    mine = changed(cfg, {"model.vocab_size": embedding_rows(cfg), "model.should_pad_vocab": False})
    mine.data_parallel_size = layout.data_parallel_size  # Bridge's validate() sets it when a run starts
    microbatches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * layout.data_parallel_size)
    found = estimate_training_memory(mine, num_microbatches=microbatches)
    return {"states": found.weight_and_optimizer_bytes, "activations": found.activation.memory_bytes}


def table(plans: dict[str, Plan]) -> pd.DataFrame:
    """Plans as a table: one row each, components in GiB."""
    import pandas as pd

    rows = {
        name: {part: gib(size) for part, size in one.components.items()} | {"total": gib(one.total_bytes)}
        for name, one in plans.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)

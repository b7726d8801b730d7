"""Bytes per rank, before the run: weights, gradients, optimizer states, activations and the loss.

States are counted on the model that Megatron really builds (:mod:`course_lib.meta_model`), activations on a micro-batch
that really goes through it (:mod:`course_lib.activations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.activations import Activations, activations
from course_lib.layout import Layout, embedding_rows
from course_lib.units import gib

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Activations",
    "Plan",
    "States",
    "activations",
    "bridge_estimate",
    "plan",
    "states",
    "table",
    "with_layout",
]

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class States:
    """What one rank of a pipeline stage holds all the time.

    Attributes:
        stage: The pipeline stage.
        parameters: Parameters on the rank, those of its experts included.
        expert_parameters: Those of its experts.
        weights_bytes: The weights.
        gradients_bytes: The gradient buffers.
        optimizer_bytes: fp32 copies of 16-bit weights, and Adam's two moments, on this rank.
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
        """The sum; what NCCL, CUDA and the allocator take comes on top (`compute.Gpu`)."""
        return sum(self.components.values())


def states(cfg: Any, *, ranks: int) -> list[States]:
    """How many bytes of weights, gradients and optimizer states does a rank of each pipeline stage hold?

    All ranks of a stage hold the same number.  Without the distributed optimizer each rank keeps the states of all its
    parameters; with it, of one share: 1/(DP x CP), or one part in as many as hold the same expert.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Returns:
        One entry a stage.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.

    Source: megatron-core 0.19.2 ``distributed/param_and_grad_buffer.py``, ``optimizer/distrib_optimizer.py``.
    """
    from course_lib import meta_model

    layout, formats = Layout.from_config(cfg, ranks=ranks), meta_model.precision(cfg)
    sharded = cfg.ddp.use_distributed_optimizer or cfg.optimizer.use_distributed_optimizer
    shares = layout.data_parallel_size * layout.context_parallel_size if sharded else 1
    expert_shares = layout.expert_data_parallel_size if sharded else 1
    each = 8 + (4 if formats.weights < 4 else 0)  # two fp32 moments; fp32 weights are their own master copy
    found = []
    for stage in range(layout.pipeline_model_parallel_size):
        with meta_model.built(cfg, ranks=ranks, stage=stage) as chunks:
            parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        sizes = [(one, one.numel() * getattr(one, "stands_for", 1)) for one in parameters]
        count = sum(size for _, size in sizes)
        expert = sum(size for one, size in sizes if not getattr(one, "allreduce", True))
        mine = (count - expert) / shares + expert / expert_shares
        found.append(
            States(stage, count, expert, count * formats.weights, count * formats.gradients, round(mine * each))
        )
    return found


def plan(cfg: Any, *, ranks: int) -> Plan:
    """What does the rank that needs the most memory need?

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Returns:
        The plan of that rank: the first or the last stage, whichever needs more.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        ValueError: As `activations`.
    """
    every = states(cfg, ranks=ranks)
    layout = Layout.from_config(cfg, ranks=ranks)
    ends = {0, len(every) - 1}
    plans = [Plan(layout, every[stage], activations(cfg, ranks=ranks, stage=stage)) for stage in sorted(ends)]
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
        AttributeError: If the model has no such field.
    """
    import copy

    mine = copy.copy(cfg)
    mine.model, mine.train = copy.copy(cfg.model), copy.copy(cfg.train)
    sizes = {"tensor_model": tp, "pipeline_model": pp, "context": cp, "expert_model": ep}
    for name, value in ({f"{key}_parallel_size": size for key, size in sizes.items()} | model_fields).items():
        if not hasattr(mine.model, name):
            raise AttributeError(f"cfg.model has no field {name!r}")
        setattr(mine.model, name, value)
    return mine


def bridge_estimate(cfg: Any, *, ranks: int) -> dict[str, float]:
    """What Bridge's own formula says: bytes of ``states`` and ``activations`` on the fullest rank.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Source: megatron-bridge 0.6.2 ``training/utils/theoretical_memory_utils.py``.
    """
    import copy

    from megatron.bridge.training.utils.theoretical_memory_utils import estimate_training_memory

    layout, mine = Layout.from_config(cfg, ranks=ranks), copy.copy(cfg)
    mine.model = copy.copy(cfg.model)
    mine.model.vocab_size, mine.model.should_pad_vocab = embedding_rows(cfg), False
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

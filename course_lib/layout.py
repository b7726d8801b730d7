"""Which rank does what: the arithmetic of TP, PP, DP, CP and EP, and a reason for every layout that cannot be.

Everything here is integer arithmetic on the fields that Megatron itself reads, so a layout that cannot run is
refused in milliseconds with a fix, not after eight processes have started.  No torch is imported.

The rules themselves, with their sources upstream, are in :mod:`course_lib.layout_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from course_lib.layout_rules import (
    Fields,
    LayoutError,
    Refusal,
    divisors,
    expert_world,
    padded_vocab_size,
    refusals,
    split_layers,
    world,
)

__all__ = [
    "Layout",
    "LayoutError",
    "Refusal",
    "check",
    "legal_layouts",
    "padded_vocab_size",
    "rank_grid",
    "require",
    "stage_layers",
]

# Megatron's own default order, fastest first: the ranks of one TP group are neighbours.
ORDER: tuple[str, ...] = ("tp", "cp", "ep", "dp", "pp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks of one run are divided.

    Attributes:
        world_size: Number of ranks.
        tensor_model_parallel_size: TP, ranks that share each matrix.
        pipeline_model_parallel_size: PP, stages that share the layers.
        context_parallel_size: CP, ranks that share each sequence.
        expert_model_parallel_size: EP, ranks that share the experts of a layer.
        expert_tensor_parallel_size: ETP, ranks that share each expert's matrices; ``None`` as in Megatron.
        virtual_pipeline_model_parallel_size: Model chunks per stage, or ``None`` without interleaving.
        sequence_parallel: Whether activations between the tensor parallel regions are split along the sequence.

    >>> str(Layout(world_size=8, tensor_model_parallel_size=2))
    'TP=2 PP=1 DP=4'
    """

    world_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense part of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_model_size(self) -> int:
        """Ranks that hold one copy of the experts: ETP x EP x PP."""
        sizes = self.expert_model_parallel_size * self.pipeline_model_parallel_size
        return self.resolved_expert_tensor_parallel_size * sizes

    @property
    def data_parallel_size(self) -> int:
        """DP, the copies of the model that read different samples.

        Raises:
            LayoutError: If TP x PP x CP does not divide the world size.
        """
        if reasons := list(world(self)):
            raise LayoutError(reasons)
        return self.world_size // self.model_parallel_size

    @property
    def resolved_expert_tensor_parallel_size(self) -> int:
        """ETP as Bridge resolves ``None``: 1 as soon as EP > 1, otherwise TP."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert; differs from DP when EP > 1."""
        if reasons := list(expert_world(self)):
            raise LayoutError(reasons)
        return self.world_size // self.expert_model_size

    @classmethod
    def from_config(cls, cfg: Any, *, ranks: int) -> Layout:
        """Read the layout that Bridge would use for a configuration.

        Args:
            cfg: A Bridge ``ConfigContainer``, a model provider, or the same as nested mappings (``config.yaml``).
            ranks: World size.

        Returns:
            The layout.  Sequence parallelism without TP is dropped, as Bridge drops it.

        >>> Layout.from_config({"model": {"tensor_model_parallel_size": 4}}, ranks=8).data_parallel_size
        2
        """
        fields = Fields.of(cfg)
        tensor = fields.model("tensor_model_parallel_size", 1)
        return cls(
            world_size=ranks,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=fields.model("pipeline_model_parallel_size", 1),
            context_parallel_size=fields.model("context_parallel_size", 1),
            expert_model_parallel_size=fields.model("expert_model_parallel_size", 1),
            expert_tensor_parallel_size=fields.model("expert_tensor_parallel_size"),
            virtual_pipeline_model_parallel_size=fields.model("virtual_pipeline_model_parallel_size"),
            sequence_parallel=bool(fields.model("sequence_parallel", False)) and tensor != 1,
        )

    def __str__(self) -> str:
        sizes = [("TP", self.tensor_model_parallel_size), ("PP", self.pipeline_model_parallel_size)]
        sizes += [("DP", "?" if self.world_size % self.model_parallel_size else self.data_parallel_size)]
        sizes += [("CP", self.context_parallel_size)] if self.context_parallel_size > 1 else []
        sizes += [("EP", self.expert_model_parallel_size)] if self.expert_model_parallel_size > 1 else []
        sizes += [("VPP", v)] if (v := self.virtual_pipeline_model_parallel_size) else []
        return " ".join(f"{name}={size}" for name, size in sizes) + (" SP" if self.sequence_parallel else "")


def check(cfg: Any, ranks: int) -> list[Refusal]:
    """Can this configuration run on so many ranks?

    Rules about a field that ``cfg`` does not have are left out, so the fields of a model alone can be checked too.

    Args:
        cfg: A Bridge ``ConfigContainer``, a model provider, or the same as (nested) mappings.
        ranks: World size.

    Returns:
        Every reason against it; an empty list if Megatron would accept it.

    >>> model = dict(num_layers=4, hidden_size=64, num_attention_heads=8, tensor_model_parallel_size=3)
    >>> print(check(model, 9)[0])
    model.tensor_model_parallel_size: TP=3 does not divide 8 query heads: choose 1, 2, 4 or 8
    """
    return refusals(Layout.from_config(cfg, ranks=ranks), Fields.of(cfg))


def require(cfg: Any, ranks: int) -> Layout:
    """The layout of a configuration that can run.

    Args:
        cfg: As for :func:`check`.
        ranks: World size.

    Returns:
        The layout.

    Raises:
        LayoutError: If it cannot run, with every reason and its fix.
    """
    if reasons := check(cfg, ranks):
        raise LayoutError(reasons)
    return Layout.from_config(cfg, ranks=ranks)


def legal_layouts(ranks: int, cfg: Any) -> list[Layout]:
    """All ways to divide the ranks that this model allows, by TP, PP, CP and (with experts) EP.

    Args:
        ranks: World size.
        cfg: As for :func:`check`; its own layout fields are replaced, everything else is kept.

    Returns:
        Layouts, smallest TP first.  A model with experts gets sequence parallelism where TP > 1 demands it.

    >>> model = dict(num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=2, transformer_impl="local")
    >>> [str(layout) for layout in legal_layouts(4, model)]
    ['TP=1 PP=1 DP=4', 'TP=1 PP=2 DP=2', 'TP=1 PP=4 DP=1', 'TP=2 PP=1 DP=2', 'TP=2 PP=2 DP=1', 'TP=4 PP=1 DP=1']
    """
    fields = Fields.of(cfg)
    choices = divisors(ranks)
    found = []
    for tensor, pipeline, context in product(choices, repeat=3):
        for expert in choices if fields.model("num_moe_experts") else (1,):
            changed = {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "context_parallel_size": context,
                "expert_model_parallel_size": expert,
            }
            if fields.model("num_moe_experts") and tensor > 1:
                changed["sequence_parallel"] = True
            candidate = fields.replaced(changed)
            if not check(candidate, ranks):
                found.append(Layout.from_config(candidate, ranks=ranks))
    return found


def rank_grid(layout: Layout) -> dict[str, list[list[int]]]:
    """Which ranks talk to each other?

    Args:
        layout: The layout; Megatron's order ``tp-cp-ep-dp-pp`` is used.

    Returns:
        For each kind of group its groups of global ranks: ``tp``, ``cp``, ``dp``, ``pp``, ``dp-cp`` (gradients are
        summed over it) and for experts ``ep``, ``expert-tp``, ``expert-dp``.

    Source: megatron-core 0.19.2 ``parallel_state.py``, ``RankGenerator`` and ``initialize_model_parallel``.

    >>> grid = rank_grid(Layout(world_size=8, tensor_model_parallel_size=2))
    >>> grid["tp"], grid["dp"]
    ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]])
    """
    dense = {
        "tp": layout.tensor_model_parallel_size,
        "cp": layout.context_parallel_size,
        "ep": 1,
        "dp": layout.data_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
    }
    # Experts have a grid of their own over the same ranks: CP ranks are data parallel for them.
    expert = {
        "tp": layout.resolved_expert_tensor_parallel_size,
        "cp": 1,
        "ep": layout.expert_model_parallel_size,
        "dp": layout.expert_data_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
    }
    groups = {kind: _groups(dense, kind.split("-")) for kind in ("tp", "cp", "dp", "pp", "dp-cp")}
    groups |= {
        "ep": _groups(expert, ["ep"]),
        "expert-tp": _groups(expert, ["tp"]),
        "expert-dp": _groups(expert, ["dp"]),
    }
    return groups


def stage_layers(cfg: Any) -> list[list[int]]:
    """How many transformer layers does each pipeline stage build?

    Args:
        cfg: As for :func:`check`.

    Returns:
        For each stage the number of layers in each of its model chunks (one chunk without interleaving).

    Raises:
        LayoutError: If the layers cannot be divided like this.

    Source: megatron-core 0.19.2 ``transformer/transformer_block.py``, ``get_num_layers_to_build``.

    >>> stage_layers(dict(num_layers=30, pipeline_model_parallel_size=4, account_for_embedding_in_pipeline_split=True,
    ...                   account_for_loss_in_pipeline_split=True))
    [[7], [8], [8], [7]]
    """
    stages, reasons = split_layers(Fields.of(cfg))
    if reasons or stages is None:
        raise LayoutError(reasons or [Refusal("model.num_layers", "is not set", "set it")])
    return stages


def _groups(sizes: dict[str, int], kinds: list[str]) -> list[list[int]]:
    """Ranks that agree in every coordinate but ``kinds``; groups and members in rank order."""
    members: dict[tuple[int, ...], list[int]] = {}
    total = 1
    for axis in ORDER:
        total *= sizes[axis]
    for rank in range(total):
        rest, key = rank, []
        for axis in ORDER:
            rest, coordinate = divmod(rest, sizes[axis])
            if axis not in kinds:
                key.append(coordinate)
        members.setdefault(tuple(key), []).append(rank)
    return sorted(members.values())

"""Which rank does what: the arithmetic of TP, PP, DP, CP and EP, and a reason for every layout that cannot be.

Everything here is integer arithmetic on the fields that Megatron itself reads, so a layout that cannot run is
refused in milliseconds with a fix, not after eight processes have started.  No torch is imported.

The rules themselves, with their sources upstream, are in :mod:`course_lib.planning.layout.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from course_lib.common.config import Fields
from course_lib.planning.layout.rules import embedding_rows, padded_vocab_size, refusals
from course_lib.planning.layout.sizes import Layout, LayoutError, Refusal, divisors
from course_lib.planning.layout.stages import stage_layers

__all__ = [
    "Layout",
    "LayoutError",
    "Refusal",
    "check",
    "embedding_rows",
    "legal_layouts",
    "padded_vocab_size",
    "rank_grid",
    "require",
    "stage_layers",
]

# Megatron's own default order, fastest first: the ranks of one TP group are neighbours.
ORDER: tuple[str, ...] = ("tp", "cp", "ep", "dp", "pp")


def check(cfg: Any, ranks: int) -> list[Refusal]:
    """Can this configuration run on so many ranks?

    Rules about a field that ``cfg`` does not have are left out, so the fields of a model alone can be checked too.

    Args:
        cfg: A Bridge ``ConfigContainer``, a model provider, or the same as (nested) mappings.

    Returns:
        Every reason against it, each with changes that were tried and are accepted as far as this reason goes; an empty
        list if Megatron would accept the layout.

    >>> model = dict(num_layers=4, hidden_size=64, num_attention_heads=8, tensor_model_parallel_size=3)
    >>> print(check(model, 24)[0])
    model.tensor_model_parallel_size: TP=3 does not divide 8 query heads: choose 1, 2, 4 or 8
    """
    found = _refusals(cfg, ranks, {})
    return [replace(reason, changes=_accepted(reason, found, cfg, ranks)) for reason in found]


def _refusals(cfg: Any, ranks: int, changes: Mapping[str, Any]) -> list[Refusal]:
    """The reasons against a configuration with some fields changed."""
    fields = Fields.of(cfg)
    fields = Fields(fields.cfg, {**(fields.changed or {}), **changes})
    return refusals(Layout.from_config(fields, ranks=changes.get("ranks", ranks)), fields)


def _accepted(reason: Refusal, found: list[Refusal], cfg: Any, ranks: int) -> tuple[Mapping[str, Any], ...]:
    """The changes that take a reason away and bring up no other; where one alone does not, with what it needs besides."""
    known = {other.kind for other in found}

    def complete(change: Mapping[str, Any], depth: int) -> Mapping[str, Any] | None:
        left = {other.kind: other for other in _refusals(cfg, ranks, change)}
        if reason.kind in left:
            return None
        new = next((other for kind, other in left.items() if kind not in known), None)
        if new is None:
            return change
        more = (complete({**change, **further}, depth - 1) for further in new.changes if depth)
        return next(filter(None, more), None)

    alone = tuple(change for change in reason.changes if complete(change, 0))
    together = {} if alone else {repr(whole): whole for change in reason.changes if (whole := complete(change, 5))}
    return alone or tuple(sorted(together.values(), key=len))


def require(cfg: Any, ranks: int) -> Layout:
    """The layout of a configuration that can run.

    Args:
        cfg: As for :func:`check`.

    Returns:
        The layout.

    Raises:
        LayoutError: If it cannot run, with every reason and its fix.
    """
    if reasons := check(cfg, ranks):
        raise LayoutError(*reasons)
    return Layout.from_config(cfg, ranks=ranks)


def legal_layouts(ranks: int, cfg: Any) -> list[Layout]:
    """All ways to divide the ranks that this model allows, by TP, PP, CP and (with experts) EP.

    Args:
        cfg: As for :func:`check`; its own layout fields are replaced, everything else is kept.

    Returns:
        Layouts, smallest TP first.  A model with experts gets sequence parallelism where TP > 1 demands it.

    >>> model = dict(num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=2, transformer_impl="local")
    >>> [str(layout) for layout in legal_layouts(4, model)]
    ['TP=1 PP=1 DP=4', 'TP=1 PP=2 DP=2', 'TP=1 PP=4 DP=1', 'TP=2 PP=1 DP=2', 'TP=2 PP=2 DP=1', 'TP=4 PP=1 DP=1']
    """
    require({}, ranks)
    has_experts = bool(Fields.of(cfg).model("num_moe_experts"))
    choices = divisors(ranks)
    found = []
    for tensor, pipeline, context, expert in product(choices, choices, choices, choices if has_experts else (1,)):
        changed = {
            "model.tensor_model_parallel_size": tensor,
            "model.pipeline_model_parallel_size": pipeline,
            "model.context_parallel_size": context,
            "model.expert_model_parallel_size": expert,
        }
        if has_experts and tensor > 1:
            changed["model.sequence_parallel"] = True
        if not _refusals(cfg, ranks, changed):
            found.append(Layout.from_config(Fields(cfg, changed), ranks=ranks))
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
    return {kind: _groups(dense, kind.split("-")) for kind in ("tp", "cp", "dp", "pp", "dp-cp")} | {
        "ep": _groups(expert, ["ep"]),
        "expert-tp": _groups(expert, ["tp"]),
        "expert-dp": _groups(expert, ["dp"]),
    }


def _groups(sizes: dict[str, int], kinds: list[str]) -> list[list[int]]:
    """Ranks that agree in every coordinate but ``kinds``; groups and members in rank order."""
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(prod(sizes.values())):
        rest, key = rank, []
        for axis in ORDER:
            rest, coordinate = divmod(rest, sizes[axis])
            if axis not in kinds:
                key.append(coordinate)
        members.setdefault(tuple(key), []).append(rank)
    return sorted(members.values())

"""Names: what each method of torch's process groups moves, and which kinds of groups Megatron makes."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["GROUPS", "METHODS"]

GROUPS = (
    ("tp", "_TENSOR_MODEL_PARALLEL_GROUP"),
    ("pp", "_PIPELINE_MODEL_PARALLEL_GROUP"),
    ("cp", "_CONTEXT_PARALLEL_GROUP"),
    ("dp", "_DATA_PARALLEL_GROUP"),
    ("dp-cp", "_DATA_PARALLEL_GROUP_WITH_CP"),
    ("dp-cp", "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"),
    ("embedding", "_EMBEDDING_GROUP"),
    ("embedding", "_POSITION_EMBEDDING_GROUP"),
    ("tp-pp", "_MODEL_PARALLEL_GROUP"),
    ("tp-cp", "_TENSOR_AND_CONTEXT_PARALLEL_GROUP"),
    ("tp-dp", "_TENSOR_AND_DATA_PARALLEL_GROUP"),
    ("tp-dp-cp", "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"),
    ("ep", "_EXPERT_MODEL_PARALLEL_GROUP"),
    ("expert-tp", "_EXPERT_TENSOR_PARALLEL_GROUP"),
    ("expert-tp-ep", "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"),
    ("expert-dp", "_EXPERT_DATA_PARALLEL_GROUP"),
    ("expert-dp", "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP"),
    ("optimizer", "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"),
)
"""Kinds of groups and the variables of `megatron.core.parallel_state` that hold them.

Source: megatron-core parallel_state.py @ 0.19.2
"""


def _first(arguments: tuple) -> list[list]:
    return [[tensor] for tensor in arguments[0]]


def _parts_out(arguments: tuple) -> list[list]:
    return list(arguments[0])


def _parts_in(arguments: tuple) -> list[list]:
    return list(arguments[1])


def _out(arguments: tuple) -> list[list]:
    return [[arguments[0]]]


def _in(arguments: tuple) -> list[list]:
    return [[arguments[1]]]


def _many_in(arguments: tuple) -> list[list]:
    return [[tensor] for tensor in arguments[1]]


METHODS: dict[str, tuple[str, Callable[[tuple], list[list]]]] = {
    "allreduce": ("all_reduce", _first),
    "allreduce_coalesced": ("all_reduce", _first),
    "broadcast": ("broadcast", _first),
    "reduce": ("reduce", _first),
    "allgather": ("all_gather", _parts_out),
    "all_gather_single": ("all_gather", _out),
    "_allgather_base": ("all_gather", _out),
    "all_gather_single_coalesced": ("all_gather", _first),
    "allgather_into_tensor_coalesced": ("all_gather", _first),
    "reduce_scatter": ("reduce_scatter", _parts_in),
    "reduce_scatter_single": ("reduce_scatter", _in),
    "_reduce_scatter_base": ("reduce_scatter", _in),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _many_in),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _many_in),
    "alltoall": ("all_to_all", lambda arguments: [arguments[1]]),
    "all_to_all_single": ("all_to_all", _in),
    "alltoall_base": ("all_to_all", _in),
    "gather": ("gather", _many_in),
    "scatter": ("scatter", _first),
    "send": ("send", _first),
    "recv": ("recv", _first),
    "barrier": ("barrier", lambda arguments: [[]]),
}
"""Methods of `torch.distributed.ProcessGroup`: the operation's name, and which tensors are the whole that it moves.

The whole is what all ranks of the group hold together afterwards or before: the output of a gather, the input of a
scatter, the tensor of an all-reduce.
"""

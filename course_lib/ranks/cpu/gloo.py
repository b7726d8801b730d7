"""Collectives as NCCL takes them, over gloo: averages, uneven parts, any shape; and transfers between stages."""

from __future__ import annotations

import functools
from collections.abc import Callable

from course_lib.stack.redirection import Redirection

__all__ = ["redirections"]

FORWARD, BACKWARD = 1, 2
"""Tags of activations and of gradients between pipeline stages."""


def _gloo_for_nccl(original: Callable) -> Callable:
    """Wrap `_new_process_group_helper`, through which every group comes: what asks for NCCL or UCC gets gloo.

    torch numbers the groups in each process, so ranks that make groups of their own give different ones the same name.
    NCCL connects a group when it is first used; gloo does at once, and would connect one group with the other.
    """

    @functools.wraps(original)
    def new_process_group(
        group_size: int,
        group_rank: int,
        global_ranks_in_group: list[int],
        backend: str,
        store: object,
        *args: object,
        **named: object,
    ) -> object:
        from torch.distributed import PrefixStore

        backend = "gloo" if any(name in str(backend) for name in ("nccl", "ucc")) else backend
        store = PrefixStore("-".join(map(str, global_ranks_in_group)), store)
        return original(group_size, group_rank, global_ranks_in_group, backend, store, *args, **named)

    return new_process_group


def _int_splits(original: Callable) -> Callable:
    @functools.wraps(original)
    def all_to_all_single(
        output: object,
        input: object,
        output_split_sizes: object = None,
        input_split_sizes: object = None,
        group: object = None,
        async_op: bool = False,
    ) -> object:
        def ints(sizes: object) -> list[int] | None:
            return None if sizes is None else [int(size) for size in sizes]

        return original(
            output,
            input.contiguous(),
            ints(output_split_sizes),
            ints(input_split_sizes),
            group=group,
            async_op=async_op,
        )

    return all_to_all_single


def _average_before(original: Callable) -> Callable:
    """Wrap `all_reduce`: divide by the group's size, then sum, which an asynchronous call allows too."""

    @functools.wraps(original)
    def all_reduce(tensor: object, op: object = None, group: object = None, async_op: bool = False) -> object:
        import torch.distributed as dist

        if op == dist.ReduceOp.AVG:
            _divide(tensor, dist.get_world_size(group))
            op = dist.ReduceOp.SUM
        return original(tensor, dist.ReduceOp.SUM if op is None else op, group, async_op)

    return all_reduce


def _average_before_scatter(original: Callable) -> Callable:
    @functools.wraps(original)
    def reduce_scatter_tensor(
        output: object, input: object, op: object = None, group: object = None, async_op: bool = False
    ) -> object:
        import torch.distributed as dist

        if op == dist.ReduceOp.AVG:
            if output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr():
                input = input.clone()  # in place only where the caller gave up the input anyway
            _divide(input, dist.get_world_size(group))
            op = dist.ReduceOp.SUM
        return original(output, input, dist.ReduceOp.SUM if op is None else op, group, async_op)

    return reduce_scatter_tensor


def _gather_flat(original: Callable) -> Callable:
    """Wrap `all_gather_into_tensor`: NCCL looks at memory only, gloo at shapes too."""

    @functools.wraps(original)
    def all_gather_into_tensor(
        output_tensor: object, input_tensor: object, group: object = None, async_op: bool = False
    ) -> object:
        if output_tensor.dim() != input_tensor.dim() or output_tensor.shape[1:] != input_tensor.shape[1:]:
            output_tensor, input_tensor = output_tensor.view(-1), input_tensor.contiguous().view(-1)
        return original(output_tensor, input_tensor, group, async_op)

    return all_gather_into_tensor


def _gather_uneven(original: Callable) -> Callable:
    """Wrap `all_gather`: pad to the largest part, gather, and cut; NCCL takes parts of different sizes as they are."""

    @functools.wraps(original)
    def all_gather(tensor_list: list, tensor: object, group: object = None, async_op: bool = False) -> object:
        import torch

        if async_op or all(part.shape == tensor_list[0].shape for part in tensor_list):
            return original(tensor_list, tensor, group, async_op)
        longest = max(part.numel() for part in tensor_list)
        mine = tensor.new_zeros(longest)
        mine[: tensor.numel()] = tensor.detach().reshape(-1)
        padded = [torch.empty_like(mine) for _ in tensor_list]
        original(padded, mine, group)
        with torch.no_grad():
            for part, whole in zip(tensor_list, padded, strict=True):
                part.copy_(whole[: part.numel()].view(part.shape))
        return None

    return all_gather


def _scatter_uneven(original: Callable) -> Callable:
    """Wrap `reduce_scatter`: as `_gather_uneven`, the other way round."""

    @functools.wraps(original)
    def reduce_scatter(
        output: object, input_list: list, op: object = None, group: object = None, async_op: bool = False
    ) -> object:
        import torch
        import torch.distributed as dist

        op = dist.ReduceOp.SUM if op is None else op
        if async_op or all(part.shape == input_list[0].shape for part in input_list):
            return original(output, input_list, op, group, async_op)
        longest = max(part.numel() for part in input_list)
        padded = output.new_zeros(len(input_list), longest)
        mine = output.new_empty(longest)
        with torch.no_grad():
            for row, part in zip(padded, input_list, strict=True):
                row[: part.numel()] = part.reshape(-1)
            dist.reduce_scatter_tensor(mine, padded.view(-1), op=op, group=group)
            output.copy_(mine[: output.numel()].view(output.shape))
        return None

    return reduce_scatter


def _divide(tensor: object, count: int) -> None:
    import torch

    if count > 1:
        with torch.no_grad():
            tensor.div_(count, rounding_mode=None if tensor.is_floating_point() else "trunc")


def _tagged_transfers(original: Callable) -> Callable:
    """Replace `_p2p_ops`: an activation meets an activation, whatever was sent before it.

    Without tags, what one rank sends to another arrives in the order in which it was sent.  With two stages the previous
    and the next one are the same rank: both ask it first for an activation and send it a gradient first.
    """

    @functools.wraps(original)
    def transfers(
        *,
        tensor_send_prev: object,
        tensor_recv_prev: object,
        tensor_send_next: object,
        tensor_recv_next: object,
        group: object,
        prev_pipeline_rank: int,
        next_pipeline_rank: int,
    ) -> dict[str, object]:
        from torch.distributed import irecv, isend

        return {
            name: transfer(tensor, peer, group, tag)
            for name, transfer, tensor, peer, tag in (
                ("send_prev", isend, tensor_send_prev, prev_pipeline_rank, BACKWARD),
                ("recv_prev", irecv, tensor_recv_prev, prev_pipeline_rank, FORWARD),
                ("send_next", isend, tensor_send_next, next_pipeline_rank, FORWARD),
                ("recv_next", irecv, tensor_recv_next, next_pipeline_rank, BACKWARD),
            )
            if tensor is not None
        }

    return transfers


def _tagged_batch(original: Callable) -> Callable:
    """Replace `_batched_p2p_ops`: the same transfers, without their names."""
    transfers = _tagged_transfers(original)

    @functools.wraps(original)
    def batch(**tensors_and_ranks: object) -> list:
        return list(transfers(**tensors_and_ranks).values())

    return batch


def _tagged_shapes(original: Callable) -> Callable:
    """Replace `P2PCommunicator._communicate_shapes`: the shapes travel as the tensors do, and with their tags."""

    @functools.wraps(original)
    def shapes(
        self: object, tensor_send_next: object, tensor_send_prev: object, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        import torch
        from megatron.core.pipeline_parallel import p2p_communication

        sent = [
            None if tensor is None else torch.tensor(tensor.shape) for tensor in (tensor_send_prev, tensor_send_next)
        ]
        got = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
        for request in p2p_communication._batched_p2p_ops(
            tensor_send_prev=sent[0],
            tensor_recv_prev=got[0] if recv_prev else None,
            tensor_send_next=sent[1],
            tensor_recv_next=got[1] if recv_next else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        ):
            request.wait()
        return got[0].tolist(), got[1].tolist()

    return shapes


def redirections() -> list[Redirection]:
    """What gloo refuses and NCCL does, in the order in which it is applied."""
    stages = "megatron.core.pipeline_parallel.p2p_communication"
    same_rank = (
        "of two stages the previous is the next: upstream's order gives one the other's gradient for its activation"
    )
    neighbours = ("group", "prev_pipeline_rank", "next_pipeline_rank")
    wanted = tuple(f"tensor_{way}_{stage}" for way in ("send", "recv") for stage in ("prev", "next"))
    no_average = "gloo has no averaging reduction; MoE's and MTP's logging ask for one"
    return [
        Redirection(
            "torch.distributed.distributed_c10d._new_process_group_helper",
            _gloo_for_nccl,
            "gloo where NCCL or UCC was asked for",
            "Megatron names them in places, whatever the configuration's backend is; they need GPUs",
            ("group_size", "group_rank", "global_ranks_in_group", "backend", "store"),
        ),
        Redirection("torch.distributed.all_to_all_single", _int_splits, "split sizes as ints", "gloo refuses tensors"),
        Redirection(
            "torch.distributed.all_reduce",
            _average_before,
            "an average is a sum of shares",
            no_average,
            ("tensor", "op", "group", "async_op"),
        ),
        Redirection(
            "torch.distributed.reduce_scatter_tensor",
            _average_before_scatter,
            "an average is a sum of shares",
            no_average,
            ("output", "input", "op", "group", "async_op"),
        ),
        Redirection(
            "torch.distributed.all_gather",
            _gather_uneven,
            "parts may differ in size",
            "gloo wants equal parts; MoE with tensor parallelism gathers what the router gave each rank",
            ("tensor_list", "tensor", "group", "async_op"),
        ),
        Redirection(
            "torch.distributed.reduce_scatter",
            _scatter_uneven,
            "parts may differ in size",
            "as torch.distributed.all_gather",
            ("output", "input_list", "op", "group", "async_op"),
        ),
        *(
            Redirection(
                name,
                _gather_flat,
                "gathers into any shape",
                "gloo compares shapes where NCCL compares sizes",
                ("output_tensor", "input_tensor", "group", "async_op"),
            )
            for name in (
                "torch.distributed.all_gather_into_tensor",
                "megatron.core.tensor_parallel.utils.dist_all_gather_func",
            )
        ),
        *(
            Redirection(
                f"{stages}.{name}",
                replace,
                "activations and gradients have tags",
                same_rank,
                wanted + neighbours,
            )
            for name, replace in (("_batched_p2p_ops", _tagged_batch), ("_p2p_ops", _tagged_transfers))
        ),
        Redirection(
            f"{stages}.P2PCommunicator._communicate_shapes",
            _tagged_shapes,
            "shapes have tags as well",
            same_rank,
            ("self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next"),
        ),
    ]

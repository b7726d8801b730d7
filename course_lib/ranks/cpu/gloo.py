"""Collectives as NCCL takes them, over gloo: averages, uneven parts, any shape; and transfers between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from course_lib.stack.patches import Patches

PATCHES = Patches()
FORWARD, BACKWARD = 1, 2
"""Tags of activations and of gradients between pipeline stages."""
P2P = "megatron.core.pipeline_parallel.p2p_communication"
NO_AVERAGE = "gloo has no averaging reduction; MoE's and MTP's logging ask for one"
UNEVEN = "gloo wants equal parts; MoE with tensor parallelism gathers what the router gave each rank"
SAME_RANK = "of two stages the previous is the next: upstream's order gives one the other's gradient for its activation"


class Done:
    """The handle of a collective that had nothing to do, or has done it, and the tensors that it filled."""

    def __init__(self, filled: Sequence[torch.Tensor]) -> None:
        self._filled = list(filled)

    def wait(self, *_: object) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """True: it is."""
        return True

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """What DDP's hooks wait for."""
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(self._filled)
        return future


@PATCHES.replaces(
    "torch.distributed.distributed_c10d._new_process_group_helper",
    why="Megatron names NCCL and UCC in places, whatever the configuration's backend is; they need GPUs",
)
def new_process_group(original, group_size, group_rank, global_ranks_in_group, backend, store, *args, **named):
    """gloo where NCCL or UCC was asked for; every group comes through here.

    torch numbers the groups in each process, so ranks that make groups of their own give different ones the same name.
    NCCL connects a group when it is first used; gloo does at once, and would connect one group with the other.
    """
    backend = "gloo" if any(name in str(backend) for name in ("nccl", "ucc")) else backend
    store = dist.PrefixStore("-".join(map(str, global_ranks_in_group)), store)
    return original(group_size, group_rank, global_ranks_in_group, backend, store, *args, **named)


@PATCHES.makes(
    "torch.distributed.ProcessGroupGloo.__init__",
    why="a thread for each of some twenty groups looks a hundred times a second for news, and eight ranks have two cores",
)
def one_device(original):
    """All groups of this process share one device of gloo's, and its thread."""
    device = None

    def init(self, store, rank, size, *args, **named):
        nonlocal device
        if args or set(named) != {"timeout"}:
            return original(self, store, rank, size, *args, **named)
        device = device or dist.ProcessGroupGloo.create_default_device()
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout = [device], named["timeout"]
        return original(self, store, rank, size, options)

    return init


@PATCHES.replaces("torch.distributed.all_to_all_single", why="gloo refuses split sizes that are tensors")
def all_to_all_single(
    original, output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False
):
    """Split sizes are whole numbers."""
    sizes = [None if s is None else [int(size) for size in s] for s in (output_split_sizes, input_split_sizes)]
    return original(output, input.contiguous(), *sizes, group=group, async_op=async_op)


@PATCHES.replaces("torch.distributed.barrier", why="gloo refuses a list of devices; AutoModel gives one")
def barrier(original, group=None, async_op=False, device_ids=None):
    """The devices are left out: each rank has one."""
    return original(group=group, async_op=async_op)


@dataclass(frozen=True)
class Scaled:
    """A sum of tensors that are multiplied first."""

    factor: float


PATCHES.sets(
    Scaled,
    "torch.distributed._make_nccl_premul_sum",
    why="gloo has no sum of multiples; sharded layers ask for one",
    becomes="multiplied before the sum",
)


def _sum_of_shares(tensor: Any, op: Any, group: Any) -> Any:
    """The operation that takes another's place once the tensor is scaled, which an asynchronous call allows too."""
    if not isinstance(op, Scaled) and op != dist.ReduceOp.AVG:
        return dist.ReduceOp.SUM if op is None else op
    with torch.no_grad():
        if isinstance(op, Scaled):
            tensor.mul_(op.factor)
        elif (count := dist.get_world_size(group)) > 1:
            tensor.div_(count, rounding_mode=None if tensor.is_floating_point() else "trunc")
    return dist.ReduceOp.SUM


@PATCHES.replaces("torch.distributed.all_reduce", why=f"{NO_AVERAGE}; it sends a group of one through its threads")
def all_reduce(original, tensor, op=None, group=None, async_op=False):
    """An average is a sum of shares; nothing happens in a group of one."""
    op = _sum_of_shares(tensor, op, group)
    if group is not None and group.size() == 1:
        return Done([tensor]) if async_op else None
    return original(tensor, op, group, async_op)


@PATCHES.replaces("torch.distributed.reduce_scatter_tensor", why=NO_AVERAGE)
def reduce_scatter_tensor(original, output, input, op=None, group=None, async_op=False):
    """An average is a sum of shares."""
    scales = isinstance(op, Scaled) or op == dist.ReduceOp.AVG
    if scales and output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr():
        input = input.clone()  # in place only where the caller gave up the input anyway
    return original(output, input, _sum_of_shares(input, op, group), group, async_op)


@PATCHES.replaces("torch.distributed.all_gather", why=UNEVEN)
def all_gather(original, tensor_list, tensor, group=None, async_op=False):
    """Parts may differ in size: pad to the largest, gather, and cut."""
    if async_op or all(part.shape == tensor_list[0].shape for part in tensor_list):
        return original(tensor_list, tensor, group, async_op)
    mine = tensor.new_zeros(max(part.numel() for part in tensor_list))
    mine[: tensor.numel()] = tensor.detach().reshape(-1)
    padded = [torch.empty_like(mine) for _ in tensor_list]
    original(padded, mine, group)
    with torch.no_grad():
        for part, whole in zip(tensor_list, padded, strict=True):
            part.copy_(whole[: part.numel()].view(part.shape))
    return None


@PATCHES.replaces("torch.distributed.reduce_scatter", why=UNEVEN)
def reduce_scatter(original, output, input_list, op=None, group=None, async_op=False):
    """Parts may differ in size, as in `all_gather`, the other way round."""
    op = dist.ReduceOp.SUM if op is None else op
    if async_op or all(part.shape == input_list[0].shape for part in input_list):
        return original(output, input_list, op, group, async_op)
    longest = max(part.numel() for part in input_list)
    padded, mine = output.new_zeros(len(input_list), longest), output.new_empty(longest)
    with torch.no_grad():
        for row, part in zip(padded, input_list, strict=True):
            row[: part.numel()] = part.reshape(-1)
        dist.reduce_scatter_tensor(mine, padded.view(-1), op=op, group=group)
        output.copy_(mine[: output.numel()].view(output.shape))
    return None


@PATCHES.replaces(
    "torch.distributed.all_gather_into_tensor",
    "megatron.core.tensor_parallel.utils.dist_all_gather_func",
    why="gloo compares shapes where NCCL compares sizes",
)
def all_gather_into_tensor(original, output_tensor, input_tensor, group=None, async_op=False):
    """Gathers into any shape."""
    if output_tensor.dim() != input_tensor.dim() or output_tensor.shape[1:] != input_tensor.shape[1:]:
        output_tensor, input_tensor = output_tensor.view(-1), input_tensor.contiguous().view(-1)
    return original(output_tensor, input_tensor, group, async_op)


@PATCHES.replaces(f"{P2P}._p2p_ops", why=SAME_RANK)
def p2p_ops(
    _, *, tensor_send_prev, tensor_recv_prev, tensor_send_next, tensor_recv_next, group, prev_pipeline_rank,
    next_pipeline_rank
):  # fmt: skip
    """Activations and gradients have tags: an activation meets an activation, whatever was sent before it.

    Without tags, what one rank sends to another arrives in the order in which it was sent.  With two stages the previous
    and the next one are the same rank: both ask it first for an activation and send it a gradient first.
    """
    return {
        name: transfer(tensor, peer, group, tag)
        for name, transfer, tensor, peer, tag in (
            ("send_prev", dist.isend, tensor_send_prev, prev_pipeline_rank, BACKWARD),
            ("recv_prev", dist.irecv, tensor_recv_prev, prev_pipeline_rank, FORWARD),
            ("send_next", dist.isend, tensor_send_next, next_pipeline_rank, FORWARD),
            ("recv_next", dist.irecv, tensor_recv_next, next_pipeline_rank, BACKWARD),
        )
        if tensor is not None
    }


@PATCHES.replaces(f"{P2P}._batched_p2p_ops", why=SAME_RANK)
def batched_p2p_ops(_, **tensors_and_ranks):
    """The same transfers, without their names."""
    return list(p2p_ops(None, **tensors_and_ranks).values())


@PATCHES.replaces(f"{P2P}.P2PCommunicator._communicate_shapes", why=SAME_RANK)
def communicate_shapes(_, self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
    """Shapes travel as the tensors do, and with their tags."""
    from megatron.core.pipeline_parallel import p2p_communication

    previous, following = (None if t is None else torch.tensor(t.shape) for t in (tensor_send_prev, tensor_send_next))
    got = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
    for request in p2p_communication._batched_p2p_ops(
        tensor_send_prev=previous,
        tensor_recv_prev=got[0] if recv_prev else None,
        tensor_send_next=following,
        tensor_recv_next=got[1] if recv_next else None,
        group=self.pp_group,
        prev_pipeline_rank=self.prev_rank,
        next_pipeline_rank=self.next_rank,
    ):
        request.wait()
    return got[0].tolist(), got[1].tolist()

"""Sums and shards as suit ranks on one machine: each rank reads what it needs, once, from the rank that has it.

torch has no reduce-scatter over gloo: it copies the gradients, adds all of them up on every rank, and throws away all
but one shard.  Its all-gather copies every shard twice on the way, and its all-reduce goes through sockets.  Here the
three go through `mailbox`.

They stand where torch's own stand, at the methods of a process group, so a recorder sees one collective as ever, and
none of the messages below.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from course_lib.ranks.cpu.fast import Done
from course_lib.ranks.cpu.mailbox import SLOT_BYTES, Exchange, Mailboxes, connect
from course_lib.stack.redirection import Redirection

__all__ = ["redirections"]

GROUP = "torch.distributed.ProcessGroup"

MOST_RANKS = 8
"""An all-reduce over more goes by gloo: everyone telling everyone would be too many messages."""


def _connections() -> Callable[[Any], Exchange]:
    """A function that connects the ranks of a group when they first need it."""
    open_for: weakref.WeakKeyDictionary[Any, Exchange] = weakref.WeakKeyDictionary()

    def exchange(group: Any) -> Exchange:
        if group not in open_for:
            open_for[group] = connect(group)
        return open_for[group]

    return exchange


def _reduce_scatter(exchange: Callable[[Any], Exchange], original: Callable) -> Callable:
    """Each rank gets the others' values of its own shard, and adds them to its own; an average too."""
    import torch

    @functools.wraps(original)
    def reduce_scatter(group: Any, outputs: list, inputs: list, *options: Any) -> object:
        operation = options[0].reduceOp if options else torch.distributed.ReduceOp.SUM
        average = operation == torch.distributed.ReduceOp.AVG
        if not average and operation != torch.distributed.ReduceOp.SUM:
            return original(group, outputs, inputs, *options)
        me, size = group.rank(), group.size()
        for output, whole in zip(outputs, inputs, strict=True):
            total, shards = output.view(-1), whole.view(size, -1)
            if total.data_ptr() != shards[me].data_ptr():
                total.copy_(shards[me])
            if size > 1:
                at_once = SLOT_BYTES // (size - 1) // whole.element_size()
                pieces = [shard.split(at_once) for shard in shards]
                for number, sums in enumerate(total.split(at_once)):
                    dealt = {rank: pieces[rank][number] for rank in range(size) if rank != me}
                    for _, received in sorted(exchange(group).deal(dealt).items()):
                        sums.add_(received)
            if average:
                total.div_(size)
        return Done()

    return reduce_scatter


def _all_gather(exchange: Callable[[Any], Exchange], original: Callable) -> Callable:
    """Each rank shows its shard to the others, who put a copy in its place."""

    @functools.wraps(original)
    def all_gather(group: Any, outputs: list, inputs: list, *_: Any) -> object:
        me, size = group.rank(), group.size()
        for whole, mine in zip(outputs, inputs, strict=True):
            shards, mine = whole.view(size, -1), mine.view(-1)
            if size > 1:
                at_once = SLOT_BYTES // whole.element_size()
                pieces = [shard.split(at_once) for shard in shards]
                for number, shown in enumerate(mine.split(at_once)):
                    for rank, received in exchange(group).share(shown).items():
                        if rank != me:
                            pieces[rank][number].copy_(received)
            if shards[me].data_ptr() != mine.data_ptr():
                shards[me].copy_(mine)
        return Done()

    return all_gather


def _all_reduce(exchange: Callable[[Any], Exchange], original: Callable) -> Callable:
    """Each rank shows its tensor to the others, and everyone adds all of them up in the same order; a maximum too."""
    import torch

    operations = {torch.distributed.ReduceOp.SUM: torch.add, torch.distributed.ReduceOp.MAX: torch.maximum}

    @functools.wraps(original)
    def allreduce(group: Any, tensors: list, options: Any = None, *more: Any, **named: Any) -> object:
        suits = (
            options is not None
            and not (more or named)
            and isinstance(options, torch.distributed.AllreduceOptions)
            and options.reduceOp.op in operations
            and len(tensors) == 1
            and tensors[0].is_contiguous()
            and 1 < group.size() <= MOST_RANKS
        )
        boxes = exchange(group) if suits else None
        if not isinstance(boxes, Mailboxes):
            return original(group, tensors, options, *more, **named)
        combine = operations[options.reduceOp.op]
        for out in tensors[0].detach().view(-1).split(SLOT_BYTES // tensors[0].element_size()):
            first, second, *rest = (shown for _, shown in sorted(boxes.share(out).items()))
            combine(first, second, out=out)
            for shown in rest:
                combine(out, shown, out=out)
        return Done()

    return allreduce


def _with_its_groups(original: Callable) -> Callable:
    """Wrap `destroy_model_parallel`: the groups that Megatron made end with it, and with them sockets and mailboxes."""

    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        made = parallel_state._global_process_group_list or []
        original()
        for group in made:
            if dist.is_initialized() and group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)

    return destroy_model_parallel


def _known(*names: str) -> str:
    """The first of these methods that the installed torch has: 2.13 renamed some, and kept the old names beside."""
    import torch

    return next((name for name in names if hasattr(torch.distributed.ProcessGroup, name)), names[0])


def redirections() -> list[Redirection]:
    """The collectives of tensor parallelism and of the distributed optimizer, in the order in which they are applied."""
    exchange = _connections()
    return [
        *(
            Redirection(
                f"{GROUP}.{method}", functools.partial(replacement, exchange), "read from the others' mailboxes", reason
            )
            for method, replacement, reason in (
                (
                    _known("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
                    _reduce_scatter,
                    "gloo adds up everything on every rank, keeps a part",
                ),
                (
                    _known("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
                    _all_gather,
                    "gloo copies every part twice",
                ),
                ("allreduce", _all_reduce, "gloo sends it through sockets"),
            )
        ),
        Redirection(
            "megatron.core.parallel_state.destroy_model_parallel",
            _with_its_groups,
            "destroys its process groups",
            "upstream only forgets them: each keeps a socket, a pipe and memory for every rank",
            (),
        ),
    ]

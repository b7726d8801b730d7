"""The distributed optimizer's two collectives, each shard sent once and straight to the rank that needs it.

torch has no reduce-scatter over gloo: it copies the gradients, adds all of them up on every rank, and throws away all
but one shard.  Its all-gather copies every shard twice on the way.  On one machine the shortest way is a message from
each rank to each other rank.  Together the two take half of the time (`make bench`).

They stand where torch's own stand, at the methods of a process group, so a recorder sees one reduce-scatter and one
all-gather as ever, and none of the messages below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from course_lib.cpu.fast import Done
from course_lib.cpu.redirection import Redirection

__all__ = ["redirections"]

GROUP = "torch.distributed.ProcessGroup"


def _exchange(group: object, sends: dict[int, object], receives: dict[int, object]) -> None:
    """Send one tensor to and receive one from each other rank of a group, all at the same time."""
    from torch.distributed import ProcessGroup

    # The recorder wraps the methods of the class while it records; these are the ones below.
    send, receive = (getattr(method, "__wrapped__", method) for method in (ProcessGroup.send, ProcessGroup.recv))
    works = [send(group, [tensor], rank, 0) for rank, tensor in sends.items()]
    works += [receive(group, [tensor], rank, 0) for rank, tensor in receives.items()]
    for work in works:
        work.wait()


def _others(group: object) -> list[int]:
    """The other ranks of a group, the next one first, so that not all ranks talk to the same one."""
    me, size = group.rank(), group.size()
    return [(me + step) % size for step in range(1, size)]


def _reduce_scatter(original: Callable) -> Callable:
    """Each rank gets the others' values of its own shard, and adds them to its own; an average too."""
    import torch

    @functools.wraps(original)
    def reduce_scatter(group: object, outputs: list, inputs: list, options: object) -> object:
        average = options.reduceOp == torch.distributed.ReduceOp.AVG
        if not average and options.reduceOp != torch.distributed.ReduceOp.SUM:
            return original(group, outputs, inputs, options)
        me, others = group.rank(), _others(group)
        for output, whole in zip(outputs, inputs, strict=True):
            parts = whole.view(group.size(), -1)
            received = {rank: torch.empty_like(parts[me]) for rank in others}
            _exchange(group, {rank: parts[rank] for rank in others}, received)
            total = output.view(-1)
            if total.data_ptr() != parts[me].data_ptr():
                total.copy_(parts[me])
            for rank in sorted(received):
                total.add_(received[rank])
            if average:
                total.div_(group.size())
        return Done()

    return reduce_scatter


def _all_gather(original: Callable) -> Callable:
    """Each rank sends its shard to the others, who receive it in its place."""

    @functools.wraps(original)
    def all_gather(group: object, outputs: list, inputs: list, options: object) -> object:
        me, others = group.rank(), _others(group)
        for whole, mine in zip(outputs, inputs, strict=True):
            parts, mine = whole.view(group.size(), -1), mine.view(-1)
            _exchange(group, dict.fromkeys(others, mine), {rank: parts[rank] for rank in others})
            if parts[me].data_ptr() != mine.data_ptr():
                parts[me].copy_(mine)
        return Done()

    return all_gather


def redirections() -> list[Redirection]:
    """The two collectives of the distributed optimizer, in the order in which they are applied."""
    return [
        Redirection(
            f"{GROUP}.reduce_scatter_single_coalesced",
            _reduce_scatter,
            "one message from each rank to each other",
            "gloo adds up everything on every rank and keeps a part",
        ),
        Redirection(
            f"{GROUP}.all_gather_single_coalesced",
            _all_gather,
            "one message from each rank to each other",
            "gloo copies every part twice",
        ),
    ]

"""Collectives of the ranks of one machine through shared memory, with a word through a pipe for each.

gloo sends every byte through sockets, and hands each message from thread to thread; eight ranks on two cores wait
longer for those threads than for the bytes.  Here each rank of a group has memory that the others can see, its mailbox:
it puts a tensor there, writes a word of some bytes to each of the others, and they read the tensor in place.

torch has no reduce-scatter over gloo either: it copies the gradients, adds all of them up on every rank, and throws away
all but one shard; its all-gather copies every shard twice on the way.  Here each rank reads what it needs, once, from the
rank that has it.  The functions stand where torch's own stand, at the methods of a process group, so a recorder sees one
collective as ever, and none of the messages below.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import select
import struct
import weakref
from dataclasses import dataclass
from io import FileIO
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ReduceOp

from course_lib.ranks.cpu.gloo import Done
from course_lib.stack.patches import Patches

PATCHES = Patches()
SLOT_BYTES = 8 * 2**20
"""What a rank gives its group at once; larger tensors go in pieces."""

SLOTS = 2
"""They take turns: a rank that has heard the others' word of this round knows that they have read the one before."""

WORD = struct.Struct("<qq")
"""Which round it is, and how many bytes each rank gets from this one."""

TAG = 7919  # no other message of a group has it


class Exchange(Protocol):
    """A way for the ranks of a group to give each other tensors of one size, at most `SLOT_BYTES` from each.

    What a rank gets may be read until the next exchange of the group, and not written.
    """

    def share(self, tensor: Any) -> dict[int, Any]:
        """Give all others the same tensor; returns theirs by rank of the group."""

    def deal(self, tensors: dict[int, Any]) -> dict[int, Any]:
        """Give each other rank a tensor of its own; returns what each of them has for this rank."""


class Messages:
    """The tensors themselves as messages by gloo, for ranks that do not see each other's memory."""

    def __init__(self, group: Any) -> None:
        self._group = weakref.ref(group)  # whoever keeps an exchange for a group must not keep the group

    def share(self, tensor: Any) -> dict[int, Any]:
        """As in `Exchange`."""
        return self.deal(dict.fromkeys(_others(self._group()), tensor))

    def deal(self, tensors: dict[int, Any]) -> dict[int, Any]:
        """As in `Exchange`."""
        # The recorder wraps the methods of the class while it records; these are the ones below.
        send, receive = (getattr(method, "__wrapped__", method) for method in (ProcessGroup.send, ProcessGroup.recv))
        received = {rank: torch.empty_like(tensor) for rank, tensor in tensors.items()}
        works = [send(self._group(), [tensor], rank, TAG) for rank, tensor in tensors.items()]
        works += [receive(self._group(), [tensor], rank, TAG) for rank, tensor in received.items()]
        for work in works:
            work.wait()
        return received


@dataclass(frozen=True)
class Peer:
    """Another rank of the group.

    Attributes:
        name: Its global rank.
        memory: Its mailbox.
        told: The pipe that takes this rank's words to it.
        heard: The pipe that brings its words.
    """

    name: int
    memory: Any
    told: FileIO
    heard: FileIO


class Mailboxes:
    """Tensors lie in the sender's mailbox, and a word through a pipe says so.

    Memory and pipes are given back when the last reference goes: nobody but the process group's own entry holds one.

    Attributes:
        memory: This rank's own mailbox, a byte tensor of `SLOTS * SLOT_BYTES`.
        peers: The other ranks by their rank of the group.
    """

    def __init__(self, rank: int, memory: Any, peers: dict[int, Peer], *, limit_seconds: float) -> None:
        self.memory, self.peers = memory, peers
        self._rank, self._limit_seconds, self._round = rank, limit_seconds, 0
        self._cut = functools.lru_cache(maxsize=128)(_cut)  # a layer's tensors have the same places in every step
        self._news = {number: select.poll() for number in peers}  # select() knows no descriptor above 1023
        for number, peer in peers.items():
            self._news[number].register(peer.heard, select.POLLIN)

    def share(self, tensor: Any) -> dict[int, Any]:
        """As in `Exchange`; this rank's own tensor is among those returned."""
        mine = self._place(self.memory, 0, tensor)
        mine.copy_(tensor)
        places = {rank: self._place(peer.memory, 0, tensor) for rank, peer in self.peers.items()}
        self._take_turns(tensor.nbytes)
        return places | {self._rank: mine}

    def deal(self, tensors: dict[int, Any]) -> dict[int, Any]:
        """As in `Exchange`."""
        places = {}
        for rank, tensor in tensors.items():  # nobody has a place for itself
            self._place(self.memory, rank - (rank > self._rank), tensor).copy_(tensor)
            places[rank] = self._place(self.peers[rank].memory, self._rank - (self._rank > rank), tensor)
        self._take_turns(tensor.nbytes)
        return places

    def _place(self, memory: Any, number: int, like: Any) -> Any:
        begin = self._round % SLOTS * SLOT_BYTES + number * like.nbytes
        return self._cut(memory, begin, like.nbytes, like.dtype, like.shape)

    def _take_turns(self, size_bytes: int) -> None:
        """Tell all others that this rank's tensors are there, and wait until theirs are.

        Raises:
            RuntimeError: If one is gone, is silent for longer than the group allows, or is at another collective.
        """
        word = WORD.pack(self._round, size_bytes)
        for peer in self.peers.values():
            peer.told.write(word)
        for number, peer in self.peers.items():
            if not self._news[number].poll(min(self._limit_seconds * 1000, 2**31 - 1)):
                raise RuntimeError(f"connection timeout: no word from rank {peer.name} for {self._limit_seconds:g} s")
            heard = peer.heard.read(WORD.size)
            if not heard:
                raise RuntimeError(f"connection closed: rank {peer.name} is gone")
            if heard != word:
                raise RuntimeError(
                    f"ranks disagree: rank {peer.name} is at exchange {WORD.unpack(heard)[0]} of its group with "
                    f"{WORD.unpack(heard)[1]:,} bytes, this rank at exchange {self._round} with {size_bytes:,} bytes; "
                    "all ranks of a group must call the same collectives with tensors of the same size"
                )
        self._round += 1


def _cut(memory: Any, begin: int, size_bytes: int, dtype: torch.dtype, shape: torch.Size) -> Any:
    return memory[begin : begin + size_bytes].view(dtype).view(shape)


def connect(group: Any) -> Exchange:
    """Open mailboxes between the ranks of a group; all of them call this at the same point of their work.

    Returns:
        `Mailboxes` if every rank sees the memory of every other, and `Messages` otherwise: on several machines, in
        containers of their own, on systems without `memfd_create`.
    """
    messages, secret = Messages(group), secrets.randbits(62)
    descriptor, own = _new_memory(secret)
    pipes = {rank: [FileIO(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True)] for rank in _others(group)}
    where = {rank: [os.getpid(), descriptor, secret, written.fileno()] for rank, (_, written) in pipes.items()}
    cards = messages.deal({rank: torch.tensor(card) for rank, card in where.items()})
    peers, limit = {}, group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    with contextlib.suppress(OSError):
        for rank, card in cards.items():
            pid, box, their_secret, pipe = card.tolist()
            memory = _visit(f"/proc/{pid}/fd/{box}", their_secret)
            words = FileIO(f"/proc/{pid}/fd/{pipe}", "w")
            peers[rank] = Peer(dist.get_global_rank(group, rank), memory, words, pipes[rank][0])
    complete = torch.tensor(own is not None and len(peers) == len(pipes))
    agreed = all(bool(answer) for answer in [complete, *messages.share(complete).values()])
    for _, written in pipes.values():
        written.close()  # a pipe ends with its last writer, so only the peer keeps this end open
    if descriptor >= 0:
        os.close(descriptor)
    return Mailboxes(group.rank(), own, peers, limit_seconds=limit) if agreed else messages


def _new_memory(secret: int) -> tuple[int, Any]:
    """A descriptor of new memory and the memory, with a secret at its beginning; `-1` and `None` if there is none."""
    if not hasattr(os, "memfd_create"):
        return -1, None
    descriptor = os.memfd_create("mailbox")
    os.ftruncate(descriptor, SLOTS * SLOT_BYTES)
    memory = _map(descriptor)
    memory[:8].view(torch.int64).fill_(secret)
    return descriptor, memory


def _visit(path: str, secret: int) -> Any:
    """Another rank's mailbox.

    Raises:
        OSError: If it cannot be seen from here, or is something else.
    """
    with FileIO(path, "r+") as file:
        if os.fstat(file.fileno()).st_size != SLOTS * SLOT_BYTES:
            raise OSError(f"{path} is no mailbox")
        box = _map(file.fileno())
    if int(box[:8].view(torch.int64)) != secret:
        raise OSError(f"{path} is the mailbox of a stranger")
    return box


def _map(descriptor: int) -> Any:
    """The memory of a descriptor, which may be closed afterwards; Python's own `mmap` would keep a copy of it open."""
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=SLOTS * SLOT_BYTES, dtype=torch.uint8)


def _others(group: Any) -> list[int]:
    """The other ranks of a group, the next one first, so that not all ranks talk to the same one."""
    me, size = group.rank(), group.size()
    return [(me + step) % size for step in range(1, size)]


# --------------------------------------------------------------------------- collectives of the distributed optimizer and of TP

MOST_RANKS = 8
"""An all-reduce over more goes by gloo: everyone telling everyone would be too many messages."""
REDUCTIONS = {ReduceOp.SUM: torch.add, ReduceOp.MAX: torch.maximum}
_open: weakref.WeakKeyDictionary[Any, Exchange] = weakref.WeakKeyDictionary()


def _exchange(group: Any) -> Exchange:
    """The exchange of a group, whose ranks are connected when they first need it."""
    if group not in _open:
        _open[group] = connect(group)
    return _open[group]


def _pieces(flat: Any, at_once: int) -> tuple[Any, ...]:
    """What goes at once, in order; most tensors fit, and torch's `split` takes longer than a word through a pipe."""
    return (flat,) if flat.numel() <= at_once else flat.split(at_once)


def method_of_group(*names: str) -> str:
    """The first of these methods that the installed torch has: 2.13 renamed some, and kept the old names beside."""
    known = (name for name in names if hasattr(torch.distributed.ProcessGroup, name))
    return f"torch.distributed.ProcessGroup.{next(known, names[0])}"


@PATCHES.replaces(
    method_of_group("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
    why="gloo adds up everything on every rank, keeps a part",
)
def reduce_scatter_each(original, group, outputs, inputs, /, *options):
    """Each rank gets the others' values of its own shard, and adds them to its own; an average too."""
    operation = options[0].reduceOp.op if options else ReduceOp.SUM  # the object around it is in no tuple of members
    if operation not in (ReduceOp.SUM, ReduceOp.AVG):
        return original(group, outputs, inputs, *options)
    me, size = group.rank(), group.size()
    for output, whole in zip(outputs, inputs, strict=True):
        total, shards = output.detach().view(-1), whole.detach().view(size, -1)
        if total.data_ptr() != shards[me].data_ptr():
            total.copy_(shards[me])
        if size > 1:
            at_once = SLOT_BYTES // (size - 1) // whole.element_size()
            pieces = [_pieces(shard, at_once) for shard in shards]
            for number, sums in enumerate(_pieces(total, at_once)):
                dealt = {rank: pieces[rank][number] for rank in range(size) if rank != me}
                for _, received in sorted(_exchange(group).deal(dealt).items()):
                    sums.add_(received)
        if operation == ReduceOp.AVG:
            total.div_(size)
    return Done(outputs)


@PATCHES.replaces(
    method_of_group("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
    why="gloo copies every part twice",
)
def all_gather_each(_, group, outputs, inputs, /, *__):
    """Each rank shows its shard to the others, who put a copy in its place."""
    me, size = group.rank(), group.size()
    for whole, mine in zip(outputs, inputs, strict=True):
        shards, mine = whole.detach().view(size, -1), mine.detach().view(-1)
        if size > 1:
            at_once = SLOT_BYTES // whole.element_size()
            pieces = [_pieces(shard, at_once) for shard in shards]
            for number, shown in enumerate(_pieces(mine, at_once)):
                for rank, received in _exchange(group).share(shown).items():
                    if rank != me:
                        pieces[rank][number].copy_(received)
        if shards[me].data_ptr() != mine.data_ptr():
            shards[me].copy_(mine)
    return Done(outputs)


@PATCHES.replaces(method_of_group("reduce_scatter_single", "_reduce_scatter_base"), why="the same, of one tensor")
def reduce_scatter(original, group, output, whole, /, *options):
    """As `reduce_scatter_each`: sequence parallelism's, in every layer."""

    def elsewhere(group, outputs, inputs, *options):
        return original(group, outputs[0], inputs[0], *options)

    return reduce_scatter_each(elsewhere, group, [output], [whole], *options)


@PATCHES.replaces(method_of_group("all_gather_single", "_allgather_base"), why="the same, of one tensor")
def all_gather(_, group, output, mine, /, *options):
    """As `all_gather_each`: sequence parallelism's, in every layer."""
    return all_gather_each(None, group, [output], [mine], *options)


@PATCHES.replaces("torch.distributed.ProcessGroup.allreduce", why="gloo sends it through sockets")
def allreduce(original, group, tensors, options=None, /, *more, **named):
    """Each rank shows its tensor to the others, and everyone adds all of them up in the same order; a maximum too."""
    suits = (
        options is not None
        and not (more or named)
        and isinstance(options, dist.AllreduceOptions)
        and options.reduceOp.op in REDUCTIONS
        and len(tensors) == 1
        and tensors[0].is_contiguous()
        and 1 < group.size() <= MOST_RANKS
    )
    boxes = _exchange(group) if suits else None
    if not isinstance(boxes, Mailboxes):
        return original(group, tensors, options, *more, **named)
    combine = REDUCTIONS[options.reduceOp.op]
    for out in _pieces(tensors[0].detach().view(-1), SLOT_BYTES // tensors[0].element_size()):
        first, second, *rest = (shown for _, shown in sorted(boxes.share(out).items()))
        combine(first, second, out=out)
        for shown in rest:
            combine(out, shown, out=out)
    return Done(tensors)


@PATCHES.replaces(
    "megatron.core.parallel_state.destroy_model_parallel",
    why="upstream only forgets them: each keeps a socket, a pipe and memory for every rank",
)
def destroy_model_parallel(original):
    """Destroys the process groups that Megatron made, and with them sockets and mailboxes."""
    from megatron.core import parallel_state

    made = parallel_state._global_process_group_list or []
    original()
    for group in made:
        if dist.is_initialized() and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)

"""Ranks that give each other tensors through memory: what arrives, and what is said when something else happens."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

LARGE = 5_000_001
"""Numbers of fp32 that need three rounds of a mailbox, the last one short."""


def started() -> tuple[Any, Any, list]:
    """Start gloo in this rank, whose collectives are redirected already; returns torch's module, the group of all
    ranks, and a list that gets each exchange as it is opened."""
    import torch.distributed as dist

    from course_lib.ranks.cpu import mailbox

    opened, connect = [], mailbox.connect

    def noted(group):
        opened.append(connect(group))
        return opened[-1]

    mailbox.connect = noted
    dist.init_process_group("gloo")
    return dist, dist.group.WORLD, opened


def reduced(dist, tensor, op=None, group=None):
    """The tensor after an all-reduce."""
    dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM, group=group)
    return tensor


def check_sums(dist, rank: int, size: int) -> None:
    """All-reduces of this rank's numbers against sums that need no message."""
    import torch

    first = torch.arange(float(LARGE)) % 1000
    assert torch.equal(reduced(dist, first + rank), first * size + sum(range(size)))
    assert reduced(dist, torch.tensor(2**40 + rank)).item() == size * 2**40 + sum(range(size))
    assert reduced(dist, torch.tensor([rank, -rank]), dist.ReduceOp.MAX).tolist() == [size - 1, 0]
    assert reduced(dist, torch.tensor([rank + 1.0]), dist.ReduceOp.PRODUCT).item() == 24.0
    across = torch.full((4, 2), 2.0**rank).t()  # does not lie in one piece, so gloo sums it
    assert not across.is_contiguous()
    assert torch.equal(reduced(dist, across), torch.full((2, 4), 15.0))
    work = dist.all_reduce(later := torch.ones(3), async_op=True)
    work.wait()
    assert later.tolist() == [size] * 3
    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    assert future.wait()[0].tolist() == [size] * 3


def check_shards(dist, rank: int, size: int) -> None:
    """Reduce-scatter and all-gather, of one tensor and of several, against sums that need no message."""
    import torch
    from torch.distributed.distributed_c10d import _coalescing_manager

    for numbers in (3, LARGE // 3):
        base = torch.arange(float(numbers * size)) % 1000
        whole, total = base + rank, base.view(size, -1)[rank] * size + sum(range(size))
        mine = torch.empty(numbers)
        for op, share in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, size)):
            dist.reduce_scatter_tensor(mine, whole, op=op)
            assert torch.allclose(mine, total / share, rtol=1e-6), op
            assert torch.equal(whole, base + rank), "what was given is as before"
        with _coalescing_manager():
            dist.reduce_scatter_tensor(mine.zero_(), whole)
        assert torch.equal(mine, total)
        for together in (False, True):
            gathered = torch.empty(size * numbers)
            with _coalescing_manager() if together else contextlib.nullcontext():
                dist.all_gather_into_tensor(gathered, torch.full((numbers,), float(rank)))
            assert torch.equal(gathered, torch.arange(float(size)).repeat_interleave(numbers))
    block = torch.empty(size * 2, 3, dtype=torch.int64)
    work = dist.all_gather_into_tensor(block, torch.full((2, 3), rank), async_op=True)
    assert work.wait() and torch.equal(block, torch.arange(size).repeat_interleave(2)[:, None].expand(-1, 3))


def rank_shards(_: str) -> None:
    """Each of them was one exchange through memory, or as many as its size needs."""
    from course_lib.ranks.cpu import mailbox

    dist, group, opened = started()
    check_shards(dist, group.rank(), group.size())
    (boxes,) = opened
    assert isinstance(boxes, mailbox.Mailboxes)
    at_once = mailbox.SLOT_BYTES // 4
    dealt, shown = (-(-LARGE // 3 // size) for size in (at_once // (group.size() - 1), at_once))
    assert boxes._round == 3 * (1 + dealt) + 2 * (1 + shown) + 1
    dist.destroy_process_group()


def test_shards_through_memory_are_exact(in_ranks, tmp_path: Path):
    """None of the collectives of sequence parallelism and of the distributed optimizer is left to gloo."""
    in_ranks(rank_shards, tmp_path, ranks=4)


def rank_sums(_: str) -> None:
    """Every kind of all-reduce, and the exchange was through memory."""
    from course_lib.ranks.cpu import mailbox

    dist, group, opened = started()
    check_sums(dist, group.rank(), group.size())
    assert [type(each) for each in opened] == [mailbox.Mailboxes]
    dist.destroy_process_group()


def test_sums_through_memory_are_exact(in_ranks, tmp_path: Path):
    """Small, large and whole numbers, maxima, and what a mailbox does not do; all ranks open mailboxes once."""
    in_ranks(rank_sums, tmp_path, ranks=4)


def rank_apart(_: str) -> None:
    """Two ranks make a group, while the two others make theirs, of the same name; then all make a mesh."""
    import datetime

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    me = dist.get_rank()
    group = dist.new_group([me // 2 * 2, me // 2 * 2 + 1], backend="nccl")
    total = torch.tensor(float(me))
    dist.all_reduce(total, group=group)
    assert total == (1.0 if me < 2 else 5.0)
    mesh = dist.init_device_mesh("cuda", (2, 2))  # layers that are sharded over devices ask for one
    across = torch.tensor(float(me))
    dist.all_reduce(across, group=mesh.get_group(0))
    assert mesh.device_type == "cpu" and across == (2.0 if me % 2 == 0 else 4.0)
    dist.barrier()
    dist.destroy_process_group()


def test_groups_of_different_ranks_may_have_one_name(in_ranks, tmp_path: Path):
    """torch numbers groups in each process; NCCL lets two groups of one number live, as models of several parts have."""
    in_ranks(rank_apart, tmp_path, ranks=4)


def rank_alone(_: str) -> None:
    """One of four ranks has no memory to show: all of them use messages, with the same results."""
    from course_lib.ranks.cpu import mailbox

    if os.environ["RANK"] == "2":
        mailbox._new_memory = lambda secret: (-1, None)
    dist, group, opened = started()
    dist.barrier()
    before = len(os.listdir("/proc/self/fd"))
    check_sums(dist, group.rank(), group.size())
    check_shards(dist, group.rank(), group.size())
    assert [type(each) for each in opened] == [mailbox.Messages]
    left = len(os.listdir("/proc/self/fd"))
    assert left <= before, f"{left} descriptors are open, {before} were; what connected the group may close meanwhile"
    dist.destroy_process_group()


def test_without_shared_memory_they_send_messages(in_ranks, tmp_path: Path):
    """Not one rank goes another way than the others, and nothing stays open."""
    in_ranks(rank_alone, tmp_path, ranks=4)


def rank_quarrels(_: str) -> None:
    """Two ranks that disagree, a rank that is silent, and one that is gone; each message names the rank."""
    import torch

    from course_lib.ranks.cpu import mailbox
    from course_lib.runs import failures

    dist, _, _ = started()
    me = dist.get_rank()
    other = 1 - me

    with pytest.raises(
        RuntimeError, match=rf"rank {other} is at exchange 0 .* {4 * (5 - me)} bytes.* {4 * (4 + me)} b"
    ):
        dist.all_reduce(torch.ones(4 + me))

    quick = dist.new_group([0, 1], timeout=timedelta(seconds=0.5))
    boxes = mailbox.connect(quick)
    if me == 0:
        with pytest.raises(RuntimeError, match=r"no word from rank 1 for 0\.5 s") as silent:
            boxes.share(torch.ones(1))
        assert failures.lost_a_peer(str(silent.value))
    dist.barrier()

    boxes = mailbox.connect(quick)
    if me == 1:
        boxes.peers[0].told.close()  # as the kernel does for a process that ends
    else:
        with pytest.raises(RuntimeError, match="rank 1 is gone") as gone:
            boxes.share(torch.ones(1))
        assert failures.lost_a_peer(str(gone.value))
    dist.barrier()
    dist.destroy_process_group()


def test_a_lost_or_mistaken_rank_is_named(in_ranks, tmp_path: Path):
    """Nobody waits for ever, reads a tensor of another size, or has to guess who it was."""
    in_ranks(rank_quarrels, tmp_path, ranks=2)


def rank_comes_and_goes(_: str) -> None:
    """Groups that come and go, in this process's own way and in Megatron's, by memory and by message."""
    import resource

    import torch
    from megatron.core import parallel_state

    from course_lib.ranks.cpu import mailbox

    def kept() -> tuple[int, int]:
        """Descriptors and mailboxes of this process."""
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("mailbox")

    def unseen(path: str, secret: int) -> None:
        raise OSError(path)

    dist, group, opened = started()
    dist.barrier()
    assert reduced(dist, torch.ones(2)).tolist() == [4, 4]
    before, visit = kept(), mailbox._visit
    assert before[1] == 4, "this rank's and three others'"
    for see, kind in ((visit, mailbox.Mailboxes), (unseen, mailbox.Messages)):
        mailbox._visit = see
        quick = dist.new_group()
        assert reduced(dist, torch.ones(2), group=quick).tolist() == [4, 4]
        assert type(opened.pop()) is kind
        dist.destroy_process_group(quick)
        del quick
        assert kept() == before
    mailbox._visit = visit

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rounds = []
    for _ in range(3):
        parallel_state.initialize_model_parallel(2, 2)
        for mine in (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_model_parallel_group()):
            assert reduced(dist, torch.ones(2), group=mine).tolist() == [mine.size()] * 2
        del mine
        parallel_state.destroy_model_parallel()
        opened.clear()
        rounds.append(kept())
    assert rounds == [before] * 3

    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    high = mailbox.connect(group)
    assert high.peers[(group.rank() + 1) % 4].heard.fileno() > 1023
    assert sum(int(shown) for shown in high.share(torch.tensor(group.rank())).values()) == 6
    for descriptor in many:
        os.close(descriptor)
    dist.destroy_process_group()


def test_mailboxes_end_with_their_group(in_ranks, tmp_path: Path):
    """No descriptor and no memory is left of a group that was destroyed; and a descriptor's number does not matter."""
    in_ranks(rank_comes_and_goes, tmp_path, ranks=4)


def test_a_stranger_is_no_mailbox(tmp_path: Path):
    """Another machine's process id may exist here too: its file has another size, or another secret."""
    from course_lib.ranks.cpu import mailbox

    descriptor, memory = mailbox._new_memory(42)
    path = f"/proc/self/fd/{descriptor}"
    memory[100] = 7
    assert mailbox._visit(path, 42)[100] == 7
    small = tmp_path / "small"
    small.write_bytes(b"\x2a" + bytes(7))
    for other, secret in ((path, 43), (str(small), 42), ("/proc/self/fd/9999", 42)):
        with pytest.raises(OSError, match=r"stranger|no mailbox|No such file"):
            mailbox._visit(other, secret)
    os.close(descriptor)

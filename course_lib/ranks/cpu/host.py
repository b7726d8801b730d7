"""How ranks share a machine: its cores, and an end with whoever started them."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import wait

from course_lib import stack


def core_of(rank: int, ranks: int, cores: list[int]) -> int | None:
    """The core on which a rank of this machine stays, or `None` if it may run on any of those that this process may use.

    Neighbouring ranks get the same core: they are the tensor parallel group, which talks most, and two processes on one
    core hand over without waking the other.  Ranks stay where they are only if every core gets equally many.  One rank for
    each core stays too: Linux likes to put the two ends of a connection on one core, and a pipeline then takes turns.

    Example:
        >>> [core_of(rank, 8, [0, 1]) for rank in range(8)]
        [0, 0, 0, 0, 1, 1, 1, 1]
        >>> [core_of(rank, 2, [0, 1]) for rank in range(2)]
        [0, 1]
        >>> core_of(0, 8, [0, 1, 2]) is None and core_of(0, 8, list(range(16))) is None
        True
    """
    if ranks < len(cores) or ranks % len(cores):
        return None
    return cores[rank * len(cores) // ranks]


def share(rank: int, ranks: int) -> None:
    """Make this process one of a batch: a rank that is woken waits until the running one has to wait itself.

    Linux prefers a process that was just woken, so eight ranks on two cores interrupt each other at every message.
    As batch processes, each on its core, they do not: an 8-rank step takes two thirds of the time.
    """
    with contextlib.suppress(OSError, AttributeError):  # a sandbox may forbid it; other systems have neither
        core = core_of(rank, ranks, sorted(os.sched_getaffinity(0)))
        if core is not None:
            os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def imported_once() -> Iterator[None]:
    """What a fork server imports in the block is there for every fork; an error there is met again by each rank.

    What stands at the end is frozen, so that the ranks' collectors neither walk nor copy it.
    """
    try:
        with stack.imported_to_stay():
            yield
            gc.collect()
    except Exception:
        traceback.print_exc()  # the fork server swallows an ImportError; this line says it early


def end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that happened."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()

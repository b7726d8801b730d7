"""Checkpoints that are written while the training goes on: the process that writes is a fork of its rank, and ends with it.

Upstream spawns that process, and another that keeps the queue through which it answers.  A spawned process imports the
main module anew, which takes eight ranks a minute, and knows no patch.

Source: megatron-core dist_checkpointing/strategies/async_utils.py and filesystem_async.py @ 0.19.2
"""

from __future__ import annotations

import functools
import threading

import torch

from course_lib.ranks.cpu import host
from course_lib.stack.patches import Patches

PATCHES = Patches()
STRATEGIES = "megatron.core.dist_checkpointing.strategies"
WORKER = f"{STRATEGIES}.async_utils.PersistentAsyncCaller"


@PATCHES.makes(
    f"{STRATEGIES}.filesystem_async.get_write_results_queue",
    why="upstream spawns a process for it, which re-imports the main module (65 s, then EOFError)",
)
def get_write_results_queue(original):
    """A queue that a thread of the rank keeps, for the rank and its forks."""

    @functools.cache
    def queue():
        from multiprocessing.managers import SyncManager

        server = SyncManager(("localhost", 0)).get_server()
        threading.Thread(target=server.serve_forever, daemon=True, name="write-results").start()
        manager = SyncManager(server.address)
        manager.connect()
        return manager.Queue()

    return functools.wraps(original)(lambda mp_mode=None: queue())


@PATCHES.replaces(f"{WORKER}._get_process", why="a spawned process knows no patch")
def get_process(original, cls, rank, mp_mode=None, cpu_priority=10, io_priority=None):
    """A fork of the rank."""
    return original(cls, rank, "fork", cpu_priority, io_priority)


@PATCHES.replaces(f"{WORKER}.async_loop", why="it waits for its rank, which may be gone without a word")
def async_loop(original, *args, **kwargs):
    """Ends with its rank."""
    host.end_with_parent()
    torch.set_num_threads(1)  # the threads of the rank are not in its fork
    original(*args, **kwargs)


@PATCHES.replaces(
    f"{STRATEGIES}.filesystem_async.FileSystemWriterAsync.preload_tensors",
    why="what reaches another process through a queue is shared, and the rank's next step would write into it",
)
def preload_tensors(original, write_buckets, non_blocking=True):
    """Copies what is shared."""
    return [
        (file, key, (others, [(item, tensor.clone() if tensor.is_shared() else tensor) for item, tensor in tensors]))
        for file, key, (others, tensors) in original(write_buckets, non_blocking)
    ]

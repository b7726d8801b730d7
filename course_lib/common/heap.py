"""The memory that a process keeps for its next tensors."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h
LARGEST = 2**30


def keep_memory() -> None:
    """Let this process's heap give nothing back before it ends, as torch's allocator keeps memory on a GPU.

    By default large tensors are mapped when they are made and unmapped when they go, and the kernel must clear every
    page of the next one: in a small model that costs as much as its matrix products.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it; other C libraries keep their ways
    if change is not None:
        change(M_MMAP_THRESHOLD, LARGEST)
        change(M_TRIM_THRESHOLD, 2 * LARGEST - 1)

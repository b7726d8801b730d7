"""Memory that a step frees is kept for the next one, as torch's allocator keeps it on a GPU, and in large pages."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h
LARGEST = 2**30


def keep() -> None:
    """Let this process's heap give nothing back before it ends, and torch ask for large pages.

    By default large tensors are mapped when they are made and unmapped when they go, and the kernel must clear every
    page of the next one: in a small model that costs as much as its matrix products.  A tensor from 2 MiB on gets pages
    of 2 MiB, if the kernel has them (`madvise` or `always` in /sys/kernel/mm/transparent_hugepage/enabled): logits of 64
    MiB are some thirty pages then, and not sixteen thousand to be looked up.

    Torch reads its setting at the first tensor, so call this before torch is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    change = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it; other C libraries keep their ways
    if change is not None:
        change(M_MMAP_THRESHOLD, LARGEST)
        change(M_TRIM_THRESHOLD, 2 * LARGEST - 1)

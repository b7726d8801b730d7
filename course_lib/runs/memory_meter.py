"""How much memory a rank uses now, and used at most since the last step began.

On a GPU torch's allocator knows.  On a CPU the kernel does: a rank's anonymous memory since it began, read from
`/proc/self/status` in a third of a millisecond.  Memory that a forked rank shares with the other ranks (the imported
libraries) is not counted.
"""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Reads the memory of this process."""

    def begin_step(self) -> None:
        """Forget the peak so far."""

    def read(self) -> tuple[int, int]:
        """Memory now, and its peak since `begin_step()`, in bytes."""


def meter(device: str) -> Meter:
    """The meter for `"cpu"` or `"cuda"`; what the process holds at this moment counts as nothing on a CPU."""
    return _GpuMeter() if device == "cuda" else _CpuMeter()


class _GpuMeter:
    def begin_step(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int, int]:
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


class _CpuMeter:
    def __init__(self) -> None:
        self._at_start = _status()["RssAnon"]

    def begin_step(self) -> None:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM, the peak of resident memory, to its present value
        except OSError:
            pass  # a hardened kernel: the peak is then that of the whole run so far

    def read(self) -> tuple[int, int]:
        now = _status()
        memory = max(0, now["RssAnon"] - self._at_start)
        return memory, memory + max(0, now["VmHWM"] - now["VmRSS"])


def _status() -> dict[str, int]:
    wanted = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS", "RssAnon"):
                wanted[name] = int(value.split()[0]) * 1024
    return wanted

"""CUDA streams and events on a CPU, where every call has happened when it returns."""

from __future__ import annotations

import time

__all__ = ["CURRENT", "Device", "Event", "ExternalStream", "Range", "Stream"]


class Stream:
    """A CUDA stream where everything has already happened."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def device(self) -> object:
        """The CPU, where its work is done."""
        import torch

        return torch.device("cpu")

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event that is recorded now."""
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        """True: all work is done."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The one priority there is."""
        return (0, 0)


class ExternalStream(Stream):
    """A stream made elsewhere; here the same as any other."""


CURRENT = Stream()
"""The one stream that `current_stream()` and `default_stream()` return."""


class Event:
    """A CUDA event that measures wall-clock time."""

    def __init__(self, *_: object, **__: object) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """True: the event has happened."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3


class Device:
    """`with torch.cuda.device(...)`: there is one device, so nothing to switch."""

    def __init__(self, device: object = None) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class Range(Device):
    """`with torch.cuda.nvtx.range(...)`: no profiler of NVIDIA's listens."""

    def __init__(self, message: str = "", *_: object, **__: object) -> None:
        self.idx = 0

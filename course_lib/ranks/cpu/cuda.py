"""CUDA-shaped calls of torch land on the CPU: `torch.cuda`, the functions that take a device, and the tensors' methods.

Targeted wrapping of the functions that take a device costs nothing measurable; a `TorchFunctionMode` that rewrites
devices would be shorter and costs 15-20 % of a training step.

Two things stay as they are, because code decides by them how to treat real memory: `Tensor.is_cuda` is false, and
`Tensor.device` is `cpu`.
"""

from __future__ import annotations

import collections
import functools
import os
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from course_lib.ranks.cpu import rng
from course_lib.stack.patches import Patches

PATCHES = Patches()
ASKS = "asked about the GPU all over Megatron and Bridge"
ONE = "each rank owns one device, whose calls are synchronous"
ALLOCATOR = "no caching allocator: `memory.jsonl` has the numbers"
PROFILER = "no profiler of NVIDIA's is attached"
THERE = "it is where it will be used"
AUTOCAST = "autocast for the rank's device"
NO_EFFECT = "no effect"

# ------------------------------------------------------------------------------------------------------- torch.cuda itself


class Stream:
    """A stream or a context where everything has already happened."""

    cuda_stream = stream_id = device_index = idx = 0
    device = torch.device("cpu")

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class ExternalStream(Stream):
    """A stream made elsewhere; here the same as any other."""


class Device(Stream):
    """`with torch.cuda.device(...)`: there is one device, so nothing to switch."""


class Range(Stream):
    """`with torch.cuda.nvtx.range(...)`: a context without effect."""


class Event:
    """An event that measures wall-clock time."""

    def __init__(self, *_: object, **__: object) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3


def _always(value: object) -> Callable[[Any], Callable]:
    # A fresh function each time: torch._dynamo refuses to import when two torch.cuda names are one object.
    def make(original: Any) -> Callable:
        def answer(*_: object, **__: object) -> object:
            return value

        return functools.update_wrapper(answer, original, updated=())

    return make


def _answers(value: object, names: str, why: str, becomes: str = "") -> None:
    PATCHES.makes(*(f"torch.cuda.{name}" for name in names.split()), why=why, becomes=becomes or repr(value))(
        _always(value)
    )


_CURRENT = Stream()
_answers(True, "is_available is_initialized", ASKS)
_answers(True, "is_bf16_supported", "a CPU emulates bf16")
_answers(False, "is_current_stream_capturing", "there are no CUDA graphs")
_answers(1, "device_count", ONE)
_answers(0, "current_device", ONE)
_answers("CPU", "get_device_name", ASKS)
_answers((9, 0), "get_device_capability", "Megatron picks paths by capability")
_answers(0, "device_memory_used max_memory_allocated max_memory_cached max_memory_reserved", ALLOCATOR)
_answers(0, "memory_allocated memory_cached memory_reserved", ALLOCATOR)
_answers("", "memory_summary", ALLOCATOR, "an empty text")
_answers(0, "clock_rate power_draw temperature utilization", "no GPU to read a sensor of")
_answers(None, "empty_cache init ipc_collect set_device set_per_process_memory_fraction set_stream", ONE, NO_EFFECT)
_answers(None, "synchronize _lazy_init reset_accumulated_memory_stats reset_max_memory_allocated", ONE, NO_EFFECT)
_answers(None, "reset_max_memory_cached reset_peak_memory_stats", ALLOCATOR, NO_EFFECT)
_answers(None, "nvtx.range_push nvtx.range_pop nvtx.mark", PROFILER, NO_EFFECT)
_answers(_CURRENT, "current_stream default_stream stream", ONE, "a stream where all is done")
for _kind in (Stream, ExternalStream, Event):
    PATCHES.sets(_kind, f"torch.cuda.{_kind.__name__}", why=ONE, becomes=_kind.__doc__)
PATCHES.sets(Device, "torch.cuda.device", why=ONE, becomes=Device.__doc__)
PATCHES.sets(Range, "torch.cuda.nvtx.range", why=PROFILER, becomes=Range.__doc__)


@PATCHES.replaces("torch.cuda.mem_get_info", why=ASKS)
def mem_get_info(*_, **__):
    """The machine's free and total memory."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return page_bytes * os.sysconf("SC_AVPHYS_PAGES"), page_bytes * os.sysconf("SC_PHYS_PAGES")


@PATCHES.replaces("torch.cuda.get_device_properties", why=ASKS)
def get_device_properties(*_, **__):
    """The machine's memory and cores."""
    cores = os.cpu_count() or 1
    return types.SimpleNamespace(
        name="CPU", major=9, minor=0, total_memory=mem_get_info()[1], multi_processor_count=cores
    )


@PATCHES.replaces("torch.cuda.memory_stats", why=ALLOCATOR)
def memory_stats(*_, **__):
    """Nothing counted; an object of its own for each caller, who may change it."""
    return collections.Counter()


@PATCHES.replaces("torch.cuda.memory_snapshot", why=ALLOCATOR)
def memory_snapshot(*_, **__):
    """An empty list, one for each caller."""
    return []


# ---------------------------------------------------------------------------------------- functions that are given a device


def is_cuda(device: object) -> bool:
    """True for whatever names a CUDA device: "cuda", "cuda:0", 0, `torch.device("cuda")`.

    Example:
        >>> [is_cuda(device) for device in ("cuda:3", 0, "cpu", "meta", None, True)]
        [True, True, False, False, False, False]
    """
    if isinstance(device, str):
        return device.startswith("cuda")
    return getattr(device, "type", None) == "cuda" or (isinstance(device, int) and not isinstance(device, bool))


# Torch's own set of the functions that make tensors and take a device; made anew, since torch keeps its first answer
# and transformers replaces `linspace` while it makes a model.
_constructors = _device_constructors.__wrapped__()
PATCHES.makes(
    "torch.utils._device._device_constructors",
    why="`with torch.device(...)` knows the functions in it; asked later, it would name the wrappers",
    becomes="as before",
)(_always(_constructors))

_FACTORIES = {
    f"torch.{prefix}{name}"
    for prefix, home in (("", torch), ("fft.", torch.fft), ("nested.", torch.nested))
    for name, thing in vars(home).items()
    if callable(thing) and (thing in _constructors or name.endswith("_like")) and name not in rng.DRAWS
}


@PATCHES.makes(*sorted(_FACTORIES), why="tensors are made on the rank's device")
@PATCHES.makes(*(f"torch.Tensor.{n}" for n in dir(torch.Tensor) if n.startswith("new_")), why="as the factories")
def creates_on_cpu(original):
    """Creates on the CPU when asked for CUDA."""

    @functools.wraps(original)
    def factory(*args, **kwargs):
        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _with_device_at(place: int, *names: str) -> Callable[[Callable], Callable]:
    """For functions whose argument at a place, or under one of these names, is a device."""

    def make(original: Callable) -> Callable:
        @functools.wraps(original)
        def call(*args, **kwargs):
            if len(args) > place and is_cuda(args[place]):
                args = (*args[:place], "cpu", *args[place + 1 :])
            for name in names:
                if name in kwargs and is_cuda(kwargs[name]):
                    kwargs[name] = "cpu"
            return original(*args, **kwargs)

        return call

    return make


for _target, _place, _name, _why in (
    ("torch.utils._device.DeviceContext.__init__", 1, "device", "`with torch.device(...)`"),
    ("torch.nn.Module.to", 1, "device", "moves to the rank's device"),
    ("torch.load", 1, "map_location", "checkpoints are read to the device"),
    ("torch.set_default_device", 0, "device", "as factories"),
    ("torch.distributed.device_mesh.DeviceMesh.__init__", 1, "device_type", "sharded layers ask for one"),
    ("torch.autocast.__init__", 1, "device_type", AUTOCAST),
):
    PATCHES.makes(_target, why=_why, becomes="a CUDA device means the CPU")(_with_device_at(_place, _name))


@PATCHES.makes("torch.is_autocast_enabled", "torch.get_autocast_dtype", why=AUTOCAST)
def asks_the_cpu(original):
    """Asks about the CPU, for which autocast is on where a GPU rank has it on for CUDA."""

    @functools.wraps(original)
    def question(device_type="cuda"):
        return original("cpu" if is_cuda(device_type) else device_type)

    return question


@PATCHES.replaces("torch.get_autocast_gpu_dtype", why=AUTOCAST)
def get_autocast_gpu_dtype(_):
    """Asks about the CPU."""
    return torch._C.get_autocast_dtype("cpu")


@PATCHES.makes("torch.Generator", why="samplers ask for one")
def generator(original):
    """A CUDA device means the CPU."""

    class Meta(type(original)):
        def __call__(cls, device="cpu"):
            return original("cpu" if is_cuda(device) else device)

        def __instancecheck__(cls, instance):
            return isinstance(instance, original)

    # a subclass, because Megatron asks the class which methods it has
    return Meta("Generator", (original,), {"__doc__": original.__doc__, "__module__": "torch"})


# ---------------------------------------------------------------------------------------------- tensors that say they are CUDA


@PATCHES.makes(*(f"torch.cuda.{n}" for n in dir(torch.cuda) if n.endswith("Tensor")), why="asked with isinstance()")
def tensor_type(original):
    """`torch.FloatTensor` and its kind: old-style constructors, and names that isinstance() is asked about."""
    on_cpu = getattr(torch, original.__name__)

    class Meta(type):
        def __call__(cls, *args, **kwargs):
            return on_cpu(*args, **kwargs)

        def __instancecheck__(cls, instance):
            return isinstance(instance, on_cpu)

    return Meta(on_cpu.__name__, (), {"__module__": "torch.cuda", "__on_cpu__": on_cpu})


@PATCHES.makes("torch.Tensor.type", why="optimizers group parameters by this name, and take CUDA's only")
def says_cuda(original):
    """torch.cuda.*Tensor."""

    @functools.wraps(original)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return original(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, getattr(dtype, "__on_cpu__", dtype), *args, **kwargs)

    return type_


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy if elements share memory: a GPU's copy has a place for each, which may be written."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.contiguous() if shared else tensor


@PATCHES.makes("torch.Tensor.to", why="moves to the rank's device")
def to(original):
    """What would move to a GPU stays, with memory of its own."""
    to_cpu = _with_device_at(1, "device")(original)

    @functools.wraps(original)
    def to(self, *args, **kwargs):
        moves = is_cuda(args[0] if args else kwargs.get("device"))
        return _own_memory(to_cpu(self, *args, **kwargs)) if moves else original(self, *args, **kwargs)

    return to


@PATCHES.makes("torch.Tensor.cpu", why="snapshots of a GPU's tensors must not change with them")
def _copied(original: Callable) -> Callable:
    """A copy: what leaves a GPU keeps its values, whatever happens to the tensor that it came from."""

    @functools.wraps(original)
    def cpu(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        moved = original(self, *args, **kwargs)
        return moved.clone() if moved is self else moved

    return cpu


@PATCHES.makes("torch.Tensor.cuda", why=THERE)
def cuda(original):
    """The tensor itself, with memory of its own."""
    return functools.wraps(original)(lambda self, *_, **__: _own_memory(self))


@PATCHES.makes("torch.nn.Module.cuda", why=THERE)
@PATCHES.makes("torch.Tensor.pin_memory", why="pinning needs a CUDA driver")
def itself(original):
    """The tensor or module itself."""
    return functools.wraps(original)(lambda self, *_, **__: self)


for _target, _why in (
    ("torch.Tensor.record_stream", "memory is not shared between streams"),
    ("torch.optim.Optimizer._accelerator_graph_capture_health_check", "asks for a stream"),
):
    PATCHES.makes(_target, why=_why, becomes=NO_EFFECT)(_always(None))

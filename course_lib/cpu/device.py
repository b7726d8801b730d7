"""Redirections of torch: CUDA-shaped calls land on the CPU.

Targeted wrapping of the functions that take a device costs nothing measurable; a `TorchFunctionMode` that rewrites
devices would be shorter and costs 15-20 % of a training step.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable

from course_lib.cpu.redirection import Redirection

__all__ = ["Event", "Stream", "redirections"]

FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace normal ones ones_like "
    "rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros "
    "zeros_like"
).split()
NEW_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()
NO_EFFECT = (
    "empty_cache init ipc_collect reset_accumulated_memory_stats reset_max_memory_allocated reset_max_memory_cached "
    "reset_peak_memory_stats set_device set_per_process_memory_fraction set_stream synchronize _lazy_init"
).split()
MEMORY = "max_memory_allocated max_memory_cached max_memory_reserved memory_allocated memory_cached memory_reserved".split()


class Stream:
    """A CUDA stream where everything has already happened."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

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


def is_cuda(device: object) -> bool:
    """True for whatever names a CUDA device: "cuda", "cuda:0", 0, `torch.device("cuda")`."""
    if device is None or isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return getattr(device, "type", None) == "cuda"


def _answer(value: object) -> Callable[[object], object]:
    # A fresh function each time: torch._dynamo refuses to import when two torch.cuda names are one object.
    def replace(original: object) -> object:
        def answer(*_: object, **__: object) -> object:
            return value

        return functools.update_wrapper(answer, original, updated=()) if callable(original) else answer

    return replace


def _on_cpu(original: Callable) -> Callable:
    """Wrap a tensor factory so that a CUDA device argument means the CPU."""

    @functools.wraps(original)
    def factory(*args: object, **kwargs: object) -> object:
        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _to_on_cpu(original: Callable) -> Callable:
    """Wrap `Tensor.to` and `Module.to`, where the device may also be the first positional argument."""

    @functools.wraps(original)
    def to(self: object, *args: object, **kwargs: object) -> object:
        if args and is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return to


def _type_says_cuda(original: Callable) -> Callable:
    """Wrap `Tensor.type`: optimizers accept only what calls itself `torch.cuda.FloatTensor`."""

    @functools.wraps(original)
    def type_(self: object, dtype: object = None, *args: object, **kwargs: object) -> object:
        if dtype is None:
            return original(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    return type_


def _generator_on_cpu(original: type) -> type:
    class GeneratorMeta(type):
        def __call__(cls, device: object = "cpu") -> object:
            return original("cpu" if is_cuda(device) else device)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    return GeneratorMeta("Generator", (), {"__doc__": original.__doc__, "__module__": "torch"})


def _default_device_on_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def set_default_device(device: object) -> None:
        original("cpu" if is_cuda(device) else device)

    return set_default_device


def _load_on_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def load(f: object, map_location: object = None, **kwargs: object) -> object:
        return original(f, map_location="cpu" if is_cuda(map_location) else map_location, **kwargs)

    return load


def _autocast_on_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: object, device_type: str, *args: object, **kwargs: object) -> None:
        original(self, "cpu" if is_cuda(device_type) else device_type, *args, **kwargs)

    return init


def redirections() -> list[Redirection]:
    """Every redirection of torch that a CPU rank needs, in the order in which they are applied."""
    import torch

    def rng_get(_: object) -> Callable:
        def get_rng_state(device: object = "cuda") -> object:
            return torch.get_rng_state()

        return get_rng_state

    def rng_set(_: object) -> Callable:
        def set_rng_state(new_state: object, device: object = "cuda") -> None:
            torch.set_rng_state(new_state)

        return set_rng_state

    def seed_stream(_: object) -> Callable:
        def manual_seed(seed: int) -> None:
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it calls torch.cuda.manual_seed_all

        return manual_seed

    def properties(_: object) -> Callable:
        def get_device_properties(device: object = None) -> types.SimpleNamespace:
            import os

            memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return types.SimpleNamespace(
                name="CPU", major=9, minor=0, total_memory=memory_bytes, multi_processor_count=os.cpu_count() or 1
            )

        return get_device_properties

    def current_stream(_: object) -> Callable:
        def stream_now(device: object = None) -> Stream:
            return Stream()

        return stream_now

    def stream_context(_: object) -> Callable:
        def stream(stream: object) -> Stream:
            return Stream()

        return stream

    def unchanged(_: object) -> Callable:
        def cuda(self: object, *args: object, **kwargs: object) -> object:
            return self

        return cuda

    def nothing(_: object) -> Callable:
        def no_check(self: object) -> None:
            return None

        return no_check

    asks = "asked about the GPU all over Megatron and Bridge"
    rows = [
        Redirection("torch.cuda.is_available", _answer(True), "True", asks),
        Redirection("torch.cuda.is_initialized", _answer(True), "True", asks),
        Redirection("torch.cuda.device_count", _answer(1), "1", "each rank owns one device"),
        Redirection("torch.cuda.current_device", _answer(0), "0", "each rank owns one device"),
        Redirection("torch.cuda.get_device_name", _answer("CPU"), '"CPU"', asks),
        Redirection("torch.cuda.get_device_capability", _answer((9, 0)), "(9, 0)", "Megatron picks paths by capability"),
        Redirection("torch.cuda.get_device_properties", properties, "the machine's memory and cores", asks),
        Redirection("torch.cuda.is_bf16_supported", _answer(True), "True", "a CPU emulates bf16"),
        Redirection("torch.cuda.is_current_stream_capturing", _answer(False), "False", "there are no CUDA graphs"),
        Redirection("torch.cuda.memory_stats", _answer({}), "{}", "no caching allocator: `memory.jsonl` has the numbers"),
        *(Redirection(f"torch.cuda.{name}", _answer(0), "0", "no caching allocator") for name in MEMORY),
        *(Redirection(f"torch.cuda.{name}", _answer(None), "no effect", "no device to act on") for name in NO_EFFECT),
        Redirection("torch.cuda.Stream", lambda _: Stream, "a stream where all is done", "calls are synchronous"),
        Redirection("torch.cuda.Event", lambda _: Event, "wall-clock time", "calls are synchronous"),
        Redirection("torch.cuda.current_stream", current_stream, "a stream where all is done", "calls are synchronous"),
        Redirection("torch.cuda.default_stream", current_stream, "a stream where all is done", "calls are synchronous"),
        Redirection("torch.cuda.stream", stream_context, "a context without effect", "calls are synchronous"),
        Redirection("torch.cuda.get_rng_state", rng_get, "the CPU generator's state", "tensor-parallel seeds live here"),
        Redirection("torch.cuda.set_rng_state", rng_set, "sets the CPU generator", "tensor-parallel seeds live here"),
        Redirection("torch.cuda.random.get_rng_state", rng_get, "the CPU generator's state", "the same by its other name"),
        Redirection("torch.cuda.random.set_rng_state", rng_set, "sets the CPU generator", "the same by its other name"),
        Redirection("torch.cuda.manual_seed", seed_stream, "seeds the CPU generator", "tensor-parallel seeds live here"),
        Redirection("torch.cuda.manual_seed_all", _answer(None), "no effect", "torch.manual_seed calls it back"),
        Redirection("torch.cuda.nvtx.range_push", _answer(None), "no effect", "no profiler of NVIDIA's is attached"),
        Redirection("torch.cuda.nvtx.range_pop", _answer(None), "no effect", "no profiler of NVIDIA's is attached"),
        Redirection("torch.Tensor.cuda", unchanged, "the tensor itself", "it is where it will be used"),
        Redirection("torch.nn.Module.cuda", unchanged, "the module itself", "it is where it will be used"),
        Redirection("torch.Tensor.pin_memory", unchanged, "the tensor itself", "pinning needs a CUDA driver"),
        Redirection("torch.Tensor.to", _to_on_cpu, "a CUDA device means the CPU", "moves to the rank's device"),
        Redirection("torch.nn.Module.to", _to_on_cpu, "a CUDA device means the CPU", "moves to the rank's device"),
        Redirection("torch.Tensor.type", _type_says_cuda, "torch.cuda.*Tensor", "optimizers group parameters by this name"),
        Redirection("torch.Generator", _generator_on_cpu, "a CUDA device means the CPU", "samplers ask for one"),
        Redirection("torch.set_default_device", _default_device_on_cpu, "a CUDA device means the CPU", "as factories"),
        Redirection("torch.load", _load_on_cpu, "map_location cuda means the CPU", "checkpoints are read to the device"),
        Redirection("torch.autocast.__init__", _autocast_on_cpu, "autocasts CPU operations", "the rank's device"),
        Redirection(
            "torch.optim.Optimizer._accelerator_graph_capture_health_check", nothing, "no effect", "asks for a GPU stream"
        ),
    ]
    creates = "creates on the CPU when asked for CUDA"
    rows += [Redirection(f"torch.{n}", _on_cpu, creates, "tensors are made on the rank's device") for n in FACTORIES]
    rows += [Redirection(f"torch.Tensor.{n}", _on_cpu, creates, "as the factories") for n in NEW_METHODS]
    return rows

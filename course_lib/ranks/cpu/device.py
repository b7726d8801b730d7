"""Redirections of torch: CUDA-shaped calls land on the CPU.

Targeted wrapping of the functions that take a device costs nothing measurable; a `TorchFunctionMode` that rewrites
devices would be shorter and costs 15-20 % of a training step.

Two things stay as they are, because code decides by them how to treat real memory: `Tensor.is_cuda` is false, and
`Tensor.device` is `cpu`.
"""

from __future__ import annotations

import collections
import functools
import os
import types
from collections.abc import Callable

from course_lib.ranks.cpu import rng, streams
from course_lib.stack.redirection import Redirection

__all__ = ["FACTORIES", "is_cuda", "redirections"]

FACTORIES = (
    "arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted empty_quantized empty_strided "
    "eye fft.fftfreq fft.rfftfreq full full_like hamming_window hann_window kaiser_window linspace logspace "
    "nested.nested_tensor ones ones_like range scalar_tensor sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor "
    "sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor tensor tril_indices triu_indices zeros zeros_like"
).split()
"""What makes tensors and takes a device, random factories aside: those are in `rng`."""
NEW_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()
NO_EFFECT = (
    "empty_cache init ipc_collect reset_accumulated_memory_stats reset_max_memory_allocated reset_max_memory_cached "
    "reset_peak_memory_stats set_device set_per_process_memory_fraction set_stream synchronize _lazy_init"
).split()
MEMORY = (
    "device_memory_used max_memory_allocated max_memory_cached max_memory_reserved memory_allocated memory_cached "
    "memory_reserved"
).split()
SENSORS = "clock_rate power_draw temperature utilization".split()
TENSOR_TYPES = "BFloat16 Bool Byte Char Double Float Half Int Long Short".split()


def is_cuda(device: object) -> bool:
    """True for whatever names a CUDA device: "cuda", "cuda:0", 0, `torch.device("cuda")`.

    Example:
        >>> [is_cuda(device) for device in ("cuda:3", 0, "cpu", "meta", None)]
        [True, True, False, False, False]
    """
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


def _new(make: Callable[[], object]) -> Callable[[object], object]:
    """A function that answers with a new object each time, so that callers may change what they get."""

    def replace(original: Callable) -> Callable:
        @functools.wraps(original)
        def answer(*_: object, **__: object) -> object:
            return make()

        return answer

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


def _first_on_cpu(original: Callable) -> Callable:
    """Wrap a function whose first argument is a device."""

    @functools.wraps(original)
    def function(device: object, *args: object, **kwargs: object) -> object:
        return original("cpu" if is_cuda(device) else device, *args, **kwargs)

    return function


def _second_on_cpu(original: Callable) -> Callable:
    """Wrap a method, such as `Tensor.to`, whose first argument after `self` may be a device."""

    @functools.wraps(original)
    def method(self: object, *args: object, **kwargs: object) -> object:
        if args and is_cuda(args[0]):
            args = ("cpu", *args[1:])
        for name in ("device", "device_type"):
            if name in kwargs and is_cuda(kwargs[name]):
                kwargs[name] = "cpu"
        return original(self, *args, **kwargs)

    return method


def _own_memory(tensor: object) -> object:
    """The tensor itself, or a copy if elements share memory: a GPU's copy has a place for each, which may be written."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.contiguous() if shared else tensor


def _cuda(original: Callable) -> Callable:
    """Replace `Tensor.cuda`."""

    @functools.wraps(original)
    def cuda(self: object, *_: object, **__: object) -> object:
        return _own_memory(self)

    return cuda


def _to(original: Callable) -> Callable:
    """Wrap `Tensor.to`: what would move to a GPU stays, with memory of its own."""
    to_cpu = _second_on_cpu(original)

    @functools.wraps(original)
    def to(self: object, *args: object, **kwargs: object) -> object:
        moves = is_cuda(args[0] if args else kwargs.get("device"))
        return _own_memory(to_cpu(self, *args, **kwargs)) if moves else original(self, *args, **kwargs)

    return to


def _type_says_cuda(original: Callable) -> Callable:
    """Wrap `Tensor.type`: optimizers accept only what calls itself `torch.cuda.FloatTensor`."""

    @functools.wraps(original)
    def type_(self: object, dtype: object = None, *args: object, **kwargs: object) -> object:
        if dtype is None:
            return original(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, getattr(dtype, "__on_cpu__", dtype), *args, **kwargs)

    return type_


def _tensor_type(name: str) -> Callable[[object], type]:
    """`torch.cuda.FloatTensor` and its kind: old-style constructors, and names that isinstance() is asked about."""

    def replace(_: object) -> type:
        import torch

        on_cpu = getattr(torch, f"{name}Tensor")

        class TensorType(type):
            def __call__(cls, *args: object, **kwargs: object) -> object:
                return on_cpu(*args, **kwargs)

            def __instancecheck__(cls, instance: object) -> bool:
                return isinstance(instance, on_cpu)

        return TensorType(f"{name}Tensor", (), {"__module__": "torch.cuda", "__on_cpu__": on_cpu})

    return replace


def _generator_on_cpu(original: type) -> type:
    class GeneratorMeta(type(original)):
        def __call__(cls, device: object = "cpu") -> object:
            return original("cpu" if is_cuda(device) else device)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    # a subclass, because Megatron asks the class which methods it has
    return GeneratorMeta("Generator", (original,), {"__doc__": original.__doc__, "__module__": "torch"})


def _load_on_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def load(f: object, map_location: object = None, **kwargs: object) -> object:
        return original(f, map_location="cpu" if is_cuda(map_location) else map_location, **kwargs)

    return load


def _autocast_question(original: Callable) -> Callable:
    """Wrap a question about autocast, which is on for the CPU where a GPU rank has it on for CUDA."""

    @functools.wraps(original)
    def question(device_type: str = "cuda") -> object:
        return original("cpu" if is_cuda(device_type) else device_type)

    return question


def _gpu_autocast_dtype(_: Callable) -> Callable:
    import torch

    ask = torch._C.get_autocast_dtype

    def get_autocast_gpu_dtype() -> object:
        return ask("cpu")

    return get_autocast_gpu_dtype


def _originals(original: Callable) -> Callable:
    """Keep the set of functions that `with torch.device(...)` knows: asked later, it would name the wrappers."""
    constructors = original()

    @functools.wraps(original)
    def device_constructors() -> object:
        return constructors

    return device_constructors


def _properties() -> types.SimpleNamespace:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return types.SimpleNamespace(
        name="CPU", major=9, minor=0, total_memory=memory_bytes, multi_processor_count=os.cpu_count() or 1
    )


def _free_and_total() -> tuple[int, int]:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return page_bytes * os.sysconf("SC_AVPHYS_PAGES"), page_bytes * os.sysconf("SC_PHYS_PAGES")


def _itself(original: Callable) -> Callable:
    @functools.wraps(original)
    def unchanged(self: object, *_: object, **__: object) -> object:
        return self

    return unchanged


def redirections() -> list[Redirection]:
    """Every redirection of torch that a CPU rank needs, in the order in which they are applied."""
    asks = "asked about the GPU all over Megatron and Bridge"
    one = "each rank owns one device"
    done = "calls are synchronous"
    allocator = "no caching allocator: `memory.jsonl` has the numbers"
    moves = "moves to the rank's device"
    autocast = "autocast for the rank's device"
    profiler = "no profiler of NVIDIA's is attached"
    means = "a CUDA device means the CPU"
    rows = [
        Redirection("torch.utils._device._device_constructors", _originals, "as before", "factories are wrapped below"),
        Redirection("torch.utils._device.DeviceContext.__init__", _second_on_cpu, means, "`with torch.device(...)`"),
        Redirection("torch.cuda.is_available", _answer(True), "True", asks),
        Redirection("torch.cuda.is_initialized", _answer(True), "True", asks),
        Redirection("torch.cuda.device_count", _answer(1), "1", one),
        Redirection("torch.cuda.current_device", _answer(0), "0", one),
        Redirection("torch.cuda.device", lambda _: streams.Device, "a context without effect", one),
        Redirection("torch.cuda.get_device_name", _answer("CPU"), '"CPU"', asks),
        Redirection(
            "torch.cuda.get_device_capability", _answer((9, 0)), "(9, 0)", "Megatron picks paths by capability"
        ),
        Redirection("torch.cuda.get_device_properties", _new(_properties), "the machine's memory and cores", asks),
        Redirection("torch.cuda.is_bf16_supported", _answer(True), "True", "a CPU emulates bf16"),
        Redirection("torch.cuda.is_current_stream_capturing", _answer(False), "False", "there are no CUDA graphs"),
        Redirection("torch.cuda.memory_stats", _new(collections.Counter), "nothing counted", allocator),
        Redirection("torch.cuda.memory_snapshot", _new(list), "[]", allocator),
        Redirection("torch.cuda.memory_summary", _answer(""), "an empty text", allocator),
        Redirection("torch.cuda.mem_get_info", _new(_free_and_total), "the machine's free and total memory", asks),
        *(Redirection(f"torch.cuda.{name}", _answer(0), "0", allocator) for name in MEMORY),
        *(Redirection(f"torch.cuda.{name}", _answer(0), "0", "no GPU to read a sensor of") for name in SENSORS),
        *(Redirection(f"torch.cuda.{name}", _answer(None), "no effect", "no device to act on") for name in NO_EFFECT),
        Redirection("torch.cuda.Stream", lambda _: streams.Stream, "a stream where all is done", done),
        Redirection("torch.cuda.ExternalStream", lambda _: streams.ExternalStream, "a stream where all is done", done),
        Redirection("torch.cuda.Event", lambda _: streams.Event, "wall-clock time", done),
        Redirection("torch.cuda.current_stream", _answer(streams.CURRENT), "a stream where all is done", done),
        Redirection("torch.cuda.default_stream", _answer(streams.CURRENT), "a stream where all is done", done),
        Redirection("torch.cuda.stream", _answer(streams.CURRENT), "a context without effect", done),
        Redirection("torch.Tensor.record_stream", _answer(None), "no effect", "memory is not shared between streams"),
        Redirection("torch.cuda.nvtx.range_push", _answer(None), "no effect", profiler),
        Redirection("torch.cuda.nvtx.range_pop", _answer(None), "no effect", profiler),
        Redirection("torch.cuda.nvtx.mark", _answer(None), "no effect", profiler),
        Redirection("torch.cuda.nvtx.range", lambda _: streams.Range, "a context without effect", profiler),
        Redirection("torch.Tensor.cuda", _cuda, "the tensor itself", "it is where it will be used"),
        Redirection("torch.nn.Module.cuda", _itself, "the module itself", "it is where it will be used"),
        Redirection("torch.Tensor.pin_memory", _itself, "the tensor itself", "pinning needs a CUDA driver"),
        Redirection("torch.Tensor.to", _to, means, moves),
        Redirection("torch.nn.Module.to", _second_on_cpu, means, moves),
        Redirection(
            "torch.Tensor.type", _type_says_cuda, "torch.cuda.*Tensor", "optimizers group parameters by this name"
        ),
        *(
            Redirection(f"torch.cuda.{n}Tensor", _tensor_type(n), f"torch.{n}Tensor", "asked with isinstance()")
            for n in TENSOR_TYPES
        ),
        Redirection("torch.Generator", _generator_on_cpu, means, "samplers ask for one"),
        Redirection(
            "torch.distributed.device_mesh.DeviceMesh.__init__", _second_on_cpu, means, "sharded layers ask for one"
        ),
        Redirection("torch.set_default_device", _first_on_cpu, means, "as factories"),
        Redirection(
            "torch.load", _load_on_cpu, "map_location cuda means the CPU", "checkpoints are read to the device"
        ),
        Redirection("torch.autocast.__init__", _second_on_cpu, "autocasts CPU operations", autocast),
        Redirection("torch.is_autocast_enabled", _autocast_question, "asks about the CPU", autocast),
        Redirection("torch.get_autocast_dtype", _autocast_question, "asks about the CPU", autocast),
        Redirection("torch.get_autocast_gpu_dtype", _gpu_autocast_dtype, "asks about the CPU", autocast),
        Redirection(
            "torch.optim.Optimizer._accelerator_graph_capture_health_check",
            _answer(None),
            "no effect",
            "asks for a stream",
        ),
    ]
    creates = "creates on the CPU when asked for CUDA"
    rows += [Redirection(f"torch.{n}", _on_cpu, creates, "tensors are made on the rank's device") for n in FACTORIES]
    rows += [Redirection(f"torch.Tensor.{n}", _on_cpu, creates, "as the factories") for n in NEW_METHODS]
    return rows + rng.torch_redirections()

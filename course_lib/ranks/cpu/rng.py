"""Two random streams, as a machine with a GPU has them: the CPU's and the GPU's.

Megatron relies on both.  It seeds the GPU's stream differently on each tensor-parallel rank and leaves the CPU's alone,
from which layout-independent weights are drawn.  A CPU rank has one generator, torch's default one, so the GPU's stream
is a state that waits here and takes the generator's place while something draws that would draw on a GPU:

- inside `CudaRNGStatesTracker.fork()`, where Megatron says so;
- in factories that name a CUDA device, such as `torch.rand(2, device="cuda")`;
- in dropout, which no Megatron model computes on a CPU.

Everything else draws from the CPU's stream, as initialisation on the CPU does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from course_lib.stack.patches import Patches

PATCHES = Patches()
STREAM = "a GPU has a random stream of its own; tensor-parallel seeds live there"
TRACKER = "megatron.core.tensor_parallel.random"
DRAWS = ("normal", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm")
"""Factories of torch that draw."""

_waiting: dict[str, Any] = {}
"""`state` of the GPU's stream while it waits, absent before its first use."""
_in_place: list[bool] = []
"""Not empty while torch's default generator plays the GPU's stream."""


def _in_cuda(name: str) -> tuple[str, str]:
    return f"torch.cuda.{name}", f"torch.cuda.random.{name}"


def get_state() -> torch.Tensor:
    """The state of the GPU's stream, a byte tensor of its own."""
    if _in_place:
        return torch.default_generator.get_state()
    if "state" not in _waiting:
        _waiting["state"] = type(torch.default_generator)().get_state()
    return _waiting["state"].clone()


def set_state(new_state: torch.Tensor) -> None:
    """Set the state of the GPU's stream."""
    if _in_place:
        torch.default_generator.set_state(new_state)
    else:
        _waiting["state"] = new_state.clone()


@contextmanager
def on_gpu_stream() -> Iterator[None]:
    """Let everything that draws in the body draw from the GPU's stream."""
    if _in_place:
        yield
        return
    state, generator = get_state(), torch.default_generator
    cpu_state = generator.get_state()
    generator.set_state(state)
    _in_place.append(True)
    try:
        yield
    finally:
        _in_place.clear()
        _waiting["state"] = generator.get_state()
        generator.set_state(cpu_state)


@PATCHES.replaces("torch.cuda._is_in_bad_fork", why="else torch.manual_seed seeds no GPU in a fork")
def _is_in_bad_fork(_):
    """False."""
    return False


@PATCHES.replaces(*_in_cuda("get_rng_state"), why=STREAM)
def get_rng_state(_, device="cuda"):
    """The second stream's state."""
    return get_state()


@PATCHES.replaces(*_in_cuda("set_rng_state"), why=STREAM)
def set_rng_state(_, new_state, device="cuda"):
    """Sets the second stream."""
    set_state(new_state)


@PATCHES.replaces(*_in_cuda("get_rng_state_all"), why=STREAM)
def get_rng_state_all(_):
    """The second stream's state, in a list."""
    return [get_state()]


@PATCHES.replaces(*_in_cuda("set_rng_state_all"), why=STREAM)
def set_rng_state_all(_, new_states):
    """Sets the second stream."""
    set_state(new_states[0])


@PATCHES.replaces(*_in_cuda("manual_seed"), *_in_cuda("manual_seed_all"), why=STREAM)
def manual_seed(_, seed):
    """Seeds the second stream and leaves the CPU's alone."""
    set_state(type(torch.default_generator)().manual_seed(int(seed)).get_state())


@PATCHES.replaces(
    "torch.xpu.manual_seed_all",
    "torch.mtia.manual_seed_all",
    why="there is no such device, and torch keeps the source lines of all callers for the day when there is one",
)
def seed_no_device(_, seed):
    """Nothing."""


@PATCHES.makes(*(f"torch.{name}" for name in DRAWS), why=STREAM)
def random_factory(original: Callable) -> Callable:
    """On the CPU when asked for CUDA, drawn from the second stream."""
    from course_lib.ranks.cpu.cuda import is_cuda

    @functools.wraps(original)
    def factory(*args, **kwargs):
        if "device" not in kwargs or not is_cuda(kwargs["device"]):
            return original(*args, **kwargs)
        kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if kwargs.get("generator") is not None:
            return original(*args, **kwargs)
        with on_gpu_stream():
            return original(*args, **kwargs)

    return factory


@PATCHES.replaces(
    "torch.nn.functional.dropout", why="a mask that tensor-parallel ranks share must not shift the CPU's stream"
)
def dropout(original, input, p=0.5, training=True, inplace=False):
    """Draws from the second stream."""
    if not training or p == 0.0:
        return original(input, p, training, inplace)
    with on_gpu_stream():
        return original(input, p, training, inplace)


@PATCHES.replaces(f"{TRACKER}._get_cuda_rng_state", why=STREAM)
def _get_cuda_rng_state(_, device="cuda", clone=False, graph_safe=False):
    """The second stream's state, or a generator that has it."""
    if not graph_safe:
        return get_state()
    generator = type(torch.default_generator)()
    generator.set_state(get_state())
    return generator


@PATCHES.replaces(f"{TRACKER}._set_cuda_rng_state", why=STREAM)
def _set_cuda_rng_state(_, new_state, device=-1, graph_safe=False):
    """Sets the second stream."""
    set_state(new_state.get_state() if graph_safe else new_state)


@PATCHES.replaces(f"{TRACKER}.CudaRNGStatesTracker.fork", why="upstream marks here what draws on the GPU")
@contextmanager
def fork(original, self, *args, **kwargs):
    """All that draws inside draws from the second stream."""
    with original(self, *args, **kwargs), on_gpu_stream():
        yield

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

from course_lib.stack.redirection import Redirection

__all__ = ["get_state", "megatron_redirections", "on_gpu_stream", "seed", "set_state", "torch_redirections"]

_waiting: dict[str, object] = {}
"""`state` of the GPU's stream while it waits, absent before its first use."""
_in_place: list[bool] = []
"""Not empty while torch's default generator plays the GPU's stream."""


def get_state() -> object:
    """The state of the GPU's stream, a byte tensor of its own."""
    import torch

    if _in_place:
        return torch.default_generator.get_state()
    if "state" not in _waiting:
        _waiting["state"] = type(torch.default_generator)().get_state()
    return _waiting["state"].clone()


def set_state(new_state: object) -> None:
    """Set the state of the GPU's stream."""
    import torch

    if _in_place:
        torch.default_generator.set_state(new_state)
    else:
        _waiting["state"] = new_state.clone()


def seed(number: int) -> None:
    """Seed the GPU's stream and leave the CPU's alone."""
    import torch

    set_state(type(torch.default_generator)().manual_seed(int(number)).get_state())


@contextmanager
def on_gpu_stream() -> Iterator[None]:
    """Let everything that draws in the body draw from the GPU's stream."""
    import torch

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


def random_factory(original: Callable) -> Callable:
    """Wrap a random factory: asked for CUDA it makes a CPU tensor, and draws from the GPU's stream."""
    from course_lib.ranks.cpu.device import is_cuda

    @functools.wraps(original)
    def factory(*args: object, **kwargs: object) -> object:
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


def _dropout(original: Callable) -> Callable:
    @functools.wraps(original)
    def dropout(input: object, p: float = 0.5, training: bool = True, inplace: bool = False) -> object:
        if not training or p == 0.0:
            return original(input, p, training, inplace)
        with on_gpu_stream():
            return original(input, p, training, inplace)

    return dropout


def _generator_of(state: object) -> object:
    import torch

    generator = type(torch.default_generator)()
    generator.set_state(state)
    return generator


def _megatron_get(_: object) -> Callable:
    def _get_cuda_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> object:
        return _generator_of(get_state()) if graph_safe else get_state()

    return _get_cuda_rng_state


def _megatron_set(_: object) -> Callable:
    def _set_cuda_rng_state(new_state: object, device: object = -1, graph_safe: bool = False) -> None:
        set_state(new_state.get_state() if graph_safe else new_state)

    return _set_cuda_rng_state


def _fork(original: Callable) -> Callable:
    @contextmanager
    @functools.wraps(original)
    def fork(self: object, *args: object, **kwargs: object) -> Iterator[None]:
        with original(self, *args, **kwargs), on_gpu_stream():
            yield

    return fork


_STREAM = "a GPU has a random stream of its own; tensor-parallel seeds live there"


def torch_redirections() -> list[Redirection]:
    """What torch offers of the GPU's random stream."""

    def getter(_: object) -> Callable:
        def get_rng_state(device: object = "cuda") -> object:
            return get_state()

        return get_rng_state

    def setter(_: object) -> Callable:
        def set_rng_state(new_state: object, device: object = "cuda") -> None:
            set_state(new_state)

        return set_rng_state

    def seeder(_: object) -> Callable:
        def manual_seed(number: int) -> None:
            seed(number)

        return manual_seed

    def getter_of_all(_: object) -> Callable:
        def get_rng_state_all() -> list[object]:
            return [get_state()]

        return get_rng_state_all

    def setter_of_all(_: object) -> Callable:
        def set_rng_state_all(new_states: list[object]) -> None:
            set_state(new_states[0])

        return set_rng_state_all

    def never(_: object) -> Callable:
        def _is_in_bad_fork() -> bool:
            return False

        return _is_in_bad_fork

    factories = "normal rand rand_like randint randint_like randn randn_like randperm".split()
    return [
        Redirection("torch.cuda._is_in_bad_fork", never, "False", "torch.manual_seed seeds no GPU in a fork"),
        *(
            Redirection(f"torch.cuda.{module}{name}", make, becomes, _STREAM)
            for module in ("", "random.")
            for name, make, becomes in (
                ("get_rng_state", getter, "the second stream's state"),
                ("set_rng_state", setter, "sets the second stream"),
                ("get_rng_state_all", getter_of_all, "the second stream's state, in a list"),
                ("set_rng_state_all", setter_of_all, "sets the second stream"),
                ("manual_seed", seeder, "seeds the second stream"),
                ("manual_seed_all", seeder, "seeds the second stream"),
            )
        ),
        *(
            Redirection(f"torch.{name}", random_factory, "on the CPU, drawn from the second stream", _STREAM)
            for name in factories
        ),
        Redirection(
            "torch.nn.functional.dropout",
            _dropout,
            "draws from the second stream",
            "a mask that all tensor-parallel ranks share must not shift the CPU's stream",
            ("input", "p", "training", "inplace"),
        ),
    ]


def megatron_redirections() -> list[Redirection]:
    """Megatron's own access to the GPU's random stream."""
    tracker = "megatron.core.tensor_parallel.random"
    return [
        Redirection(
            f"{tracker}._get_cuda_rng_state",
            _megatron_get,
            "the second stream's state",
            _STREAM,
            ("device", "clone", "graph_safe"),
        ),
        Redirection(
            f"{tracker}._set_cuda_rng_state",
            _megatron_set,
            "sets the second stream",
            _STREAM,
            ("new_state", "device", "graph_safe"),
        ),
        Redirection(
            f"{tracker}.CudaRNGStatesTracker.fork",
            _fork,
            "all that draws inside draws from the second stream",
            "upstream marks here what draws on the GPU",
            ("self", "name"),
        ),
    ]

"""Layers that are alike keep alike: a micro-batch goes through the first few of a kind, and the others are counted by them.

8B has 32 layers of one kind, and torch's meta device takes a hundredth of a second for each.  A layer is left out only
if the last two of its kind, each behind one of the same kind, kept the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Kept = tuple[str, int, torch.UntypedStorage, int | None]
    """A kept tensor: module, chunk, storage, and its bytes where they are not the storage's."""

_KNOWN = ("megatron.core.", "megatron.bridge.peft.", "course_lib.", "torch.")
"""Whose modules ask for the layer's number when they are built, or by a list of the configuration.  A family's own, such as
Gemma's, may ask whenever they run: each of their layers is computed."""

_PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclass
class _Passed:
    """What a computed layer kept, by the names of its own modules, and what came out."""

    kept: list[Kept]
    result: Any
    keeps_result: bool

    @property
    def sizes(self) -> list[tuple[str, int]]:
        return [(inner, storage.nbytes() if size is None else size) for inner, _, storage, size in self.kept]


class Layers:
    """The layers of a chunk, in the order of the forward pass.

    Args:
        found: The kept tensors, to which those of a layer that is left out are added.
        seen: Storages that were counted, as `activations` marks them.
    """

    def __init__(self, found: list[Kept], seen: set[tuple[int, bool]]) -> None:
        self.found, self.seen = found, seen
        self.passed: dict[object, list[_Passed]] = {}
        self.given: list[torch.Tensor] = []
        self.before: object = None

    def watch(self, name: str, layer: torch.nn.Module, marked: set[str]) -> None:
        """From now on a call of this layer is computed, or left out if it would keep what others kept.

        Args:
            name: Its name in the chunk.
            layer: The layer.
            marked: Modules of the chunk that keep something else than others of their class.
        """
        import torch

        kind, compute = _kind(name, layer, marked), layer.forward

        def forward(*args: Any, **named: Any) -> Any:
            if kind is None:
                self.before = None
                return compute(*args, **named)
            key = (kind, self.before, torch.is_grad_enabled(), *map(_look, (*args, *named.values())))
            known, self.before = self.passed.setdefault(key, []), kind
            if len(known) > 1 and known[-1].sizes == known[-2].sizes:
                return self._left_out(name, known[-1])
            first = len(self.found)
            result = compute(*args, **named)
            kept = [(module.removeprefix(name), *rest) for module, *rest in self.found[first:]]
            known.append(_Passed(kept, result, _mark(_first(result)) in self.seen))
            return result

        layer.forward = forward

    def _left_out(self, name: str, like: _Passed) -> Any:
        """Count what another layer kept, and give out a tensor of the same shape."""
        import torch

        self.found += [(f"{name}{inner}", *rest) for inner, *rest in like.kept]
        before = _first(like.result)
        out = torch.empty_strided(before.shape, before.stride(), dtype=before.dtype, device=before.device)
        out.requires_grad_(before.requires_grad)
        if like.keeps_result:
            self.seen.add(_mark(out))
            self.given.append(out)  # so that no later storage gets its address
        return (out, *like.result[1:]) if isinstance(like.result, tuple) else out


def _first(result: Any) -> torch.Tensor:
    """What goes on to the next layer; a layer may give out more beside it."""
    return result[0] if isinstance(result, tuple) else result


def _mark(tensor: torch.Tensor) -> tuple[int, bool]:
    """As `activations` marks a storage that was counted."""
    return tensor.untyped_storage()._cdata, False


def _kind(name: str, layer: torch.nn.Module, marked: set[str]) -> object:
    """Equal for layers that differ in nothing but their number; None where that cannot be told from their modules."""
    config, number = layer.config, layer.layer_number
    by_layer = (one for one in vars(config).values() if isinstance(one, list | tuple) and len(one) >= config.num_layers)
    parts: list[object] = [id(config), *(one[number - 1] for one in by_layer)]
    for inner, module in layer.named_modules():
        if not type(module).__module__.startswith(_KNOWN):
            return None
        values = (item for item in vars(module).items() if isinstance(item[1], _PLAIN) and item[0] != "layer_number")
        weights = (
            (key, one.shape, one.dtype, one.requires_grad) for key, one in module.named_parameters(recurse=False)
        )
        parts += [inner, type(module), f"{name}.{inner}" in marked, repr(list(values)), *weights]
    return tuple(map(str, parts))


def _look(value: Any) -> object:
    """What a layer may tell of an argument: the shape of a tensor, the identity of anything else."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return id(value)

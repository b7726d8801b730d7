"""Megatron Core's own layers under the names of its Transformer Engine wrappers, where that package is not installed.

Layer specs name classes of `megatron.core.extensions.transformer_engine`, directly, through partials, or as the base of
a model's own class.  Without the package those classes are mocks that cannot be built.  `stand_in()` gives each name a
class with the same arguments, parameters, names in a checkpoint and results, made of Core's local layers: so every spec
builds, in a rank and in the planner, whatever form it has.  Where the package is installed, the planner puts the same
classes in place for a while, because the package's own have no meta device.

What has no local form stays `None`, as Core itself leaves it: grouped linear layers (experts are then built one by
one), fused activations and the operation fuser.

Source: megatron-core extensions/transformer_engine.py @ 0.19.2
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from course_lib.stack.patches import Patches

VERSION = "2.14"
"""The Transformer Engine whose layers these follow; Core asks before it takes one, such as a norm of queries."""


def stand_in(package: ModuleType) -> None:
    """Put the local classes in place; to be called before any other module imports the wrappers by name.

    Args:
        package: What answers to Transformer Engine's name, and raises where one of its names is used.  It gives the
            wrappers that have no local form theirs: Core's own are mocks, which would do nothing without a word.
    """
    from unittest.mock import NonCallableMock

    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from packaging.version import Version

    mocks = [name for name, value in vars(transformer_engine).items() if isinstance(value, NonCallableMock)]
    absent = {name: getattr(package, name) for name in mocks} | {"te": package}
    for name, kind in (absent | _classes()).items():
        setattr(transformer_engine, name, kind)
    transformer_engine.HAVE_TE = True
    utils._te_version = Version(VERSION)


def patches() -> Patches:
    """The local classes in place of Transformer Engine's, in every module that names one, where the package is installed.

    A model's own class that is derived from one of Transformer Engine's stays what it is.
    """
    from megatron.core.extensions import transformer_engine

    mine, places = _classes(), Patches()
    if transformer_engine.TELinear is mine["TELinear"]:
        return places
    theirs = {id(vars(transformer_engine)[name]): kind for name, kind in mine.items()}
    for name, module in list(sys.modules.items()):
        for attribute, value in list(vars(module).items()) if name.startswith("megatron.") else ():
            if id(value) in theirs:
                places.sets(theirs[id(value)], f"{name}.{attribute}", why="the package's own have no meta device")
    return places


@functools.cache
def _classes() -> dict[str, type]:
    from megatron.core.extensions import transformer_engine

    from course_lib.stack import te_layers

    kinds = {name: kind for name, kind in vars(te_layers).items() if name.startswith("TE")}
    for name, kind in kinds.items():
        kind.__module__, kind.__qualname__ = transformer_engine.__name__, name
    return kinds


PATCHES = Patches()
"""What else Core and Bridge need where these layers stand in, in a rank and in the planner."""
_LAYERS, _PEFT = "megatron.core.tensor_parallel.layers", "megatron.bridge.peft.utils"


@PATCHES.makes(
    f"{_LAYERS}.reduce_from_tensor_model_parallel_region",
    f"{_LAYERS}.reduce_scatter_to_sequence_parallel_region",
    why="upstream returns its input from a function of autograd, to which an expert's bias cannot be added in place",
)
def unless_alone(original: Callable) -> Callable:
    """A group of one rank gives its input back as it is."""

    @functools.wraps(original)
    def reduction(input_: Any, *args: Any, group: Any = None, **options: Any) -> Any:
        return input_ if group is not None and group.size() == 1 else original(input_, *args, group=group, **options)

    return reduction


@PATCHES.replaces(
    "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
    why="upstream takes the default for FP8 (`is not None`) and then misses Transformer Engine",
)
def fp8_if_asked(original: Callable, self: Any, fp8: Any = None) -> None:
    """FP8 only if asked for."""
    original(self, fp8 or None)


@PATCHES.makes("megatron.core.models.hybrid.hybrid_block.TENorm", why="Transformer Engine is absent")
def hybrid_norm(_: object) -> type:
    """torch's norm."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm


@PATCHES.makes(
    f"{_PEFT}.TECL",
    f"{_PEFT}.TERL",
    why="LoRA asks isinstance for each class; the grouped one is absent without Transformer Engine",
)
def without_none(kinds: tuple) -> tuple:
    """Without None."""
    return tuple(kind for kind in kinds if kind is not None)

"""Which code a configuration may name: the classes and functions that Bridge itself writes into one, and no others.

`_target_` in a `config.yaml` names what Bridge imports and calls, and runs and checkpoints are passed on.  Nothing here
calls what it looks at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from course_lib import stack
from course_lib.common.config import ConfigError
from course_lib.common.project import variable

_CODE_BY_NAME = ("custom_manager_class", "fp4_quantizer_factory", "fp8_quantizer_factory", "feature_dirs")
"""Fields whose text Bridge, Megatron Core or Transformer Engine imports as code.

Source: megatron-bridge `training/checkpointing.py` and `training/tensor_inspect.py` @ 0.6.2, megatron-core `fp8_utils.py`
and `fp4_utils.py` @ 0.19.2."""

_ARITHMETIC = (
    "torch.nn.functional",
    "torch.nn.init",
    "torch._C._nn",
    "megatron.core.activations",
    "megatron.core.fusions.fused_bias_geglu",
)
"""Modules whose functions take tensors: activations and ways to initialise."""

_MODELS = (
    "megatron.bridge.models.",
    "megatron.bridge.diffusion.models.",
    "megatron.core.models.",
    "megatron.core.post_training.",
)
"""Packages whose functions named `..._spec` say of which layers a model consists."""

_SET_UP = (
    "megatron.core.distributed.finalize_model_grads.finalize_model_grads",
    "megatron.core.optimizer.optimizer.MegatronOptimizer.scale_loss",
)
"""Functions that Bridge puts into a model's configuration while it sets a run up, and so into `run_config.yaml`."""

_SAYS_WHAT = ("_target_", "_call_", "_partial_", "_name_", "_builder_")

_IMPORTABLE = re.compile(r"megatron\.(bridge|core|training)\.|transformers\.([\w.]+\.)?configuration_\w+$|signal$")

_SPECIFICATION = re.compile(r"_specs?$")

_EMPTY = (
    "megatron.core.process_groups_config.ProcessGroupCollection",
    "megatron.core.tokenizers.text.models.default_tokenizer.DefaultTokenizerText",
)
"""Objects of a running rank, written into `run_config.yaml` without their content."""


def refuse(content: dict, source: Path) -> None:
    """Refuse a configuration that names other code than the classes and functions that Bridge itself writes.

    `_target_` in a `config.yaml` names what Bridge imports and calls.  Megatron's own guard looks at the beginning of the
    name, which a module's own imports lead past: `torch.os.system` begins with `torch.`.  Here a name must be the name
    that its object has itself, and the object must be of a kind that `ConfigContainer.to_yaml` writes: a dataclass that
    the field above it is declared to hold, a member of an enumeration, a data type, a model's shape as Hugging Face keeps
    it, or an activation, initialisation or layer specification.  Nothing is called to find that out.

    Layer specifications may also come from the modules that `COURSE_LAYERS` names, with commas between them: the learner's
    own, which whoever starts the process names, and no file can.

    Raises:
        ConfigError: Names file, field and target of the first foreign one.

    Source: megatron-core 0.19.2 `megatron/training/config/instantiate_utils.py` and `yaml_utils.py`.
    """
    stack.prepare_imports()  # a script that launches a file need not know Bridge
    from megatron.bridge.training.config import ConfigContainer

    for place, found in _foreign(content, "", (ConfigContainer,)):
        raise ConfigError(
            f"{source}, field {place or 'at the top'}: {found}. Reading or running such a file could run whatever its writer "
            "likes: take the field out, or build the configuration in Python from what you know of it"
        )


def _foreign(node: Any, place: str, declared: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    """Each place of a file that names code which Bridge would not have written, and what is wrong there."""
    if isinstance(node, str) and ("${" in node or node == "???"):
        yield place, f"{node[:80]!r} asks OmegaConf to put another value here"
    elif isinstance(node, list | set):  # a set holds no mapping, and LoRA's `params_to_save` is one
        for number, item in enumerate(node):
            yield from _foreign(item, f"{place}[{number}]", declared)
    elif not isinstance(node, dict | str | float | int | None):
        # OmegaConf looks into the tuples that !!omap and !!pairs make, and what they name would run
        yield place, f"{node!r:.80} is of a kind that Bridge does not write ({type(node).__name__})"
    elif isinstance(node, dict):
        named = "_target_" in node or "_builder_" in node
        owner, problem = _named(node, declared) if named else (None, "")
        if problem:
            yield place, problem
            return
        for key, value in node.items():
            inner = f"{place}.{key}".removeprefix(".")
            if not isinstance(key, str | int | float):
                yield inner, f"OmegaConf, which a GPU rank reads with, takes no {type(key).__name__} for a name"
            by_name = key in _CODE_BY_NAME or str(key).endswith("trust_remote_code")
            # a layer's specification may give its module as [package, name]
            if value and (by_name or (key == "module" and not isinstance(value, dict))):
                yield inner, f"{str(value)[:80]} lets code be run that is not Bridge's"
            elif not (named and key in _SAYS_WHAT):
                # looking a declaration up takes longer than all the rest, and a plain value has none
                looked_up = named and isinstance(value, (dict, list))
                yield from _foreign(value, inner, _declared(owner, key) if looked_up else declared)


def _named(node: dict, declared: tuple[type, ...]) -> tuple[object, str]:
    """What a node's `_target_` stands for, and why it is refused; the reason is empty if it is not."""
    import enum

    target, fields = node.get("_target_"), node.keys() - set(_SAYS_WHAT)
    call, partial = node.get("_call_", True), node.get("_partial_", False)
    if not isinstance(target, str) or not isinstance(call, bool) or not isinstance(partial, bool):
        return None, "_target_ must be text, _call_ and _partial_ true or false"
    thing = resolve(target)
    if thing is None:
        return None, f"{target} is not the own name of a class or function that Bridge writes{_if_it_is_yours(target)}"
    if "_builder_" in node and not _is_class(resolve(str(node["_builder_"])), "Builder"):
        return thing, f"{node['_builder_']} is no builder of models"
    if partial or (not call and not fields):
        reference = _is_function(thing, target) or (not partial and (_is_module(thing) or _is_data_type(thing)))
        what = f"{target} is no data type, activation, initialisation or specification of layers"
        return thing, "" if reference else what + _if_it_is_yours(target)
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        return thing, "" if fields == {"_args_"} else f"{target} needs one value in _args_ and nothing else"
    if target.endswith(".from_dict"):
        return thing, "" if fields == {"config_dict"} else f"{target} needs config_dict and nothing else"
    if target in _EMPTY:
        return thing, f"{target} is written without content" if fields else ""
    held = dataclasses.is_dataclass(thing) and "_args_" not in node
    # recipes also put Megatron's class where Bridge declares its own subclass of it
    fits = issubclass(thing, declared) or any(issubclass(kind, thing) for kind in declared) if held else False
    held = fits if declared else held and _is_class(thing, "ModuleSpec", "Submodules")
    return thing, "" if held else f"{target} is nothing that Bridge keeps in this field"


def permission() -> dict[str, str]:
    """The environment variable by which whoever starts ranks lets a configuration name layers of a module of their own."""
    own = variable("COURSE_LAYERS")
    return {"COURSE_LAYERS": own} if own else {}


def _own_modules() -> list[str]:
    return permission().get("COURSE_LAYERS", "").split(",")


def _if_it_is_yours(name: str) -> str:
    """What to do about a specification of layers that the learner wrote."""
    module, _, last = name.rpartition(".")
    if not _SPECIFICATION.search(last):
        return ""
    if module == "__main__":
        return (
            ", and ranks cannot import what a notebook defines: write the function into a module (%%writefile "
            "my_layers.py), import it from there, and set COURSE_LAYERS=my_layers"
        )
    return f" (if the module is your own, set COURSE_LAYERS={module}, as book/trust.md says)"


def resolve(name: str) -> object:
    """What a dotted name stands for, `None` unless that is its own name; modules are looked up, and nothing is called."""
    import importlib
    import sys

    *path, last = name.split(".")
    if not path or any(not part.isidentifier() or part.startswith("__") for part in (*path, last)):
        return None
    of_a_class = path[-1][:1].isupper()
    module = ".".join(path[:-1] if of_a_class else path)
    try:
        # Whoever imports torch can be asked for all that torch imports, os among it: only modules' own names count.
        importable = _IMPORTABLE.match(module) or module in _own_modules()
        thing: object = importlib.import_module(module) if importable else sys.modules[module]
        for part in (path[-1], last) if of_a_class else (last,):
            thing = getattr(thing, part)
    except (ImportError, AttributeError, KeyError):
        return None
    if last == "from_dict":
        return thing if _is_configuration(thing.__self__, f"{module}.{path[-1]}") else None
    own_name = (
        str(thing)
        if _is_data_type(thing)
        else f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
    )
    return thing if own_name == name else None


def _is_function(thing: object, name: str) -> bool:
    from types import BuiltinFunctionType, FunctionType

    module, _, last = name.rpartition(".")
    specification = (module.startswith(_MODELS) or module in _own_modules()) and _SPECIFICATION.search(last)
    known = module in _ARITHMETIC or specification or name in _SET_UP
    return isinstance(thing, FunctionType | BuiltinFunctionType) and bool(known)


def _is_module(thing: object) -> bool:
    """True for a class of layers."""
    import torch

    return isinstance(thing, type) and issubclass(thing, torch.nn.Module)


def _is_data_type(thing: object) -> bool:
    import torch

    return isinstance(thing, torch.dtype)


def _is_class(thing: object, *endings: str) -> bool:
    """True for a class of Megatron whose name ends so."""
    return isinstance(thing, type) and thing.__module__.startswith("megatron.") and thing.__name__.endswith(endings)


def _is_configuration(thing: object, name: str) -> bool:
    """True for a class that keeps a model's shape or its way to generate, as transformers writes them."""
    from transformers import GenerationConfig, PretrainedConfig

    known = isinstance(thing, type) and issubclass(thing, PretrainedConfig | GenerationConfig)
    return known and f"{thing.__module__}.{thing.__qualname__}" == name


def _declared(owner: object, field: str) -> tuple[type, ...]:
    """The dataclasses that a field is declared to hold; none for one that is declared as anything at all."""
    import sys
    import typing
    from collections.abc import Callable

    from megatron.bridge.models.model_provider import ModelProviderMixin

    def classes(hint: object) -> Iterator[type]:
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield hint
        if typing.get_origin(hint) is not Callable:
            for inner in typing.get_args(hint):
                yield from classes(inner)

    for base in owner.__mro__ if isinstance(owner, type) else ():
        if field in vars(base).get("__annotations__", {}):
            one = type("One", (), {"__annotations__": {field: vars(base)["__annotations__"][field]}})
            with contextlib.suppress(NameError, TypeError):  # what only a type checker understands
                found = tuple(classes(typing.get_type_hints(one, vars(sys.modules[base.__module__]))[field]))
                return (*found, ModelProviderMixin) if field == "model" else found
    return ()

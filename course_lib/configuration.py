"""A run's configuration on its way to `config.yaml`: read, refused, or written with the run's own places in it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from course_lib import stack
from course_lib.common import files
from course_lib.common.config import changed
from course_lib.credentials import secrets
from course_lib.runs import ConfigError

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = [
    "FieldError",
    "as_the_ranks_see_it",
    "read_file",
    "refuse_foreign_code",
    "refuse_unknown_fields",
    "refuse_wrong_values",
    "write_config",
    "write_content",
]

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

_EMPTY = (
    "megatron.core.process_groups_config.ProcessGroupCollection",
    "megatron.core.tokenizers.text.models.default_tokenizer.DefaultTokenizerText",
)
"""Objects of a running rank, written into `run_config.yaml` without their content."""


class FieldError(ValueError):
    """The configuration carries a name that Bridge does not know, or a value that its field cannot have."""


_ZERO_IS_NONE = re.compile(
    r"(_seed|local_rank|_priority|_level|_eod_id|profile_step_start|profile_step_end|start_eval_at_iter|ckpt_step|num_workers|"
    r"eval_iters|warmup_steps|mtp_num_layers|num_kv_shared_layers|num_layers_at_(start|end)_in_bf16|"
    r"num_special_tokens)$"
)
"""Whole numbers that may be 0 although upstream's default is not: "none", "the first", or a name that is a number."""

_SLIPS_OF_BRIDGE = ("bias_dropout_add_fusion",)
"""Names that Bridge itself sets and nobody reads.

Source: megatron-bridge 0.6.2 `models/nemotron/nemotron_bridge.py`.
"""

_MAY_BE_ABSENT = ("q_lora_rank", "num_global_query_groups")
"""Sizes that a family of models has, and one of its models lacks: Bridge sets them to None beside a declared number."""

_SHARE = re.compile(r"(dropout|fraction|percent|beta[12]?|momentum|_ema)$")
"""Numbers between 0 and 1."""

_ANY_SIGN = ("glu_linear_offset",)
_UNSET_AT_0 = ("num_layers", "hidden_size", "num_attention_heads")
_MUST_BE_SET = {"train": ("global_batch_size", "micro_batch_size")}
_UNREAD = {
    ("train", "rampup_batch_size"): "the batch would stay as large as cfg.train.global_batch_size",
    ("train", "step_batch_size_schedule"): "the batch would stay as large as cfg.train.global_batch_size",
    ("validation", "multiple_validation_sets"): "there would be one validation loss for all sets together",
    ("dataset", "multiple_validation_sets"): "its loader takes the list of data sets for one",
}
"""Fields that Megatron's dataclasses have and Bridge's loop does not read, and what would come of it.

Source: megatron-bridge training/initialize.py, data/loaders.py @ 0.6.2; megatron-core num_microbatches_calculator.py @ 0.19.2
"""


def refuse_unknown_fields(cfg: object) -> None:
    """A dataclass accepts `cfg.train.save_interval = 500` and YAML then drops it; catch that before a run."""
    sections = {
        part.name: getattr(cfg, part.name)
        for part in dataclasses.fields(cfg)
        if dataclasses.is_dataclass(getattr(cfg, part.name))
    }
    fields = {name: {field.name for field in dataclasses.fields(section)} for name, section in sections.items()}
    for name, section in sections.items():
        for extra in vars(section).keys() - fields[name]:
            if extra.startswith("_") or hasattr(type(section), extra) or extra in _SLIPS_OF_BRIDGE:
                continue
            # Recipes leave a few harmless names of their own; a name that lives elsewhere, or nearly here, is a slip.
            meant = [f"cfg.{other}.{extra}" for other in sections if extra in fields[other]]
            meant += [f"cfg.{name}.{close}" for close in difflib.get_close_matches(extra, fields[name], 1, 0.85)]
            if meant:
                raise FieldError(
                    f"cfg.{name}.{extra} is not a field of {type(section).__name__}. Did you mean {' or '.join(meant)}?"
                )


def refuse_wrong_values(cfg: ConfigContainer | dict) -> None:
    """Refuse values that their fields cannot have, before Megatron meets them late, unclearly or not at all.

    What a field can have is read from Bridge's own declarations.  A value must be of the declared type; upstream's default
    passes always.  A whole number must be at least 1, or at least 0 where the default is 0 or 0 means none; where the
    default is negative, negative numbers mean something.  Other numbers are finite and not negative, and shares at most 1.

    Args:
        cfg: Bridge's configuration, or a `config.yaml` as nested dicts that `refuse_foreign_code` let pass.

    Raises:
        FieldError: Names every such field, what it was given, and what it can have.
    """
    wrong = []
    for name, kind, values in _sections(cfg):
        fields = _declarations(kind)
        for field in _MUST_BE_SET.get(name, ()):
            if field in fields and values.get(field) is None:
                wrong.append(f"cfg.{name}.{field} is not set: give a whole number of at least 1")
        for field, (hint, default) in fields.items():
            absent = field in _MAY_BE_ABSENT and values.get(field) is None
            if field in values and not absent and (reason := _wrong(field, values[field], hint, default)):
                wrong.append(f"cfg.{name}.{field}={values[field]!r}: {reason}")
        if name == "train":
            others = [field for field in ("train_samples", "num_epochs") if values.get(field) is not None]
            if values.get("train_iters") is None:
                instead = f" instead of {others[0]}: a run of this course is counted in steps" if others else ""
                wrong.append(f"cfg.train.train_iters is not set: give the number of steps{instead}")
            elif others:
                wrong.append(f"cfg.train.{others[0]} is set beside cfg.train.train_iters: set it to None")
        for (section, field), otherwise in _UNREAD.items():
            if section == name and values.get(field):
                wrong.append(
                    f"cfg.{name}.{field}={values[field]!r}: Bridge does not read it ({otherwise}): leave it out"
                )
        if name == "dataset":
            wrong += [f"cfg.dataset.{place}: {reason}" for place, reason in _wrong_blends(values)]
    if wrong:
        raise FieldError("\n".join(["this configuration cannot run:", *(f"  - {reason}" for reason in wrong)]))


def _sections(cfg: ConfigContainer | dict) -> Iterator[tuple[str, type, dict]]:
    """Name, class and values of each part of a configuration."""
    if isinstance(cfg, dict):
        for name, part in cfg.items():
            kind = _resolve(str(part["_target_"])) if isinstance(part, dict) and "_target_" in part else None
            if dataclasses.is_dataclass(kind):
                yield name, kind, part
        return
    for field in dataclasses.fields(cfg):
        if dataclasses.is_dataclass(part := getattr(cfg, field.name)):
            yield field.name, type(part), vars(part)


@functools.cache
def _declarations(kind: type) -> dict[str, tuple[object, object]]:
    """Declared type and default of each field; a type that cannot be evaluated allows anything."""
    import typing

    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):
        hints = {}
    return {field.name: (hints.get(field.name, object), field.default) for field in dataclasses.fields(kind)}


def _wrong(name: str, value: object, hint: object, default: object) -> str:
    """Why a field cannot have a value, and what it can have; empty if it can."""
    if hint is object or value is default or (type(value) is type(default) and value == default):
        return ""
    kinds = [*_kinds(hint), *([float] if isinstance(default, float) else [])]
    lowest = _lowest(name, default, is_count=float not in kinds)
    if float in kinds or int in kinds:
        words = (
            f"a {'number' if float in kinds else 'whole number'}{'' if lowest is None else f' of at least {lowest}'}"
        )
    else:
        words = " or ".join(_words(kind) for kind in kinds)
    if not any(_fits(value, kind) for kind in kinds):
        return f"give {words}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return "give a finite number"
    if lowest is not None and value < lowest:
        return f"give {words}"
    return "give a number between 0 and 1" if value > 1 and _SHARE.search(name) else ""


def _lowest(name: str, default: object, *, is_count: bool) -> int | None:
    """The smallest number that a field can have; `None` if negative ones mean something."""
    known = default if isinstance(default, int | float) and not isinstance(default, bool) else None
    if name in _ANY_SIGN or (known is not None and known < 0):
        return None
    optional_interval = known is None and name.endswith("_interval")
    zero = known == 0 and name not in _UNSET_AT_0
    return 0 if not is_count or zero or optional_interval or _ZERO_IS_NONE.search(name) else 1


def _kinds(hint: object) -> list[object]:
    """The alternatives of a declared type."""
    import types
    import typing

    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [kind for inner in typing.get_args(hint) for kind in _kinds(inner)] if is_union else [hint]


def _fits(value: object, kind: object) -> bool:
    """Whether a value is of a declared type that is no union; anything fits where the type is no plain one."""
    import typing

    if typing.get_origin(kind) is typing.Literal:
        return value is None or value in typing.get_args(kind)  # upstream declares a choice and means "or none"
    if typing.get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple)
    if kind is bool:
        return isinstance(value, int)  # a recipe of Bridge's sets one to 100
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind is float or isinstance(value, int) or value >= 1e4)  # recipes write a base as 500000.0
    return isinstance(value, kind) if kind in (str, type(None)) else True


def _words(kind: object) -> str:
    """A declared type for people."""
    import typing

    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    return {bool: "True or False", str: "text", type(None): "None"}.get(kind) or str(kind).removeprefix("typing.")


def _wrong_blends(dataset: dict) -> Iterator[tuple[str, str]]:
    """Each blend of data that cannot be drawn from, and why."""
    for place in ("blend", "blend_per_split"):
        given = dataset.get(place)
        for blend in [given] if place == "blend" else given or []:
            prefixes, weights = (*(blend or ()), None, None)[:2]
            if not prefixes or weights is None:
                continue
            if len(weights) != len(prefixes):
                yield place, f"{len(weights)} weights for {len(prefixes)} prefixes: give one for each"
            elif not all(_fits(weight, float) and 0 <= weight < math.inf for weight in weights) or not sum(weights):
                yield place, f"the weights {list(weights)} share nothing out: give positive numbers"


def as_the_ranks_see_it(cfg: ConfigContainer | dict, device: str) -> ConfigContainer | dict:
    """The configuration with the fields that ranks on this device set; `cfg` itself stays as it is.

    Of a file's content, only the backend is set.
    """
    if isinstance(cfg, dict):
        return cfg | ({"dist": (cfg.get("dist") or {}) | {"distributed_backend": "gloo"}} if device == "cpu" else {})
    from course_lib import devices

    return devices.applied(cfg, device)


def read_file(path: Path) -> dict:
    """A `config.yaml` as nested dicts.

    Raises:
        ConfigError: If it does not exist, is no YAML, or has no `train`, `model` or `dataset`.
    """
    try:
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: give its config.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    sections = content if isinstance(content, dict) else {}
    missing = [name for name in ("train", "model", "dataset") if not isinstance(sections.get(name), dict)]
    if missing:
        raise ConfigError(f"{path} has no section {' and no '.join(missing)}; let ConfigContainer.to_yaml write it")
    return content


def write_config(cfg: ConfigContainer, path: Path, places: dict[str, str | None]) -> None:
    """Write a configuration as `config.yaml`; `cfg` itself stays as it is.

    Args:
        cfg: Bridge's configuration.
        path: The run directory.
        places: Where to `save` checkpoints and from where to `load`; `None` for neither.

    Raises:
        ConfigError: If an access token stands in it; no file is left then.
    """
    mine = changed(
        cfg,
        {f"checkpoint.{field}": value for field, value in places.items()}
        | {"logger.tensorboard_dir": None},  # the run directory records the same numbers
    )
    with files.replacing(path / "config.yaml") as half:
        mine.to_yaml(str(half))
        _refuse_secrets(half)


def write_content(content: dict, path: Path, places: dict[str, str | None]) -> None:
    """Write what a file said, with this run's own places in it, as `write_config` does for a configuration."""
    mine = {name: dict(part) if isinstance(part, dict) else part for name, part in content.items()}
    mine.setdefault("checkpoint", {"_target_": "megatron.bridge.training.config.CheckpointConfig"})
    if isinstance(mine["checkpoint"], dict):  # what is no mapping is for Bridge to refuse
        mine["checkpoint"].update(places)
    if isinstance(mine.get("logger"), dict):
        mine["logger"]["tensorboard_dir"] = None
    with files.replacing(path / "config.yaml") as half:
        half.write_text(yaml.safe_dump(mine, sort_keys=False))
        _refuse_secrets(half)


def _refuse_secrets(half: Path) -> None:
    """Raise while the configuration is not in place yet, if an access token stands in it."""
    if found := secrets(half.read_text()):
        raise ConfigError(
            f"config.yaml would hold an access token ({found[0].removeprefix('text, ')}), and everybody who may read a run "
            "may read that: take it out of cfg, and set it as an environment variable of the process that needs it"
        )


def refuse_foreign_code(content: dict, source: Path) -> None:
    """Refuse a configuration that names other code than the classes and functions that Bridge itself writes.

    `_target_` in a `config.yaml` names what Bridge imports and calls.  Megatron's own guard looks at the beginning of the
    name, which a module's own imports lead past: `torch.os.system` begins with `torch.`.  Here a name must be the name
    that its object has itself, and the object must be of a kind that `ConfigContainer.to_yaml` writes: a dataclass that
    the field above it is declared to hold, a member of an enumeration, a data type, a model's shape as Hugging Face keeps
    it, or an activation, initialisation or layer specification.  Nothing is called to find that out.

    Args:
        content: The file as nested dicts: a `config.yaml`, or a checkpoint's `run_config.yaml`.
        source: The file, for the message.

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
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from _foreign(item, f"{place}[{number}]", declared)
    elif isinstance(node, dict):
        named = "_target_" in node or "_builder_" in node
        owner, problem = _named(node, declared) if named else (None, "")
        if problem:
            yield place, problem
            return
        for key, value in node.items():
            inner = f"{place}.{key}".removeprefix(".")
            by_name = key in _CODE_BY_NAME or str(key).endswith("trust_remote_code")
            # a layer's specification may give its module as [package, name]
            if value and (by_name or (key == "module" and not isinstance(value, dict))):
                yield inner, f"{str(value)[:80]} lets code be run that is not Bridge's"
            elif not (named and key in _SAYS_WHAT):
                yield from _foreign(value, inner, _declared(owner, key) if named else declared)


def _named(node: dict, declared: tuple[type, ...]) -> tuple[object, str]:
    """What a node's `_target_` stands for, and why it is refused; the reason is empty if it is not."""
    import enum

    target, fields = node.get("_target_"), node.keys() - set(_SAYS_WHAT)
    call, partial = node.get("_call_", True), node.get("_partial_", False)
    if not isinstance(target, str) or not isinstance(call, bool) or not isinstance(partial, bool):
        return None, "_target_ must be text, _call_ and _partial_ true or false"
    thing = _resolve(target)
    if thing is None:
        return None, f"{target} is not the own name of a class or function that Bridge writes"
    if "_builder_" in node and not _is_class(_resolve(str(node["_builder_"])), "Builder"):
        return thing, f"{node['_builder_']} is no builder of models"
    if partial or (not call and not fields):
        reference = _is_function(thing, target) or (not partial and (_is_module(thing) or _is_data_type(thing)))
        return (
            thing,
            "" if reference else f"{target} is no data type, activation, initialisation or specification of layers",
        )
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


def _resolve(name: str) -> object:
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
        thing: object = importlib.import_module(module) if _IMPORTABLE.match(module) else sys.modules[module]
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
    specification = module.startswith(_MODELS) and re.search(r"_specs?$", last)
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

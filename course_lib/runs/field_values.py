"""Which values the fields of a configuration can have, as Bridge's own declarations say; others are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from course_lib.runs import foreign_code

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = ["FieldError", "check_fields", "refuse_wrong_values"]


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

_READ_ELSEWHERE = {("scheduler", "max_lr"): ("optimizer", "lr")}
"""Names that recipes set beside the field that is read; harmless as long as both say the same.

Source: megatron-bridge 0.6.2 `recipes/llama/h100/llama3.py`, the recipes for fine-tuning.
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

_ONE_SPEC_FOR_ALL = ("default_layer_spec", "transformer_engine_layer_spec", "transformer_engine_full_layer_spec")
"""Bridge's layer specifications that are one for all layers, of ordinary attention.

Source: megatron-bridge 0.6.2 `models/gpt_provider.py`
"""

_UNREAD_BY_IT = {
    "moe_layer_freq": ("every layer would have experts", "get_gpt_decoder_block_spec"),
    "multi_latent_attention": (
        "attention would be the ordinary one, without positions",
        "get_gpt_decoder_block_spec, on a provider with the sizes of latent attention, such as DeepSeek V2's",
    ),
    "qk_l2_norm": ("queries and keys would not be normalised", "get_gpt_layer_with_transformer_engine_spec"),
    "experimental_attention_variant": (
        "attention would be the ordinary one",
        "get_transformer_block_with_experimental_attention_variant_spec",
    ),
    "heterogeneous_block_specs": (
        "layers would be built alike",
        "get_gpt_heterogeneous_layer_spec, on a heterogeneous provider",
    ),
}
"""Fields that these specifications do not read, what would come of it, and which of Core's specifications reads them."""

_CHOICES = {
    ("model", "normalization"): ("RMSNorm", "LayerNorm"),
    ("model", "moe_router_load_balancing_type"): (
        *("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing", "none"),
        "noaux_tc",
    ),
}
"""Choices that upstream declares as any text; Core takes a name of no balancing that it knows for none at all.  A list
chooses several.

Source: megatron-core 0.19.2 `transformer/transformer_config.py`, `transformer/moe/router.py`; "noaux_tc" is how recipes of
Bridge's name a balance by biases.
"""

_ONE_A_LAYER = ("window_attn_skip_freq", "moe_layer_freq", "no_rope_freq", "linear_attention_freq")
"""Lists with an entry for each layer."""

_YARN = "rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow"
"""What YaRN's positions are computed from, none of which has a default; unset, the others mean something."""


def check_fields(cfg: object) -> None:
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
            part, read = _READ_ELSEWHERE.get((name, extra), (None, None))
            if part and getattr(sections[part], read) != vars(section)[extra]:
                meant.append(f"cfg.{part}.{read}")
            if meant:
                raise FieldError(
                    f"cfg.{name}.{extra} is not a field of {type(section).__name__}. Did you mean {' or '.join(meant)}?"
                )


def refuse_wrong_values(cfg: ConfigContainer | dict) -> None:
    """Refuse values that their fields cannot have, before Megatron meets them late, unclearly or not at all.

    What a field can have is read from Bridge's own declarations.  A value must be of the declared type; upstream's default
    passes always.  A whole number must be at least 1, or at least 0 where the default is 0 or 0 means none; where the
    default is negative, negative numbers mean something.  Other numbers are finite and not negative, and shares at most 1.

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
        for field in [field for section, field in _CHOICES if section == name and values.get(field) is not None]:
            chosen, known = values[field], _CHOICES[name, field]
            if not all(one in known for one in (chosen if isinstance(chosen, list) else [chosen])):
                wrong.append(f"cfg.{name}.{field}={chosen!r}: give one of {', '.join(map(repr, known))}")
        if name == "model":
            wrong += [f"cfg.model.{reason}" for reason in _wrong_layers(values)]
        if name == "dataset":
            wrong += [f"cfg.dataset.{place}: {reason}" for place, reason in _wrong_blends(values)]
    if wrong:
        raise FieldError("\n".join(["this configuration cannot run:", *(f"  - {reason}" for reason in wrong)]))


def _sections(cfg: ConfigContainer | dict) -> Iterator[tuple[str, type, dict]]:
    """Name, class and values of each part of a configuration."""
    if isinstance(cfg, dict):
        for name, part in cfg.items():
            kind = (
                foreign_code.resolve(str(part["_target_"])) if isinstance(part, dict) and "_target_" in part else None
            )
            if dataclasses.is_dataclass(kind):
                yield name, kind, part
        return
    for field in dataclasses.fields(cfg):
        if dataclasses.is_dataclass(part := getattr(cfg, field.name)):
            yield field.name, type(part), vars(part)


def _wrong_layers(model: dict) -> Iterator[str]:
    """What a model's layers would not be, although its fields say so; and fields that do not fit its number of layers."""
    spec, every = model.get("transformer_layer_spec"), model.get("moe_layer_freq")
    path = str(spec.get("_target_")) if isinstance(spec, dict) else getattr(spec, "__name__", "")
    alike = not model.get("num_moe_experts") or every in (None, 1) or (isinstance(every, list) and all(every))
    for field, (otherwise, reader) in _UNREAD_BY_IT.items() if path.rpartition(".")[2] in _ONE_SPEC_FOR_ALL else ():
        if model.get(field) and not (field == "moe_layer_freq" and alike):
            yield (
                f"{field}={model[field]!r}: this model's layer specification is one for all layers and does not read it, so "
                f"{otherwise}: leave it out, or set cfg.model.transformer_layer_spec to a function that returns Core's {reader}"
            )
    for field in _ONE_A_LAYER:
        given, layers = model.get(field), model.get("num_layers")
        if isinstance(given, list) and layers and len(given) != layers:
            yield f"{field}={given!r}: it has {len(given)} entries for {layers} layers: give one for each"
    if model.get("position_embedding_type") == "yarn":
        absent = [f"yarn_{name}" for name in _YARN.split() if model.get(f"yarn_{name}") is None]
        if absent:
            yield f"{absent[0]} is not set, and YaRN's positions need it: set {', '.join(f'cfg.model.{n}' for n in absent)}"


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
        sizes = typing.get_args(kind) if typing.get_origin(kind) is tuple else (..., ...)
        return isinstance(value, list | tuple) and (... in sizes or len(value) == len(sizes))
    if typing.get_origin(kind) is Callable:
        return value is not None
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
    """Each blend of data that cannot be drawn from, and why; and shares that leave nothing to train on.

    Source: megatron-core 0.19.2 `datasets/blended_megatron_dataset_config.py` reads digits and points, whatever is between.
    """
    split = dataset.get("split")
    if dataset.get("blend") and isinstance(split, str):
        number = r"\s*\d*\.?\d+\s*"
        if not re.fullmatch(f"{number}(,{number}){{0,2}}", split) or not float(split.split(",")[0]):
            yield f"split={split!r}", "give the shares of training, validation and test, such as '969,30,1'"
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

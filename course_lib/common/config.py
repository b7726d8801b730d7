"""Configurations as data: read a field, copy with changes, flatten, compare.

Every function takes Bridge's `ConfigContainer`, a part of one, or what `config.yaml` has, nested mappings.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_ABSENT = "(absent)"


__all__ = ["ConfigError", "Fields", "UnknownField", "assign", "changed", "diff", "flatten", "has", "value"]


class ConfigError(ValueError):
    """A `config.yaml` cannot be used."""


class UnknownField(ValueError):
    """A configuration has no field of that name; the message has the nearest names."""


def changed(cfg: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values; nothing that is set on the copy reaches the original.

    Sections are copied however deep, what stands in them (functions, dtypes, process groups) is shared.

    Raises:
        UnknownField: If the configuration lacks one of the fields.

    >>> changed({"model": {"num_layers": 4}, "peft": None}, {"model.num_layers": 2})
    {'model': {'num_layers': 2}, 'peft': None}
    """
    mine = _copied(cfg, {})
    assign(mine, values)
    return mine


def assign(cfg: Any, values: Mapping[str, Any]) -> None:
    """Set fields by dotted name, in place.

    Raises:
        UnknownField: If the configuration lacks one of them; nothing is set then.
    """
    for (holder, name), new in [(_holder(cfg, path), new) for path, new in values.items()]:
        if isinstance(holder, dict):
            holder[name] = new
        else:
            setattr(holder, name, new)


def has(cfg: Any, path: str) -> bool:
    """Whether a configuration has the field of that dotted name."""
    return _found(cfg, path) is not None


def value(cfg: Any, path: str) -> Any:
    """The value of the field of that dotted name.

    Raises:
        UnknownField: If the configuration lacks it.
    """
    holder, name = _holder(cfg, path)
    return _read(holder, name)


def flatten(cfg: Any) -> dict[str, Any]:
    """Every setting under its dotted name; functions, types and dtypes become text, so that two results can be compared.

    >>> flatten({"train": {"train_iters": 10, "sizes": [1, 2]}, "peft": None})
    {'train.train_iters': 10, 'train.sizes': [1, 2], 'peft': None}
    """
    flat: dict[str, Any] = {}
    for name, child in _children(cfg):
        children = dict(_children(child))
        flat |= {f"{name}.{key}": leaf for key, leaf in flatten(children).items()} if children else {name: _leaf(child)}
    return flat


def diff(before: Any, after: Any) -> pd.DataFrame:
    """Which settings differ between two configurations, or what `flatten` made of them: `field, before, after`.

    >>> diff({"train": {"a": 1, "b": 2}}, {"train": {"a": 1, "b": 3}}).values.tolist()
    [['train.b', 2, 3]]
    """
    import pandas as pd

    old, new = flatten(before), flatten(after)
    rows = [
        (name, old.get(name, _ABSENT), new.get(name, _ABSENT))
        for name in {**old, **new}
        if name not in old or name not in new or not _same(old[name], new[name])
    ]
    return pd.DataFrame(rows, columns=["field", "before", "after"], dtype=object)


@dataclass(frozen=True)
class Fields:
    """Reads a field from a `ConfigContainer`, a provider, or mappings of either; what `changed` has by dotted name wins."""

    cfg: Any
    changed: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, cfg: Any) -> Fields:
        """Wrap a configuration, unless it is wrapped already."""
        return cfg if isinstance(cfg, Fields) else cls(cfg)

    @property
    def is_container(self) -> bool:
        """Whether this is a whole configuration, not a model alone."""
        return _read(self.cfg, "model") is not None

    def get(self, section: str, name: str, default: Any = None) -> Any:
        """A field of a section; `default` if either is missing or None."""
        found = _read(self.changed, f"{section}.{name}", _read(_read(self.cfg, section), name))
        return default if found is None else found

    def model(self, name: str, default: Any = None) -> Any:
        """A field of the model; Bridge's newer model configs keep some of them under `transformer`."""
        model = _read(self.cfg, "model") if self.is_container else self.cfg
        given = _read(model, name)
        found = _read(
            self.changed, f"model.{name}", _read(_read(model, "transformer"), name) if given is None else given
        )
        return default if found is None else found

    @property
    def head_channels(self) -> int:
        """Channels of one attention head: the model's `kv_channels`, or its width shared by its heads."""
        return self.model("kv_channels") or self.model("hidden_size", 0) // self.model("num_attention_heads")


def _read(holder: Any, name: str, default: Any = None) -> Any:
    return holder.get(name, default) if isinstance(holder, (dict, Mapping)) else getattr(holder, name, default)


def _has(holder: Any, name: str) -> bool:
    return name in holder if isinstance(holder, Mapping) else hasattr(holder, name)


def _holder(cfg: Any, path: str) -> tuple[Any, str]:
    """Who has the field of a dotted name, and the field's own name."""
    if (found := _found(cfg, path)) is None:
        near = difflib.get_close_matches(path, flatten(cfg), n=3, cutoff=0.5)
        raise UnknownField(
            f"the configuration has no field {path!r}" + (f"; the nearest are {', '.join(near)}" if near else "")
        )
    return found


def _found(cfg: Any, path: str) -> tuple[Any, str] | None:
    holder = cfg
    *parents, name = path.split(".")
    for parent in parents:
        holder = _read(holder, parent)
    if holder is not None and not _has(holder, name) and _has(_read(holder, "transformer"), name):
        holder = _read(holder, "transformer")
    return (holder, name) if holder is not None and _has(holder, name) else None


def _copied(node: Any, copies: dict[int, Any]) -> Any:
    """The tree of sections and lists, copied; a section that stands in two places stays one."""
    if id(node) in copies:
        return copies[id(node)]
    if isinstance(node, list):
        return [_copied(item, copies) for item in node]
    if isinstance(node, Mapping):
        return {name: _copied(child, copies) for name, child in node.items()}
    if isinstance(node, type) or not (is_dataclass(node) or isinstance(node, SimpleNamespace)):
        return node
    mine = copies[id(node)] = copy.copy(node)
    for name, child in vars(mine).items():
        if not name.startswith("_"):  # Bridge's own bookkeeping: process groups, hooks
            object.__setattr__(mine, name, _copied(child, copies))
    return mine


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(name), child) for name, child in node.items())
    elif is_dataclass(node) and not isinstance(node, type):
        for field in fields(node):
            # A leading underscore is Bridge's own bookkeeping (process groups, hooks), not a setting.
            if not field.name.startswith("_"):
                yield field.name, getattr(node, field.name, _ABSENT)


def _leaf(node: Any) -> Any:
    if isinstance(node, list | tuple):
        return [_leaf(item) for item in node]
    if isinstance(node, Enum):
        return node.name
    if isinstance(node, partial):
        return f"partial({_leaf(node.func)}, {[_leaf(item) for item in node.args]}, {node.keywords})"
    if callable(node) and hasattr(node, "__qualname__"):
        return f"{node.__module__}.{node.__qualname__}"
    if type(node).__module__ == "torch":  # torch.float32 and friends, without importing torch
        return str(node)
    return node


def _same(one: Any, other: Any) -> bool:
    """Equality that also tells 1 from True and 1 from 1.0: YAML and Megatron do."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like
        return one is other

"""A run's `config.yaml`: read, or written with the run's own places in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from course_lib.common import files
from course_lib.common.config import ConfigError, changed
from course_lib.runs.credentials import secrets

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


_DEPTH, _VALUES = 100, 1_000_000
"""Far above what any recipe has: the C part of PyYAML read 5,000 levels, and ended the process at 200,000."""


def content_of(path: Path) -> Any:
    """What a YAML file says, as plain values.

    Raises:
        ConfigError: If it is no YAML, is nested deeper than any configuration, or swells beyond a million values when each
            alias becomes what it stands for, as one that contains itself does.
        OSError: If it cannot be read.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the part that is in C takes a quarter of the time
    try:
        text = path.read_text()
        if not _is_of_a_size(yaml.parse(text, Loader=loader)):
            raise ConfigError(
                f"{path} is nested more than {_DEPTH} deep, contains itself, or stands for more than {_VALUES:,} values when "
                "each alias becomes what it stands for: no configuration is like that, let ConfigContainer.to_yaml write it"
            )
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _is_of_a_size(events: Iterable[yaml.Event]) -> bool:
    """Whether YAML stays within both limits, told before anything is made of it."""
    stands_for: dict[str | None, float] = {}  # values below each anchor, without end while it is open
    within: list[tuple[str | None, float]] = []  # anchor of each open collection, and the values before it
    values = 0.0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            stands_for[event.anchor] = math.inf
            within.append((event.anchor, values))
            values = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            stands_for[anchor] = values
            values += before
        elif isinstance(event, yaml.AliasEvent):
            values += stands_for.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            stands_for[event.anchor] = 1
            values += 1
        if len(within) > _DEPTH or values > _VALUES:
            return False
    return True


def read_file(path: Path) -> dict:
    """A `config.yaml` as nested dicts.

    Raises:
        ConfigError: If it does not exist, is refused by `content_of`, or has no `train`, `model` or `dataset`.
    """
    try:
        content = content_of(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: give its config.yaml") from None
    sections = content if isinstance(content, dict) else {}
    missing = [name for name in ("train", "model", "dataset") if not isinstance(sections.get(name), dict)]
    if missing:
        raise ConfigError(f"{path} has no section {' and no '.join(missing)}; let ConfigContainer.to_yaml write it")
    return content


def write_config(cfg: ConfigContainer, path: Path, places: dict[str, str | bool | None]) -> None:
    """Write a configuration as `config.yaml`; `cfg` itself stays as it is.

    Args:
        places: Where to `save` checkpoints and from where to `load`, `None` for neither; other fields of `checkpoint`.

    Raises:
        ConfigError: If an access token stands in it; no file is left then.
    """
    own = _own_places(vars(cfg.profiling) if cfg.profiling else {}, path)
    mine = changed(cfg, {f"checkpoint.{field}": value for field, value in places.items()} | own)
    with files.replacing(path / "config.yaml") as half:
        half.write_text(_as_bridge_writes(mine))
        _refuse_secrets(half)


def _as_bridge_writes(cfg: ConfigContainer) -> str:
    """What `cfg.to_yaml` writes, by the part of PyYAML that is in C: a quarter of the time."""
    from megatron.training.config.yaml_utils import safe_yaml_representers

    with safe_yaml_representers():
        known = {name: getattr(yaml.SafeDumper, name) for name in ("yaml_representers", "yaml_multi_representers")}
        dumper = type("Dumper", (getattr(yaml, "CSafeDumper", yaml.SafeDumper),), known)
        return yaml.dump(cfg.to_dict(), Dumper=dumper, default_flow_style=False)


def write_content(content: dict, path: Path, places: dict[str, str | bool | None]) -> None:
    """Write what a file said, with this run's own places in it, as `write_config` does for a configuration."""
    mine = {name: dict(part) if isinstance(part, dict) else part for name, part in content.items()}
    mine.setdefault("checkpoint", {"_target_": "megatron.bridge.training.config.CheckpointConfig"})
    if isinstance(mine["checkpoint"], dict):  # what is no mapping is for Bridge to refuse
        mine["checkpoint"].update(places)
    profiling = mine.get("profiling")
    for name, place in _own_places(profiling if isinstance(profiling, dict) else {}, path).items():
        section, _, field = name.partition(".")
        if isinstance(mine.get(section), dict):
            mine[section][field] = place
    with files.replacing(path / "config.yaml") as half:
        half.write_text(yaml.safe_dump(mine, sort_keys=False))
        _refuse_secrets(half)


def write_data(config: Mapping[str, Any], path: Path) -> None:
    """Write the configuration of a trainer that is not Bridge, as data.

    Raises:
        ConfigError: If it holds something else than text, numbers, lists and mappings, or an access token.
    """
    content = _data(config, "")
    with files.replacing(path / "config.yaml") as half:
        half.write_text(yaml.safe_dump(content, sort_keys=False))
        _refuse_secrets(half)


def _data(value: object, place: str) -> object:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {str(name): _data(inner, f"{place}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_data(inner, f"{place}[{number}]") for number, inner in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or type(value) in (str, int, float, bool):
        return value
    kind = type(value).__name__
    raise ConfigError(f"{place or 'config'} is of type {kind}, which config.yaml cannot hold: give text or a number")


def _own_places(profiling: Mapping[str, Any], path: Path) -> dict[str, str | None]:
    """Where a run's files go beside its checkpoints, by field: into its own directory, and nowhere else.

    The directory records what TensorBoard would, so there is no folder for that; but PyTorch's profiler writes its trace
    beside it.  Source: megatron-bridge 0.6.2 `training/profiling.py`, `training/config.py` (a snapshot goes to /nemo_run).
    """
    traced = profiling.get("use_pytorch_profiler")
    places = {"logger.tensorboard_dir": str(path / "tensorboard") if traced else None}
    return places | ({"profiling.memory_snapshot_path": str(path / "snapshot.pickle")} if profiling else {})


def _refuse_secrets(half: Path) -> None:
    """Raise while the configuration is not in place yet, if an access token stands in it."""
    if found := secrets(half.read_text()):
        raise ConfigError(
            f"config.yaml would hold an access token ({found[0].removeprefix('text, ')}), and everybody who may read a run "
            "may read that: take it out of cfg, and set it as an environment variable of the process that needs it"
        )

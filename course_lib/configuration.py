"""A run's configuration on its way to `config.yaml`: read, refused, or written with the run's own places in it."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from course_lib import files
from course_lib.credentials import secrets
from course_lib.runs import ConfigError

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = ["FieldError", "as_the_ranks_see_it", "read_file", "refuse_unknown_fields", "write_config", "write_content"]


class FieldError(ValueError):
    """The configuration carries a name that Bridge does not know."""


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
            if extra.startswith("_") or hasattr(type(section), extra):
                continue
            # Recipes leave a few harmless names of their own; a name that lives elsewhere, or nearly here, is a slip.
            meant = [f"cfg.{other}.{extra}" for other in sections if extra in fields[other]]
            meant += [f"cfg.{name}.{close}" for close in difflib.get_close_matches(extra, fields[name], 1, 0.85)]
            if meant:
                raise FieldError(
                    f"cfg.{name}.{extra} is not a field of {type(section).__name__}. Did you mean {' or '.join(meant)}?"
                )


def as_the_ranks_see_it(cfg: ConfigContainer, device: str) -> ConfigContainer:
    """The configuration with the CPU's fields where the ranks will have no GPU; `cfg` itself stays as it is."""
    if device == "cuda":
        return cfg
    from course_lib import devices

    return devices.applied(cfg)


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
    mine = copy.copy(cfg)
    mine.checkpoint, mine.logger = copy.copy(cfg.checkpoint), copy.copy(cfg.logger)
    mine.checkpoint.save, mine.checkpoint.load = places["save"], places["load"]
    mine.logger.tensorboard_dir = None  # the run directory records the same numbers
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

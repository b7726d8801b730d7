"""A run's `config.yaml`: read, or written with the run's own places in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from course_lib.common import files
from course_lib.common.config import ConfigError, changed
from course_lib.runs.credentials import secrets

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = ["read_file", "write_config", "write_content"]


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

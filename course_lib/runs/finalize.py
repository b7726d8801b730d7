"""What upstream refuses: its own last checks of a configuration, made on a copy before there are ranks."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from course_lib import stack
from course_lib.common.config import ConfigError, changed, value
from course_lib.common.project import environment_kept
from course_lib.stack import devices, patches
from course_lib.stack.patches import Patches

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

_SHOWN = 3
"""How many changes a refusal proposes."""

_SET_BY_LAUNCH = ("checkpoint.save", "checkpoint.load")


def refuse(cfg: ConfigContainer, *, ranks: int, device: str) -> None:
    """Stop a run whose ranks would stop in Bridge's `runtime_config_update`, which `pretrain()` begins with.

    It finalizes every section and holds them against each other; what it sets is set on a copy.  The changes that are
    proposed are fields named in upstream's words, else any that are off their default, and each of them passes.

    Where Transformer Engine is absent, a run for a node that has it is checked as CPU ranks would have it: whatever needs
    Transformer Engine is switched off there.

    Raises:
        ConfigError: Upstream's words, where they stand, and what passes instead.

    Source: megatron-bridge training/pretrain.py, training/config.py @ 0.6.2
    """
    if "transformer_engine" in stack.missing_modules():
        device = "cpu"
    error = _refusal(cfg, ranks, device)
    if error is None:
        return
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split()) or f"{type(error).__name__} at `{place.line}`"
    where = f"{place.filename.rpartition('site-packages/')[2]}:{place.lineno}"
    text = f"Megatron refuses this configuration: {words} ({where})"
    named, mends = _mends(cfg, ranks, device, f"{words} {place.line}")
    if named:
        text += f". It is about {', '.join(f'cfg.{path}={value(cfg, path)!r}' for path in named)}"
    if mends:
        text += f". What to do: {' or '.join(f'set cfg.{path} = {new!r}' for path, new in mends)}"
    if variables := sorted(set(re.findall(r"os\.getenv\(\W([A-Z_]+)", place.line or ""))):
        text += f". A variable of the ranks' environment goes into cfg.env_vars: {', '.join(variables)}"
    raise ConfigError(text)


def _refusal(cfg: ConfigContainer, ranks: int, device: str) -> Exception | None:
    """What upstream raises on a copy of this configuration as the ranks would have it."""
    from megatron.bridge.training.config import runtime_config_update

    mine = devices.applied(cfg, device)
    try:
        with (
            environment_kept(),
            stack.quietly("megatron", "root", below=logging.CRITICAL, messages=("",)),
            patches.applied(_elsewhere(ranks, device)),
        ):
            runtime_config_update(mine)
    except Exception as error:
        return error
    return None


def _elsewhere(ranks: int, device: str) -> Patches:
    """What the checks would ask of a rank, or set in one."""
    mine = Patches()
    mine.sets(lambda: ranks, "megatron.bridge.training.config.get_world_size_safe", why="there are no ranks yet")
    mine.sets(lambda *_, **__: None, "torch.use_deterministic_algorithms", why="it is for the ranks")
    if device == "cuda":
        mine.sets(
            lambda _: None,
            "megatron.bridge.training.config.validate_flex_dispatcher_backend",
            why="it looks at this process's GPU, which a kernel leaves alone and another node has",
        )
    return mine


def _mends(cfg: ConfigContainer, ranks: int, device: str, words: str) -> tuple[list[str], list[tuple[str, object]]]:
    """The fields that upstream's words name, and single changes with which it refuses nothing."""
    spoken = {word.replace("-", "_") for word in re.findall(r"\w+(?:[-_]\w+)+|(?<=self\.)\w+|(?<=--)\w+", words)}
    set_by_the_device = {each.field for each in devices.differences(cfg, device)}
    named, others = {}, {}
    for path, now, default in _plain_fields(cfg):
        news = [default] if _is_plain(default) and default != now else []
        if path in (*set_by_the_device, *_SET_BY_LAUNCH):
            continue
        if path.rpartition(".")[2] in spoken:
            named[path] = [not now] if isinstance(now, bool) else news
        else:
            others[path] = news
    for choices in (named, others):
        tried = ((path, new) for path, news in choices.items() for new in news)
        passing = (each for each in tried if _refusal(changed(cfg, dict([each])), ranks, device) is None)
        if mends := list(itertools.islice(passing, _SHOWN)):
            return list(named), mends
    return list(named), []


def _plain_fields(cfg: ConfigContainer) -> Iterator[tuple[str, object, object]]:
    """Dotted name, value and default of each field whose value a person can type."""
    for section in dataclasses.fields(cfg):
        part = getattr(cfg, section.name)
        for holder in (part, getattr(part, "transformer", None)):
            for field in dataclasses.fields(holder) if dataclasses.is_dataclass(holder) else ():
                make = field.default_factory
                default = field.default if make is dataclasses.MISSING else make()
                if _is_plain(now := getattr(holder, field.name)):
                    yield f"{section.name}.{field.name}", now, default


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)

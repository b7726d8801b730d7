"""The nano3 blueprint as data: its four stages, and where its documents, the installed recipe and its YAML differ.

The tables are facts that the course read and wrote down, each with repository, path and version.  What the installed
packages say is not in the table alone: `installed` computes it, so that an upgrade that changes a fact is noticed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import recipes
from course_lib.common.project import DATA
from course_lib.recipes import catalogue

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NANO", "NANO_4B", "Difference", "columns", "differences", "in_trl", "installed", "load", "stages"]

NANO = "nemotronh.h100.nemotron_3_nano:nemotron_3_nano_pretrain_8gpu_h100_bf16_config"
NANO_4B = "nemotronh.h100.nemotron_3_nano_4b:nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config"
_ROOT = "megatron.bridge.recipes."


@dataclass(frozen=True)
class Difference:
    """One thing of which three sources speak: NVIDIA's documents, the installed recipe, and the YAML or script of a stage.

    Attributes:
        reported: What the documents say of the run, with `says` and `source`, or None.
        yaml: What the YAML or the script of the stage says, in the same form, or None.
        installed: What `installed` computed at the pinned versions; None where nothing here can.
        verdict: `two runs` where the recipe is no copy of the reported run, `stale` where a document or a YAML was left
            behind, `same` where both mean one thing, `undecided`, or `exercise` where the learner decides.
        lesson: Whether lesson 02 shows it.
        loses: What somebody meets who believes the wrong source; empty where no lesson shows it.
        pages: Numbers of the lessons that state it.
    """

    id: str
    topic: str
    reported: dict[str, str] | None
    yaml: dict[str, str] | None
    installed: str | None
    verdict: str
    lesson: bool
    loses: str
    pages: list[str]


def stages(*, directory: Path = DATA) -> pd.DataFrame:
    """What each stage of nano3 runs, reads and writes: a row a key, with the values of `default` and `tiny` and their files."""
    import pandas as pd

    data = json.loads((directory / "nano3_stages.json").read_text(encoding="utf-8"))
    return pd.DataFrame(data["rows"], dtype=object)


def in_trl(*, directory: Path = DATA) -> pd.DataFrame:
    """Settings of nano3's stage 2 beside TRL's arguments: names to values in both, how far they agree, and what they do."""
    import pandas as pd

    data = json.loads((directory / "nano3_rl_keys.json").read_text(encoding="utf-8"))
    return pd.DataFrame(data["rows"], columns=["keys", "trl", "agrees", "says"])


def differences(*, directory: Path = DATA) -> tuple[Difference, ...]:
    """Where nano3's documents, the installed recipe and the YAML differ.

    >>> sum(row.lesson for row in differences())
    8
    """
    data = json.loads((directory / "nano3_differences.json").read_text(encoding="utf-8"))
    return tuple(Difference(**row) for row in data["rows"])


def columns(cfg: Any, *, lesson: str = "02") -> pd.DataFrame:
    """The rows of a lesson: the reported run, the recipe that you get, the YAML, and what they come to.

    Args:
        cfg: The installed recipe of Nemotron 3 Nano; its column is computed from it.
    """
    import pandas as pd

    def says(claim: dict[str, str] | None) -> str:
        return claim["says"] if claim else ""

    rows = [
        (
            row.topic,
            says(row.reported),
            installed(row, cfg) if row.installed else "",
            says(row.yaml),
            row.verdict,
            row.loses,
        )
        for row in differences()
        if lesson in row.pages
    ]
    return pd.DataFrame(
        rows, columns=["about", "the reported run", "the recipe you get", "the YAML", "verdict", "costs you"]
    )


def load(path: str) -> Any:
    """Call a recipe without the Hub.

    Args:
        path: `module:function` below `megatron.bridge.recipes`, as `catalogue.Entry.path`.

    Returns:
        Bridge's `ConfigContainer`.

    Raises:
        recipes.UnknownModel: If the recipe wants a shape that is not in `data/models`; it names the file.
    """
    module, function = path.split(":")
    with recipes.offline():
        return getattr(importlib.import_module(_ROOT + module), function)()


def installed(row: Difference, cfg: Any) -> str:
    """Compute what the installed packages say about one of `differences()`.

    Args:
        cfg: The installed recipe of Nemotron 3 Nano.

    Returns:
        Text that equals `row.installed` as long as upstream does not change.

    Raises:
        KeyError: If nothing here computes it; the message has the row's verdict.
    """
    if row.id not in _COMPUTED:
        raise KeyError(f"{row.id!r} cannot be computed from the installed packages: its verdict is {row.verdict!r}")
    return _COMPUTED[row.id](cfg)


def _sizes(cfg: Any) -> str:
    return f"TP={cfg.model.tensor_model_parallel_size} EP={cfg.model.expert_model_parallel_size}"


def _order(cfg: Any) -> str:
    pattern = cfg.model.hybrid_layer_pattern
    return f"{pattern.count('M')} M, {pattern.count('E')} E, {pattern.count('*')} *; 'MM' occurs {pattern.count('MM')} times"


def _warm_up(cfg: Any) -> str:
    steps, batch, tokens = cfg.scheduler.lr_warmup_iters, cfg.train.global_batch_size, cfg.model.seq_length
    return f"{steps * batch * tokens / 1e9:.1f} billion tokens in {steps} steps of {batch} x {tokens}"


def _tiny_model(_: Any) -> str:
    entry = next(e for e in catalogue.entries() if e.name.startswith("qwen3_8b_pretrain"))
    return f"asks the Hub for {entry.asks_hub_for}"


def _arguments(_: Any) -> str:
    module, function = NANO.split(":")
    signature = inspect.signature(getattr(importlib.import_module(_ROOT + module), function))
    return f"{len(signature.parameters)} arguments"


def _fine_tuning(_: Any) -> str:
    module = importlib.import_module(f"{_ROOT}nemotronh.nemotron_3_nano")
    found = {kind: hasattr(module, f"nemotron_3_nano_{kind}_config") for kind in ("finetune", "sft")}
    return ", ".join(f"{kind}: {'present' if there else 'absent'}" for kind, there in found.items())


def _fallback(_: Any) -> str:
    return f"{sum('nemotron_next_3b_v2' in entry.name for entry in catalogue.entries())} of the installed recipes"


def _packing(_: Any) -> str:
    names = ("megatron.bridge.data.datasets.packed_sequence", "megatron.bridge.data.packing")
    found = ["absent" if importlib.util.find_spec(name) is None else "present" for name in names]
    return f"first: {found[0]}, second: {found[1]}"


def _data_class(_: Any) -> str:
    from megatron.bridge.data.builders import gpt_sft

    old = gpt_sft.FinetuningDatasetConfig
    said = re.search(r"is deprecated; use [\w.]*\.(\w+) instead", inspect.getsource(old.__post_init__))
    return f"deprecated, use {said[1]}" if said else "not deprecated"


def _packed_fields(_: Any) -> str:
    from megatron.bridge.data.builders import GPTSFTDatasetConfig

    return ", ".join(field.name for field in dataclasses.fields(GPTSFTDatasetConfig) if "pack" in field.name)


def _shared(cfg: Any) -> str:
    width, routed = cfg.model.moe_shared_expert_intermediate_size, cfg.model.moe_ffn_hidden_size
    return f"one of width {width} = {width // routed} x {routed}"


_COMPUTED: dict[str, Callable[[Any], str]] = {
    "layout": _sizes,
    "experts": lambda cfg: f"{cfg.model.num_moe_experts} experts, top {cfg.model.moe_router_topk}",
    "depth": lambda cfg: f"{cfg.model.num_layers} layers, width {cfg.model.hidden_size}",
    "sequence": lambda cfg: f"{cfg.model.seq_length} tokens",
    "schedule": lambda cfg: f"peak {cfg.optimizer.lr}, {cfg.scheduler.lr_decay_style}",
    "aux-loss": lambda cfg: (
        f"{cfg.model.moe_router_load_balancing_type} x {cfg.model.moe_aux_loss_coeff}, "
        f"expert bias {cfg.model.moe_router_enable_expert_bias}"
    ),
    "order": _order,
    "tiny-model": _tiny_model,
    "arguments": _arguments,
    "fine-tuning": _fine_tuning,
    "fallback": _fallback,
    "packing": _packing,
    "width": lambda cfg: f"{cfg.model.hidden_size} = {cfg.model.hidden_size // 1344} x 1344",
    "warm-up": _warm_up,
    "shared-expert": _shared,
    "dataset-class": _data_class,
    "packed-specs": _packed_fields,
}

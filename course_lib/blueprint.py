"""The nano3 blueprint as data: its four stages, and where its documents, YAML and code disagree.

The tables are facts that the course read and wrote down, each with repository, path and version.  What a contradiction
comes to is not in the table alone: `decide` computes the evidence from the installed packages, so that an upgrade that
changes a fact is noticed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import catalogue, recipes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["NANO", "NANO_4B", "Contradiction", "contradictions", "decide", "load", "road", "stages"]

NANO = "nemotronh.h100.nemotron_3_nano:nemotron_3_nano_pretrain_8gpu_h100_bf16_config"
NANO_4B = "nemotronh.h100.nemotron_3_nano_4b:nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config"
_DATA = Path(__file__).resolve().parent.parent / "data"
_ROOT = "megatron.bridge.recipes."
_MAMBA = ("hybrid_layer_pattern", "mamba_num_heads", "position_embedding_type")
_CURRICULUM = ("train.train_iters", "train.global_batch_size", "optimizer.lr", "scheduler.lr_warmup_iters")


@dataclass(frozen=True)
class Contradiction:
    """Two claims about one thing.

    Attributes:
        id: Short name.
        topic: What both are about.
        claim_a: The one, with `source_a`: path and version.
        claim_b: The other, with `source_b`.
        verdict: `a`, `b`, `both`, `neither`, `undecided`, or `exercise` where the learner decides.
        evidence: What `decide` computed at the pinned versions.
        pages: Numbers of the lessons that state it.
    """

    id: str
    topic: str
    claim_a: str
    source_a: str
    claim_b: str
    source_b: str
    verdict: str
    evidence: str
    pages: list[str]


def stages(*, directory: Path = _DATA) -> pd.DataFrame:
    """What each stage of nano3 runs, reads and writes: a row a key, with the values of `default` and `tiny` and their files."""
    import pandas as pd

    data = json.loads((directory / "nano3_stages.json").read_text(encoding="utf-8"))
    return pd.DataFrame(data["rows"], dtype=object)


def contradictions(*, directory: Path = _DATA) -> tuple[Contradiction, ...]:
    """Where nano3's documents, YAML and code disagree.

    >>> len(contradictions()) >= 12
    True
    """
    data = json.loads((directory / "nano3_contradictions.json").read_text(encoding="utf-8"))
    return tuple(Contradiction(**row) for row in data["rows"])


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


def decide(contradiction: Contradiction, cfg: Any) -> str:
    """Compute what the installed packages say about a contradiction.

    Args:
        contradiction: One of `contradictions()`.
        cfg: The installed recipe of Nemotron 3 Nano.

    Returns:
        The evidence as text; equal to `contradiction.evidence` as long as upstream does not change.

    Raises:
        KeyError: If nothing here decides it; the message names what does.
    """
    if contradiction.id not in _DECIDERS:
        raise KeyError(f"{contradiction.id!r} is not decided by computing: its verdict is {contradiction.verdict!r}")
    return _DECIDERS[contradiction.id](cfg)


def road(nano: Any, hybrid: Any, dense: Any) -> pd.DataFrame:
    """What each step from Nemotron 3 Nano to a small dense model takes away, as differences of recipes.

    Args:
        nano: The 30B recipe, hybrid and with experts.
        hybrid: The 4B recipe, hybrid and without experts.
        dense: The 1B Llama recipe.

    Returns:
        One row a step: what goes, between which recipes, how many settings about it differ, and the telling ones.
    """
    import pandas as pd

    rows = []
    for what, between, before, after, about, shown in (
        ("experts", "30B to 4B", nano, hybrid, ("moe", "expert"), ("num_moe_experts", "expert_model_parallel_size")),
        ("Mamba layers", "4B to 1B", hybrid, dense, ("mamba", "hybrid", "position_embedding"), _MAMBA),
        ("scale", "30B to 1B", nano, dense, ("num_", "hidden_size", "parallel_size"), ("num_layers", "hidden_size")),
        ("curriculum", "30B to 1B", nano, dense, ("train.", "scheduler.", "optimizer.", "dataset."), _CURRICULUM),
    ):
        found = recipes.diff(before, after)
        found = found[found.field.map(lambda name, about=about: any(word in name for word in about))]
        values = found.set_index("field")
        names = [
            name
            for name in (f"model.{short}" if "." not in short else short for short in shown)
            if name in values.index
        ]
        text = "; ".join(f"{name}: {values.loc[name, 'before']} -> {values.loc[name, 'after']}" for name in names)
        rows.append((what, between, len(found), text))
    return pd.DataFrame(rows, columns=["what goes", "between", "settings that differ", "among them"])


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


def _shared(cfg: Any) -> str:
    width, routed = cfg.model.moe_shared_expert_intermediate_size, cfg.model.moe_ffn_hidden_size
    return f"one of width {width} = {width // routed} x {routed}"


_DECIDERS: dict[str, Callable[[Any], str]] = {
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
}

"""NVIDIA's recipes as data: flatten one, describe it, compare two, make one small.

``offline()`` lets a recipe be called without the Hub, from the facts about models in ``data/models``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common.config import assign, diff, flatten
from course_lib.common.project import DATA
from course_lib.stack.patches import Patches, applied

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ModelFacts", "UnknownModel", "describe", "diff", "flatten", "known_models", "offline", "shrink"]

_HEADLINES = (
    "model.num_layers",
    "model.hybrid_layer_pattern",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.num_moe_experts",
    "model.moe_router_topk",
    "model.seq_length",
    "model.vocab_size",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "train.train_iters",
    "train.global_batch_size",
    "train.micro_batch_size",
    "optimizer.lr",
    "optimizer.min_lr",
    "scheduler.lr_decay_style",
    "scheduler.lr_warmup_iters",
    "mixed_precision",
    "tokenizer.tokenizer_type",
    "tokenizer.tokenizer_model",
)


_TIED = {"seq_length": "dataset.seq_length", "vocab_size": "tokenizer.vocab_size"}
_ONE_A_LAYER = ("moe_layer_freq", "window_attn_skip_freq", "linear_attention_freq", "no_rope_freq")


def describe(cfg: Any) -> pd.DataFrame:
    """The settings that a reader asks for first, of a configuration of some 800.

    Args:
        cfg: A Bridge ``ConfigContainer`` or nested mappings.

    Returns:
        Columns ``field`` and ``value``; fields that the configuration lacks, or that are None, are left out.

    >>> describe({"train": {"train_iters": 10}, "model": {"num_layers": 4, "vocab_size": None}}).values.tolist()
    [['model.num_layers', 4], ['train.train_iters', 10]]
    """
    import pandas as pd

    flat = flatten(cfg)
    rows = [(name, flat[name]) for name in _HEADLINES if flat.get(name) is not None]
    return pd.DataFrame(rows, columns=["field", "value"], dtype=object)


def shrink(cfg: Any, **sizes: Any) -> pd.DataFrame:
    """Make the model of a recipe small, in place, keeping the settings equal that Bridge wants equal.

    A keyword is a field of the model, such as `num_layers=2`; one that is None stays as it is.  `seq_length` is set on the
    data too, and `vocab_size` on the tokenizer; `kv_channels`, which a recipe fixes at the head size of the big model,
    becomes hidden size / heads; `hybrid_layer_pattern` brings its number of layers along, as Core counts them; with
    `num_layers`, lists with an entry a layer keep their beginning, and a plan of pipeline stages, which names every layer,
    is dropped.

    Returns:
        The settings that changed, as `diff` shows them.

    Raises:
        ValueError: If the sizes do not fit each other or the model, or it has no such field; nothing is changed then.
    """
    model, sizes = cfg.model, {name: value for name, value in sizes.items() if value is not None}
    hidden, heads, groups = (
        sizes.get(name, getattr(model, name)) for name in ("hidden_size", "num_attention_heads", "num_query_groups")
    )
    pattern, layers = getattr(model, "hybrid_layer_pattern", None), sizes.get("num_layers")
    experts, chosen = (sizes.get(name, getattr(model, name, None)) for name in ("num_moe_experts", "moe_router_topk"))
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}: change one of them")
    if heads % (groups or heads):
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}: change one")
    if pattern and layers is not None:
        raise ValueError(f"the layers are those of the pattern {pattern}: give hybrid_layer_pattern, not num_layers")
    if "hybrid_layer_pattern" in sizes and not pattern:
        raise ValueError("the model has no layer pattern: give num_layers, not hybrid_layer_pattern")
    if "num_moe_experts" in sizes and not model.num_moe_experts:
        raise ValueError(f"num_moe_experts={experts} does not fit, because the model has no experts")
    if experts and sizes.keys() & {"num_moe_experts", "moe_router_topk"} and experts < chosen:
        raise ValueError(f"num_moe_experts={experts} does not fit, because a token chooses {chosen} experts")
    values = {f"model.{name}": value for name, value in sizes.items()}
    values |= {_TIED[name]: value for name, value in sizes.items() if name in _TIED}
    if "hybrid_layer_pattern" in sizes:
        from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count

        values["model.num_layers"] = get_hybrid_total_layer_count(sizes["hybrid_layer_pattern"])
    if sizes.keys() & {"hidden_size", "num_attention_heads"}:
        values.setdefault("model.kv_channels", hidden // heads)
    if layers is not None:
        if getattr(model, "pipeline_model_parallel_layout", None):
            values["model.pipeline_model_parallel_layout"] = None
        lists = {name: getattr(model, name, None) for name in _ONE_A_LAYER}
        values |= {f"model.{name}": each[:layers] for name, each in lists.items() if isinstance(each, list)}
    before = flatten(cfg)
    assign(cfg, values)
    return diff(before, cfg)


_MODELS = DATA / "models"


class UnknownModel(ValueError):
    """A recipe asked for a model whose values are not in ``data/models``."""


@dataclass(frozen=True)
class ModelFacts:
    """The shape of one model, kept in the project with its source."""

    model_id: str
    config: dict[str, Any]
    source: dict[str, Any]
    path: Path


def known_models(*, directory: Path = _MODELS) -> dict[str, ModelFacts]:
    """Which models can be built without the Hub?

    Args:
        directory: Where the ``*.json`` files are.

    Returns:
        The facts by model id.

    Raises:
        ValueError: If a file lacks a key or two files claim one id.

    >>> known_models()["meta-llama/Llama-3.2-1B"].config["num_hidden_layers"]
    16
    """
    found: dict[str, ModelFacts] = {}
    for path in sorted(directory.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in ("model_id", "config", "source") if key not in data]:
            raise ValueError(f"{path} has no {' and no '.join(missing)}: see data/README.md for the three keys")
        facts = ModelFacts(data["model_id"], data["config"], data["source"], path)
        if facts.model_id in found:
            raise ValueError(f"{path} and {found[facts.model_id].path} both describe {facts.model_id}: remove one")
        found[facts.model_id] = facts
    return found


@contextmanager
def offline() -> Iterator[None]:
    """Answer questions for a model's configuration from ``data/models`` instead of the Hub, inside this block only.

    Recipes ask through ``AutoBridge.from_hf_pretrained``, two of them through ``AutoConfig.from_pretrained``; one that asks
    in another way finds the Hub's own client offline, whatever was imported before.  A path to a local directory still goes
    to Bridge.  Weights are never made up: asking for them fails in Bridge.

    Raises:
        UnknownModel: By the recipe inside, if it asks for a model that has no file.

    Example::

        with recipes.offline():
            cfg = llama32_1b_pretrain_config()

    Source: megatron-bridge 0.6.2 ``models/conversion/auto_bridge.py``, ``from_hf_pretrained`` and ``from_hf_config``.
    """
    from transformers import AutoConfig

    known, mine, why = known_models(), Patches(), "the Hub cannot be asked"
    mine.sets(True, "huggingface_hub.constants.HF_HUB_OFFLINE", why=why)  # which it read when it was imported

    @mine.replaces("transformers.AutoConfig.from_pretrained", why=why)
    def config_from_facts(original: Any, cls: type, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        if Path(pretrained_model_name_or_path).is_dir():
            return original(cls, pretrained_model_name_or_path, **kwargs)
        facts = _facts(str(pretrained_model_name_or_path), known)
        values = dict(facts.config)
        made = AutoConfig.for_model(values.pop("model_type"), **values)
        made.name_or_path = facts.model_id  # Bridge keeps it as hf_model_id, as if the Hub had answered
        return made

    @mine.replaces("megatron.bridge.AutoBridge.from_hf_pretrained", why=why)
    def bridge_from_facts(original: Any, cls: type, path: str | Path, **kwargs: Any) -> Any:
        if Path(path).is_dir():
            return original(cls, path, **kwargs)
        return cls.from_hf_config(AutoConfig.from_pretrained(path))

    with applied(mine):
        yield


def _facts(model_id: str, known: dict[str, ModelFacts]) -> ModelFacts:
    if model_id not in known:
        name = model_id.rsplit("/", 1)[-1].lower().replace(".", "").replace("-", "_")
        raise UnknownModel(
            f"no values for {model_id!r} in {_MODELS}, which describes {len(known)} models: the recipe wants "
            f'config.json of that model. Write {name}.json there with "model_id": "{model_id}" (see data/README.md), '
            "or call the recipe outside recipes.offline() with a network and, for a gated model, a Hugging Face login"
        )
    return known[model_id]

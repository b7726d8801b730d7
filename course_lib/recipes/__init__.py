"""NVIDIA's recipes as data: flatten one, describe it, compare two, make one small.

``offline()`` lets a recipe be called without the Hub; it and the closed forms are kept in modules of their own
(:mod:`.model_facts`) and offered here, because a lesson needs them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from course_lib.common.config import diff, flatten
from course_lib.recipes.model_facts import ModelFacts, UnknownModel, known_models, offline

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ModelFacts",
    "UnknownModel",
    "describe",
    "diff",
    "flatten",
    "known_models",
    "offline",
    "shrink",
]

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


def shrink(
    cfg: Any,
    *,
    num_layers: int | None = None,
    hybrid_layer_pattern: str | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    ffn_hidden_size: int | None = None,
    num_moe_experts: int | None = None,
    seq_length: int | None = None,
    vocab_size: int | None = None,
) -> pd.DataFrame:
    """Make the model of a recipe small, in place, keeping the settings equal that Bridge wants equal.

    ``seq_length`` is set on the model and on the data; ``vocab_size`` on the model and on the tokenizer;
    ``kv_channels``, which a recipe fixes at the head size of the big model, becomes hidden size / heads;
    ``hybrid_layer_pattern`` brings its number of layers along; with ``num_layers``, lists with an entry a layer keep
    their beginning, and a plan of pipeline stages, which names every layer, is dropped.

    Args:
        cfg: A Bridge ``ConfigContainer``.
        num_layers: Transformer layers, of a model without a layer pattern.
        hybrid_layer_pattern: One letter a layer, of a model that has a pattern.
        hidden_size: Width of the residual stream.
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads.
        ffn_hidden_size: Width of the feed-forward layer.
        num_moe_experts: Routed experts of a layer, of a model that has them.
        seq_length: Tokens in a sequence.
        vocab_size: Ids of the tokenizer.

    Returns:
        The settings that changed, as :func:`diff` shows them.

    Raises:
        ValueError: If the sizes do not fit each other or the model; nothing is changed then.
    """
    model, before = cfg.model, flatten(cfg)
    hidden, heads = hidden_size or model.hidden_size, num_attention_heads or model.num_attention_heads
    groups = num_query_groups or model.num_query_groups or heads
    pattern, experts = getattr(model, "hybrid_layer_pattern", None), getattr(model, "num_moe_experts", None)
    chosen = getattr(model, "moe_router_topk", 1)
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}: change one of them")
    if heads % groups:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}: change one")
    if pattern and num_layers is not None:
        raise ValueError(f"the layers are those of the pattern {pattern}: give hybrid_layer_pattern, not num_layers")
    if hybrid_layer_pattern and not pattern:
        raise ValueError("the model has no layer pattern: give num_layers, not hybrid_layer_pattern")
    if num_moe_experts is not None and (not experts or num_moe_experts < chosen):
        kept = f"a token chooses {chosen} experts" if experts else "the model has no experts"
        raise ValueError(f"num_moe_experts={num_moe_experts} does not fit, because {kept}")
    given = {
        "num_layers": len(hybrid_layer_pattern) if hybrid_layer_pattern else num_layers,
        "hybrid_layer_pattern": hybrid_layer_pattern,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "ffn_hidden_size": ffn_hidden_size,
        "num_moe_experts": num_moe_experts,
        "seq_length": seq_length,
        "vocab_size": vocab_size,
        "kv_channels": hidden // heads if hidden_size or num_attention_heads else None,
    }
    for name, value in given.items():
        if value is not None:
            setattr(model, name, value)
    if num_layers is not None:
        model.pipeline_model_parallel_layout = None
        for name in ("moe_layer_freq", "window_attn_skip_freq", "linear_attention_freq", "no_rope_freq"):
            if isinstance(getattr(model, name, None), list):
                setattr(model, name, getattr(model, name)[:num_layers])
    if seq_length is not None:
        cfg.dataset.seq_length = seq_length
    if vocab_size is not None:
        cfg.tokenizer.vocab_size = vocab_size
    return diff(before, cfg)

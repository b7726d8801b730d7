"""Closed forms about a dense model: how many parameters it has, and what it loses before it has learnt anything."""

from __future__ import annotations

import math
from typing import Any

from course_lib.layout_sizes import Fields

__all__ = ["initial_loss", "parameter_count"]


def parameter_count(model: Any, *, vocab_size: int | None = None) -> int:
    """How many parameters has a dense model shaped like Llama or Qwen (RMSNorm, rotary positions)?

    With hidden size h, heads of c channels, a query heads, g key-value heads, feed-forward width f, L layers, V rows::

        V h  +  L (h c (2 a + 2 g)  +  3 h f  +  2 h)  +  h  [+ V h if input and output embeddings differ]

    (2 h f instead of 3 h f without a gate; c (a + 2 g) more in a layer whose projections to queries, keys and values
    have biases, as in Qwen 2; 2 c more in one that normalises queries and keys, as in Qwen 3.)

    Args:
        model: A Bridge model provider, a ``ConfigContainer``, or a mapping with Megatron's field names.
        vocab_size: Rows of the embedding, padded already (``layout.padded_vocab_size``); default the model's.

    Returns:
        The number of parameters, each counted once however many ranks hold it.

    Raises:
        ValueError: If the model has parts that this formula does not count.

    >>> llama = dict(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=8192)
    >>> llama |= dict(normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False)
    >>> llama |= dict(position_embedding_type="rope", share_embeddings_and_output_weights=True)
    >>> parameter_count(llama, vocab_size=128256)
    1235814400
    """
    get = Fields.of(model).model
    wanted = {
        "normalization": ("RMSNorm", "LayerNorm"),
        "add_bias_linear": (False, True),
        "multi_latent_attention": (False, False),
        "num_moe_experts": (None, None),
        "mtp_num_layers": (None, None),
        "hybrid_layer_pattern": (None, None),
    }
    if (positions := get("position_embedding_type", "learned_absolute")) not in ("rope", "yarn", "none"):
        raise ValueError(
            f"position_embedding_type={positions!r} has parameters of its own: count the built model instead"
        )
    for name, (counted, default) in wanted.items():
        if (value := get(name, default)) != counted:
            raise ValueError(
                f"{name}={value!r} adds or removes parameters that this formula does not count (it wants {counted!r}): "
                "count the built model instead"
            )
    hidden, heads, layers = get("hidden_size"), get("num_attention_heads"), get("num_layers")
    groups, width = get("num_query_groups", heads), get("ffn_hidden_size", 4 * hidden)
    rows = vocab_size if vocab_size is not None else get("vocab_size")
    if rows is None:
        raise ValueError("the model has no vocab_size: give vocab_size=")
    channels = get("kv_channels", hidden // heads)
    attention = hidden * channels * (2 * heads + 2 * groups)
    feed_forward = hidden * width * (3 if get("gated_linear_unit", False) else 2)
    if get("add_qkv_bias", False):
        attention += channels * (heads + 2 * groups)
    if get("qk_layernorm", False):
        attention += 2 * channels
    embeddings = rows * hidden * (1 if get("share_embeddings_and_output_weights", True) else 2)
    return embeddings + layers * (attention + feed_forward + 2 * hidden) + hidden


def initial_loss(vocab_size: int) -> float:
    """The loss of a model that knows nothing: every id is equally likely.

    Args:
        vocab_size: Number of ids among which the model chooses.

    Returns:
        ln(vocab_size), in nats a token.

    Raises:
        ValueError: If it is not positive.

    >>> round(initial_loss(32000), 2)
    10.37
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1")
    return math.log(vocab_size)

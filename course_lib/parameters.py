"""Closed forms about a dense model: how many parameters it has, and how many of them stand in matrices."""

from __future__ import annotations

from typing import Any

from course_lib.layout_sizes import Fields

__all__ = ["head_channels", "layer_weights", "parameter_count"]


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
    fields = Fields.of(model)
    get = fields.model
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
    groups = get("num_query_groups", heads)
    rows = vocab_size if vocab_size is not None else get("vocab_size")
    if rows is None:
        raise ValueError("the model has no vocab_size: give vocab_size=")
    channels = head_channels(fields)
    layer = layer_weights(fields) + 2 * hidden
    if get("add_qkv_bias", False):
        layer += channels * (heads + 2 * groups)
    if get("qk_layernorm", False):
        layer += 2 * channels
    embeddings = rows * hidden * (1 if get("share_embeddings_and_output_weights", True) else 2)
    return embeddings + layers * layer + hidden


def head_channels(fields: Fields) -> int:
    """Channels of one attention head: the model's ``kv_channels``, or its width shared by its heads."""
    return fields.model("kv_channels") or fields.model("hidden_size", 0) // fields.model("num_attention_heads")


def layer_weights(fields: Fields) -> int:
    """How many weights stand in the matrices of a dense layer: attention's four, and the feed-forward's two or three.

    Args:
        fields: The model's fields; those with a default of Megatron's may be missing.
    """
    get = fields.model
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    channels, groups = head_channels(fields), get("num_query_groups", heads)
    matrices = 3 if get("gated_linear_unit", False) else 2
    return hidden * channels * (2 * heads + 2 * groups) + matrices * hidden * get("ffn_hidden_size", 4 * hidden)

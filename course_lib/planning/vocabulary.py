"""What a tokenizer costs: tokens per text, bits per byte, padded rows, parameters and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from course_lib import recipes
from course_lib.common import units
from course_lib.planning import closed_forms, layout

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["bits_per_byte", "compare", "padding", "swap_cost"]

DENSE = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Meta-Llama-3-8B")
"""The models that this course plans for."""

# Bytes of weights, gradients and optimizer state a parameter: 6 on every data-parallel rank, 12 shared among them.
KEPT_BYTES, SHARED_BYTES = 6, 12


def bits_per_byte(loss: float, *, tokens: int, text_bytes: int) -> float:
    """A loss that does not depend on how the text was cut into tokens.

    Args:
        tokens: Tokens of that text, ends of documents included.
        text_bytes: Bytes of that text in UTF-8.

    Returns:
        Bits per byte: loss x tokens / (ln 2 x bytes).

    Raises:
        ValueError: If tokens or bytes are not positive.

    Example:
        >>> bits_per_byte(math.log(256), tokens=1000, text_bytes=1000)  # guessing every byte
        8.0
    """
    if tokens <= 0 or text_bytes <= 0:
        raise ValueError(f"tokens={tokens} and text_bytes={text_bytes} must be positive")
    return loss / math.log(2) * tokens / text_bytes


def compare(tokenizers: Mapping[str, object], texts: Sequence[str]) -> pd.DataFrame:
    """The same text in several tokenizers.

    Args:
        tokenizers: By name, as `tokenizers.load` returns them.

    Returns:
        One row a tokenizer: ids, tokens (ends of documents included), bytes per token, and what a model that gives every
        id the same chance would score, in nats per token and in bits per byte.
    """
    import pandas as pd

    size_bytes = sum(len(text.encode()) for text in texts)
    rows = []
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.get_vocab_size()
        tokens = sum(len(found.ids) + 1 for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        even = bits_per_byte(math.log(ids), tokens=tokens, text_bytes=size_bytes)
        rows.append((name, ids, tokens, size_bytes / tokens, math.log(ids), even))
    columns = ["tokenizer", "ids", "tokens", "bytes per token", "even guess, nats/token", "even guess, bits/byte"]
    return pd.DataFrame(rows, columns=columns)


def padding(
    vocab_sizes: Mapping[str, int], *, tensor_model_parallel_sizes: Iterable[int] = (1, 2, 4, 8)
) -> pd.DataFrame:
    """How many rows does Megatron give the embedding at each TP?

    Args:
        vocab_sizes: Number of ids by name.

    Returns:
        One row a vocabulary, one column a TP size.

    Example:
        >>> padding({"Llama 3": 128256})["rows at TP=8"].tolist()
        [129024]
    """
    import pandas as pd

    sizes = list(tensor_model_parallel_sizes)
    rows = [
        [name, ids, *(layout.padded_vocab_size(ids, tensor_model_parallel_size=size) for size in sizes)]
        for name, ids in vocab_sizes.items()
    ]
    return pd.DataFrame(rows, columns=["vocabulary", "ids", *(f"rows at TP={size}" for size in sizes)])


def swap_cost(
    before: int, after: int, *, tensor_model_parallel_size: int = 2, data_parallel_size: int = 4
) -> pd.DataFrame:
    """What another vocabulary adds to Llama models of 1B, 3B and 8B parameters.

    Planned, from the shapes in `data/models`: parameters by the closed form, memory as 6 + 12/DP bytes a parameter with
    the distributed optimizer in mixed precision, on one rank of TP.

    Returns:
        One row a model: parameters before and after, the difference, its share, and GiB a rank.
    """
    import pandas as pd

    rows = []
    known = recipes.known_models()
    for name in DENSE:
        shape = _megatron_fields(known[name].config)
        old, new = (
            closed_forms.parameter_count(
                shape,
                vocab_size=layout.padded_vocab_size(ids, tensor_model_parallel_size=tensor_model_parallel_size),
            )
            for ids in (before, after)
        )
        rank_bytes = (KEPT_BYTES + SHARED_BYTES / data_parallel_size) * (new - old) / tensor_model_parallel_size
        rows.append((name.rsplit("/", 1)[-1], old, new, new - old, 100 * (new - old) / old, units.gib(rank_bytes)))
    columns = ["model", "parameters before", "after", "added", "added, %", "added per rank, GiB (planned)"]
    return pd.DataFrame(rows, columns=columns).sort_values("parameters before", ignore_index=True)


def _megatron_fields(config: Mapping[str, object]) -> dict[str, object]:
    """The shape of a Llama under Megatron's names."""
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
    }

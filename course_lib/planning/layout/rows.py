"""How many rows the embedding gets: the tokenizer's ids, padded so that tensor parallel ranks hold equal shares."""

from __future__ import annotations

from typing import Any

from course_lib.common.config import Fields
from course_lib.planning.layout.sizes import next_multiple

__all__ = ["embedding_rows", "padded_vocab_size", "padded_from_tokenizer"]


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int = 1, divisible_by: int = 128) -> int:
    """How many rows does the embedding get?

    Args:
        vocab_size: Number of ids of the tokenizer.
        tensor_model_parallel_size: TP; every rank holds the same number of rows.
        divisible_by: ``make_vocab_size_divisible_by`` of the model.

    Returns:
        The next multiple of ``divisible_by`` x TP.

    Raises:
        ValueError: If a number is not positive.

    Source: megatron-core 0.19.2 ``megatron/training/vocab_utils.py``.

    >>> [padded_vocab_size(128256, tensor_model_parallel_size=tp) for tp in (1, 2, 4, 8)]
    [128256, 128256, 128512, 129024]
    """
    if min(vocab_size, tensor_model_parallel_size, divisible_by) <= 0:
        given = f"vocab_size={vocab_size}, tensor_model_parallel_size={tensor_model_parallel_size}"
        raise ValueError(f"{given} and divisible_by={divisible_by} must be positive")
    return next_multiple(divisible_by * tensor_model_parallel_size, vocab_size)


def embedding_rows(cfg: Any) -> int:
    """How many rows does the embedding of a whole configuration get?

    Args:
        cfg: A Bridge ``ConfigContainer``, or the same as nested mappings.

    Returns:
        The tokenizer's ids, padded, or the model's own ``vocab_size`` as it is.

    Raises:
        ValueError: If the configuration says neither.

    Source: megatron-bridge 0.6.2 ``training/setup.py`` ``_validate_and_set_vocab_size``.

    >>> model, tokenizer = dict(tensor_model_parallel_size=8), dict(vocab_size=500)
    >>> embedding_rows(dict(model=model, tokenizer=tokenizer))
    1024
    >>> embedding_rows(dict(model=model | dict(vocab_size=600), tokenizer=tokenizer))
    600
    """
    fields = Fields.of(cfg)
    if not padded_from_tokenizer(fields):
        return fields.model("vocab_size")
    if (ids := fields.get("tokenizer", "vocab_size")) is None:
        raise ValueError(
            "the number of ids is known only to the tokenizer, which is not loaded to plan: set cfg.tokenizer.vocab_size "
            "or cfg.model.vocab_size"
        )
    return padded_vocab_size(
        ids,
        tensor_model_parallel_size=fields.model("tensor_model_parallel_size", 1),
        divisible_by=fields.model("make_vocab_size_divisible_by", 128),
    )


def padded_from_tokenizer(fields: Fields) -> bool:
    """Whether Bridge takes the tokenizer's size, and pads it, instead of the model's own."""
    return fields.model("vocab_size") is None or fields.get("tokenizer", "use_tokenizer_vocab_size", False)

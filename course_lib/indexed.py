"""Token ids on disk as `.bin` and `.idx`, written by Megatron Core's own builder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Written", "write"]


@dataclass(frozen=True)
class Written:
    """What `write()` left behind.

    Attributes:
        prefix: Path without suffix, as Megatron's data blend names it.
        documents: Number of documents.
        tokens: Number of token ids, ends of documents included.
    """

    prefix: Path
    documents: int
    tokens: int


def write(documents: Iterable[list[int]], prefix: Path, *, vocab_size: int, end_of_document: int) -> Written:
    """Write documents of token ids, each closed by the end-of-document id.

    Args:
        documents: Token ids, one list a document.
        prefix: Path without suffix; `.bin` and `.idx` appear together once both are whole.
        vocab_size: Number of ids; decides between two and four bytes a token, as Megatron does.
        end_of_document: The id to close each document with.

    Raises:
        ValueError: If a document is empty or an id lies outside the vocabulary; nothing is written then.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    half = prefix.with_name(f".{prefix.name}.{os.getpid()}")
    builder = IndexedDatasetBuilder(f"{half}.bin", dtype=DType.optimal_dtype(vocab_size))
    count = tokens = 0
    try:
        for ids in documents:
            if not ids:
                raise ValueError(f"document {count} is empty: leave it out")
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(f"document {count} has id {max(ids)}, outside a vocabulary of {vocab_size}")
            builder.add_document(np.array([*ids, end_of_document]), [len(ids) + 1])
            count, tokens = count + 1, tokens + len(ids) + 1
        if not count:
            raise ValueError("there are no documents to write")
        builder.finalize(f"{half}.idx")
        for suffix in ("bin", "idx"):
            os.replace(f"{half}.{suffix}", f"{prefix}.{suffix}")
    finally:
        builder.data_file.close()
        for suffix in ("bin", "idx"):
            Path(f"{half}.{suffix}").unlink(missing_ok=True)
    return Written(prefix, count, tokens)

"""Token ids on disk as `.bin` and `.idx`, written by Megatron Core's own builder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from course_lib.common.screen import Line
from course_lib.text import tokenizers

__all__ = ["Written", "batches", "write", "write_texts"]

BATCH_BYTES = 2**20
"""Text that is encoded at once: enough for all cores, little enough to stream."""


@dataclass(frozen=True)
class Written:
    """What `write()` left behind.

    Attributes:
        prefix: Path without suffix, as Megatron's data blend names it.
        tokens: Number of token ids, ends of documents included.
        text_bytes: Bytes of text that were encoded; 0 if ids were given.
    """

    prefix: Path
    documents: int
    tokens: int
    text_bytes: int = 0
    seconds: float = 0.0

    @property
    def megabytes_per_second(self) -> float:
        """Text that was encoded and written a second, in MB (10**6 bytes)."""
        return self.text_bytes / 1e6 / self.seconds if self.seconds else 0.0


def write(documents: Iterable[list[int]], prefix: Path, *, vocab_size: int, end_of_document: int) -> Written:
    """Write documents of token ids, each closed by the end-of-document id.

    Args:
        documents: Token ids, one list a document.
        prefix: Path without suffix; `.bin` and `.idx` appear together once both are whole.
        vocab_size: Number of ids; decides between two and four bytes a token, as Megatron does.

    Raises:
        ValueError: If a document is empty or an id lies outside the vocabulary; nothing is written then.
    """
    count = tokens = 0
    with _builder(prefix, vocab_size) as add:
        for ids in documents:
            add(ids, end_of_document)
            count, tokens = count + 1, tokens + len(ids) + 1
    return Written(prefix, count, tokens)


def write_texts(
    texts: Iterable[str],
    prefix: Path,
    *,
    tokenizer: object,
    end_of_document: int | None = None,
    progress: bool = False,
) -> Written:
    """Encode texts on all cores and write them, without holding more than two batches in memory.

    A text that spells a special token is text: only the end of a document becomes the end-of-document id.

    Args:
        prefix: Path without suffix.
        tokenizer: As `tokenizers.load` returns it.
        end_of_document: The id that closes a document, if you insist; default the vocabulary's own.
        progress: Show how far it is: share and time left of a list of texts, bytes and rate of others.

    Raises:
        ValueError: If the id closes no document in this vocabulary, or a text is empty; nothing is written then.
    """
    end = tokenizers.end_of_document(tokenizer)
    if end_of_document not in (None, end):
        name = tokenizer.id_to_token(end_of_document)
        raise ValueError(
            f"end_of_document={end_of_document} is {name!r} in this vocabulary, and {end} is "
            f"{tokenizer.id_to_token(end)!r}: leave it out. Id 11 of Nemotron ends a chat turn; some base models name it "
            "eos and never trained its embedding"
        )
    told = Line() if progress else None
    whole_bytes = sum(len(text.encode()) for text in texts) if progress and isinstance(texts, Sequence) else None
    count = tokens = size_bytes = 0
    begin = time.perf_counter()
    with _builder(prefix, tokenizer.get_vocab_size()) as add:
        for batch_bytes, batch in _encoded(texts, tokenizer):
            for ids in batch:
                add(ids, end)
                count, tokens = count + 1, tokens + len(ids) + 1
            size_bytes += batch_bytes
            if told is not None:
                told.say(_words(size_bytes, time.perf_counter() - begin, of_bytes=whole_bytes))
    seconds = time.perf_counter() - begin
    if told is not None:
        told.close(_words(size_bytes, seconds))
    return Written(prefix, count, tokens, size_bytes, seconds)


def _words(done_bytes: int, seconds: float, *, of_bytes: int | None = None) -> str:
    """How far the encoding is, and how fast; without a whole, what is done is said alone."""
    rate = f"{done_bytes / 1e6 / seconds:.1f} MB/s"
    if not of_bytes:
        return f"{done_bytes / 1e6:.1f} MB tokenised, {rate}"
    left_seconds = (of_bytes - done_bytes) * seconds / done_bytes
    return f"{done_bytes / of_bytes:.0%} of {of_bytes / 1e6:.1f} MB tokenised, {rate}, about {left_seconds:.0f} s left"


def batches(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Texts in lists of about one MiB, each with its bytes.

    Example:
        >>> list(batches(["naïve", "b"]))
        [(7, ['naïve', 'b'])]
    """
    batch, size_bytes = [], 0
    for text in texts:
        batch.append(text)
        size_bytes += len(text.encode())
        if size_bytes >= BATCH_BYTES:
            yield size_bytes, batch
            batch, size_bytes = [], 0
    if batch:
        yield size_bytes, batch


def _encoded(texts: Iterable[str], tokenizer: object) -> Iterator[tuple[int, list[list[int]]]]:
    """Batches of ids; the next batch is encoded, in native threads, while the caller writes this one."""

    def encode(batch: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]

    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for size_bytes, batch in batches(texts):
                following = size_bytes, pool.submit(encode, batch)
                if waiting is not None:
                    yield waiting[0], waiting[1].result()
                waiting = following
            if waiting is not None:
                yield waiting[0], waiting[1].result()
    finally:
        tokenizer.encode_special_tokens = before


@contextmanager
def _builder(prefix: Path, vocab_size: int) -> Iterator[Callable[[list[int], int], None]]:
    """Megatron's builder behind two temporary names; both files get their own names together, or none is left."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    half = prefix.with_name(f".{prefix.name}.{os.getpid()}")
    builder = IndexedDatasetBuilder(f"{half}.bin", dtype=DType.optimal_dtype(vocab_size))
    count = 0

    def add(ids: list[int], end_of_document: int) -> None:
        nonlocal count
        if not ids:
            raise ValueError(f"document {count} is empty: leave it out")
        document = np.empty(len(ids) + 1, np.int64)
        document[:-1], document[-1] = ids, end_of_document
        # The low-level call takes whatever fits the type: 70,000 would become 4,464 in two bytes.
        if document.min() < 0 or document.max() >= vocab_size:
            wrong = next(number for number in document.tolist() if not 0 <= number < vocab_size)
            raise ValueError(f"document {count} has id {wrong}, outside a vocabulary of {vocab_size}")
        builder.add_document(document, [len(document)])
        count += 1

    try:
        yield add
        if not count:
            raise ValueError("there are no documents to write")
        builder.finalize(f"{half}.idx")
        for suffix in ("bin", "idx"):
            os.replace(f"{half}.{suffix}", f"{prefix}.{suffix}")
        # Megatron finds its indices by path and settings, and would use those of the older files.
        shutil.rmtree(prefix / "cache", ignore_errors=True)
    finally:
        builder.data_file.close()
        for suffix in ("bin", "idx"):
            Path(f"{half}.{suffix}").unlink(missing_ok=True)

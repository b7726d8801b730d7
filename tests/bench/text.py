"""How fast text becomes tokens on disk, against the tokenizer alone."""

from __future__ import annotations

import time
from pathlib import Path

from course_lib.text import corpus, indexed, tokenizers
from tests import bench

__all__ = ["figures"]


def figures(work: Path) -> list[bench.Figure]:
    """The rate of `indexed.write_texts` on the course's corpus, and its share of the pure encoding rate.

    Both use all cores and the same batches; the two are measured in turn.

    Args:
        work: An empty directory.
    """
    from course_lib import stack

    stack.prepare_imports()
    built = corpus.python_library(work / "corpus")
    texts = [text for source in built.sources for text in built.texts(source, "train")]
    size_megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encoder = tokenizers.load(tokenizers.train_bpe(texts, work / "bpe", vocab_size=8192))

    def pure() -> float:
        begin = time.perf_counter()
        for _, batch in indexed.batches(texts):
            for found in encoder.encode_batch_fast(batch, add_special_tokens=False):
                found.ids  # noqa: B018
        return size_megabytes / (time.perf_counter() - begin)

    pure()  # the first pass fills the tokenizer's cache
    rates, shares = [], []
    for _ in range(bench.REPEATS):
        alone = pure()
        rates.append(indexed.write_texts(texts, work / "text", tokenizer=encoder).megabytes_per_second)
        shares.append(rates[-1] / alone)
    note = "8,192 ids, MB of text"
    return [
        bench.figure("text to .bin and .idx", rates, "MB/s", "-", "-", note),
        bench.figure("writing / encoding alone", shares, "x", "at least 0.8", "1", "in turn"),
    ]

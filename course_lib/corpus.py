"""Real text that every CPython carries, so that training needs no download.

The language reference is in `pydoc_data.topics`: the text behind `help("for")` and its neighbours, about 465 KB of
English prose with code, written by the Python Software Foundation and licensed with Python (PSF-2.0).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Corpus", "language_reference"]


@dataclass(frozen=True)
class Corpus:
    """Documents in two parts that share none.

    Attributes:
        train: Texts to learn from.
        validation: Texts to be judged on.
        source: Where they come from, and under which licence.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    source: str


def language_reference(*, validation_percent: int = 10) -> Corpus:
    """Python's own language reference, one document a topic.

    Which part a topic goes to follows from its text alone, so that a topic that Python stores under two names cannot be
    in both, and every machine with the same Python gets the same split.

    Args:
        validation_percent: Percentage of topics that is held out, 1 to 50.

    Raises:
        ValueError: If the percentage is out of range.

    Example:
        >>> corpus = language_reference()
        >>> set(corpus.train) & set(corpus.validation)
        set()
    """
    if not 1 <= validation_percent <= 50:
        raise ValueError(f"validation_percent={validation_percent}: must be between 1 and 50")
    from pydoc_data.topics import topics

    parts: dict[bool, list[str]] = {False: [], True: []}
    for text in dict.fromkeys(text.strip() for _, text in sorted(topics.items())):
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 100
        parts[bucket < validation_percent].append(text)
    return Corpus(tuple(parts[False]), tuple(parts[True]), "pydoc_data.topics of this Python, PSF-2.0")

"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that a reader finds the old one or the whole new one, whatever happens in between.

    The block writes to another name in the same directory; the rename follows when it ends.  A block that raises
    leaves nothing of its own behind.

    Args:
        path: The file to make or to replace.

    Yields:
        Where to write.

    Raises:
        OSError: If the directory cannot be written.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield half
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Args:
        path: The file to make or to replace.
        text: What it holds.
    """
    with replacing(path) as half:
        half.write_text(text, encoding="utf-8")

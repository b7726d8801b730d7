"""Files that are whole or not there, written under another name and renamed; and files that grow by whole lines."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that a reader finds the old one or the whole new one, whatever happens in between.

    The block writes to another name in the same directory; the rename follows when it ends.  A block that raises
    leaves nothing of its own behind.
    """
    path = path.resolve()  # a link stays a link
    half = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # of threads, processes and nodes that write one file
    try:
        yield half
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill a folder so that a reader finds the old one or the whole new one.

    The block fills another folder beside it; whatever stood under the name goes when the new one has taken its place.  A
    block that raises leaves the old folder and nothing of its own.
    """
    path = path.resolve()
    half = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    before = half.with_name(f"{half.name}.before")
    half.mkdir(parents=True)
    try:
        yield half
        if path.exists():
            os.replace(path, before)
        try:
            os.replace(half, path)
        except BaseException:
            if before.exists() and not path.exists():
                os.replace(before, path)
            raise
    finally:
        for folder in (half, before):
            shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """The digest of a file's bytes, read piece by piece: a checkpoint may be larger than the memory."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as half:
        half.write_text(text, encoding="utf-8")


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines, given without their ends, by one call, so that processes that share a file do not cut each other's.

    Raises:
        OSError: If not everything was written; a full disk cuts the last line then.
    """
    if not lines:
        return
    content = "".join(f"{line}\n" for line in lines).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
    finally:
        os.close(descriptor)

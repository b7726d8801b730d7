"""The built book as one zip file that opens anywhere: the same pages give the same bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

from course_lib.common import files

__all__ = ["FOLDER", "pack"]

FOLDER = "nemotron-course"
"""The folder that appears when somebody unpacks it."""

OLDEST = (1980, 1, 1, 0, 0, 0)  # what a zip file can say at least; the time of a build is no part of a page


def pack(html: Path, target: Path) -> Path:
    """Pack a built book; the file is written whole or not at all.

    Args:
        html: The folder with `index.html`.
        target: The zip file.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no built book.
    """
    if not (html / "index.html").is_file():
        raise FileNotFoundError(f"{html} holds no built book. Run `make book` first.")
    compression = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 6}
    with files.replacing(target) as half, zipfile.ZipFile(half, "w", **compression) as archive:
        for path in sorted(html.rglob("*")):
            name = path.relative_to(html)
            if not path.is_file() or name.parts[0].startswith("."):  # Sphinx's own notes, and a mark for Pages
                continue
            entry = zipfile.ZipInfo(f"{FOLDER}/{name.as_posix()}", date_time=OLDEST)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return target

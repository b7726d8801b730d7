"""An optional public corpus from the Hugging Face Hub; nothing in the course depends on it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from course_lib.common.units import format_bytes
from course_lib.text import corpus

TINY_STORIES = ("roneneldan/TinyStories", "TinyStories-valid.txt")
"""Repository and file: short English stories."""

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Offer:
    """What a download would be; look at it before you take it.

    Attributes:
        licence: As the repository's card names it, or `"not stated"`.
    """

    repository: str
    file: str
    size_bytes: int
    licence: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}/{self.file}: {format_bytes(self.size_bytes)}, licence {self.licence}"


def describe(repository: str = TINY_STORIES[0], file: str = TINY_STORIES[1]) -> Offer:
    """Ask the Hub for name, size and licence of a file, and download nothing.

    Args:
        file: A file of it, `.txt`, `.md` or `.jsonl`.

    Raises:
        ValueError: If the repository has no such file.
    """
    from huggingface_hub import HfApi

    about = HfApi().dataset_info(repository, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in about.siblings}
    if file not in sizes:
        raise ValueError(f"{repository} has no {file}: it has {', '.join(sorted(sizes)[:20])}")
    licence = (about.card_data or {}).get("license") or "not stated"
    return Offer(repository, file, sizes[file], str(licence), about.sha)


def build(offer: Offer, directory: Path) -> corpus.Built:
    """Download what was offered, and build a corpus from it as from a folder of yours.

    In a text file the documents are what stands between `<|endoftext|>`.

    Args:
        offer: From `describe`; print it first.

    Raises:
        BadText: If the file cannot be used.
    """
    from huggingface_hub import hf_hub_download

    found = Path(hf_hub_download(offer.repository, offer.file, repo_type="dataset", revision=offer.revision))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as name:
        folder = Path(name)
        if found.suffix == ".txt":
            texts = [text.strip() for text in found.read_text(encoding="utf-8").split(SEPARATOR)]
            lines = [json.dumps({"text": text}) for text in texts if text]
            (folder / f"{found.stem}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        else:
            shutil.copyfile(found, folder / found.name)
        return corpus.from_folder(folder, directory, licence=offer.licence, source="hub")

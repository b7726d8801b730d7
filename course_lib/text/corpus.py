"""Real text that every CPython carries, so that training needs no download; and your own folder, the same way.

A corpus is a directory of JSONL files, one a source and split, and a `manifest.json` that says how many documents and
bytes each step kept.  The steps are cleaning, exact deduplication, and a split by module: two documents of one module
are never on two sides of it.  The same Python gives the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common import files
from course_lib.text import sources

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SPLITS", "Built", "Corpus", "build", "clean", "from_folder", "language_reference", "python_library"]

SPLITS = ("train", "validation", "test")
MIN_CHARACTERS = 32
"""A shorter text has no sentence in it ("See base class.")."""


@dataclass(frozen=True)
class Corpus:
    """Documents in two parts that share none.

    Attributes:
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


@dataclass(frozen=True)
class Built:
    """A corpus on disk.

    Attributes:
        directory: Where `SOURCE.SPLIT.jsonl` and `manifest.json` are.
    """

    directory: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was built: Python, steps with counts, files with their sha256, modules of each split."""
        return json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, such as `("code", "prose")`."""
        return tuple(self.manifest["sources"])

    @property
    def steps(self) -> pd.DataFrame:
        """One row a step: documents and bytes that were left after it, and how many it took away."""
        import pandas as pd

        frame = pd.DataFrame(self.manifest["steps"])
        frame["removed"] = -frame.documents.diff().fillna(0).astype(int)
        return frame

    @property
    def files(self) -> pd.DataFrame:
        """One row a file: documents, bytes of text."""
        import pandas as pd

        rows = [{"file": name, **about} for name, about in self.manifest["files"].items()]
        return pd.DataFrame(rows)[["file", "documents", "text_bytes"]]

    def path(self, source: str, split: str) -> Path:
        """The JSONL file of one source and split.

        Raises:
            KeyError: If there is no such source or split.
        """
        name = f"{source}.{split}.jsonl"
        if name not in self.manifest["files"]:
            raise KeyError(f"no {name} in {self.directory}: there are {', '.join(self.manifest['files'])}")
        return self.directory / name

    def documents(self, source: str, split: str) -> Iterator[dict[str, str]]:
        """The documents of one source and split, one at a time: text, source, name, module, licence, sha256."""
        with self.path(source, split).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def texts(self, source: str, split: str) -> Iterator[str]:
        """The texts of one source and split, one at a time."""
        return (document["text"] for document in self.documents(source, split))


def python_library(directory: Path, *, held_out_percent: float = 5.0) -> Built:
    """Build the course's corpus from this Python: prose (language reference, docstrings) and code (standard library).

    Args:
        directory: Where the corpus goes; one that was built there before is replaced.
        held_out_percent: Share of the text for validation, and the same again for test.

    Returns:
        The corpus, about 10 MB of text, in some seconds.
    """
    return build(sources.python_documents(), directory, held_out_percent=held_out_percent)


def from_folder(
    folder: Path,
    directory: Path,
    *,
    licence: str,
    source: str = "mine",
    held_out_percent: float = 5.0,
    leave_out: Sequence[str] = (),
) -> Built:
    """Build a corpus from your own `.txt`, `.md` and `.jsonl` files, cleaned and split the same way.

    Hidden files and folders are left out, and a warning names them.

    Args:
        folder: Your files; a JSONL file has one object a line with a field `text`.
        licence: Under which licence you may use the text.
        held_out_percent: Share of the text for validation, and the same again for test.
        leave_out: Patterns of files of other kinds, such as `("*.png",)`, which are refused otherwise.

    Raises:
        BadText: If a file cannot be used; names file and line, and nothing is left half written.
    """
    documents = sources.folder_documents(folder, licence=licence, source=source, leave_out=leave_out)
    return build(documents, directory, held_out_percent=held_out_percent)


def clean(text: str) -> str:
    r"""One kind of line end, no trailing spaces, at most two empty lines in a row, no byte-order mark.

    Example:
        >>> clean("\ufeffone  \r\ntwo\n\n\n\n\nthree\n")
        'one\ntwo\n\n\nthree'
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def build(documents: Iterable[sources.Document], directory: Path, *, held_out_percent: float = 5.0) -> Built:
    """Clean, deduplicate and split documents, and write them with a manifest.

    Only hashes and counts are kept in memory, so the text may be larger than it.

    Args:
        documents: What to write, in an order that is always the same.
        directory: Where the corpus goes; a corpus there is replaced once the new one is whole.
        held_out_percent: Share of the text for validation, and the same again for test, above 0 and below 50.

    Raises:
        ValueError: If nothing is left, the share is out of range, or the directory holds something else.
    """
    if not 0 < held_out_percent < 50:
        raise ValueError(f"held_out_percent={held_out_percent}: must be above 0 and below 50")
    documents = _named(documents)
    if directory.exists() and any(directory.iterdir()) and not _is_corpus(directory):
        raise ValueError(f"{directory} holds files that are no corpus: name an empty or a new directory")
    with files.replacing_folder(directory) as half:
        steps, groups = _write_cleaned(documents, half / "all.jsonl")
        split_of = _split(groups, held_out_percent)
        written = _write_splits(half, split_of)
        (half / "all.jsonl").unlink()
        modules = {split: sorted(name for name, where in split_of.items() if where == split) for split in SPLITS}
        manifest = {
            "python": sys.version.split()[0],
            "held_out_percent": held_out_percent,
            "sources": sorted({name.split(".")[0] for name in written}),
            "steps": steps,
            "files": written,
            "modules": modules,
        }
        (half / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Built(directory)


def _is_corpus(directory: Path) -> bool:
    """True if the manifest is one of ours: other programs call a file so, too, and their files are not ours to delete."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"steps", "files", "modules"} <= set(manifest)


def _named(documents: Iterable[sources.Document]) -> Iterator[sources.Document]:
    """Refuse a source that cannot be the first part of a file name."""
    for document in documents:
        if not re.fullmatch(r"\w[\w-]*", document.source):
            raise ValueError(f"source={document.source!r}: use letters, digits and hyphens, as in 'my-notes'")
        yield document


def _write_cleaned(documents: Iterable[sources.Document], path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Write what survives cleaning and deduplication; returns the steps, and the bytes of each module."""
    counts: dict[str, list[int]] = {step: [0, 0] for step in ("read", "long enough", "no exact duplicates")}
    groups: Counter[str] = Counter()
    seen: set[bytes] = set()

    def count(step: str, size_bytes: int) -> None:
        counts[step][0] += 1
        counts[step][1] += size_bytes

    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            count("read", len(document.text.encode()))
            text = clean(document.text)
            data = text.encode()
            if len(text) < MIN_CHARACTERS:
                continue
            count("long enough", len(data))
            digest = hashlib.sha256(data)
            if digest.digest() in seen:
                continue
            seen.add(digest.digest())
            count("no exact duplicates", len(data))
            groups[document.module] += len(data)
            line = asdict(document) | {"text": text, "sha256": digest.hexdigest()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if not groups:
        raise ValueError(
            f"no text is left: {counts['read'][0]} documents were read, all under {MIN_CHARACTERS} characters"
        )
    return [{"step": step, "documents": n, "text_bytes": size} for step, (n, size) in counts.items()], dict(groups)


def _split(groups: dict[str, int], held_out_percent: float) -> dict[str, str]:
    """Which split each module goes to: by the hash of its name, until a held-out split is full.

    A module that would fill a held-out split nearly alone stays in training, so that the split is a mixture.
    """
    if len(groups) < len(SPLITS):
        raise ValueError(
            f"{len(groups)} modules or documents: at least {len(SPLITS)} are needed for {', '.join(SPLITS)}; a .txt or .md "
            "file is one document: cut it into several, or write JSONL with one document a line"
        )
    full_bytes = sum(groups.values()) * held_out_percent / 100
    largest_bytes = max(full_bytes / 4, 2 * statistics.median(groups.values()))
    split_of, sizes = dict.fromkeys(groups, "train"), Counter()
    for name in sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest()):
        for split in SPLITS[1:]:
            if sizes[split] < full_bytes and groups[name] <= largest_bytes:
                split_of[name] = split
                sizes[split] += groups[name]
                break
    if empty := [split for split in SPLITS if split not in split_of.values()]:
        raise ValueError(
            f"{len(groups)} modules or documents of such different sizes leave none for {' and '.join(empty)}: cut the "
            "large ones into several"
        )
    return split_of


def _write_splits(half: Path, split_of: dict[str, str]) -> dict[str, dict[str, Any]]:
    about: dict[str, dict[str, Any]] = {}
    writers, hashes = {}, {}
    try:
        with (half / "all.jsonl").open(encoding="utf-8") as file:
            for line in file:
                document = json.loads(line)
                name = f"{document['source']}.{split_of[document['module']]}.jsonl"
                if name not in writers:
                    writers[name], hashes[name] = (half / name).open("w", encoding="utf-8"), hashlib.sha256()
                    about[name] = {"documents": 0, "text_bytes": 0}
                writers[name].write(line)
                hashes[name].update(line.encode())
                about[name]["documents"] += 1
                about[name]["text_bytes"] += len(document["text"].encode())
    finally:
        for writer in writers.values():
            writer.close()
    return {name: about[name] | {"sha256": hashes[name].hexdigest()} for name in sorted(about)}

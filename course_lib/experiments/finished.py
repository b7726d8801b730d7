"""Which runs of a sweep are finished: the same configuration, ranks, code and data, and a note of their success."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from course_lib import runs, stack
from course_lib.common.config import flatten
from course_lib.common.project import LIBRARY
from course_lib.launch import forkserver

__all__ = ["digest", "find", "note"]

MOST_BYTES_READ = 256 * 2**20
"""A data file up to this size is told from another by its contents, a larger one by size and time."""


def digest(cfg: Any, ranks: int) -> str:
    """A number that is equal for runs that must give the same result.

    Args:
        cfg: Bridge's `ConfigContainer`, seeds included.
        ranks: World size.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        cfg.to_yaml(str(path))
        text = path.read_text()
    leaves = {str(leaf) for leaf in _leaves(flatten(cfg)) if isinstance(leaf, str | Path)} - {"", "."}
    data = [_stamp(value) for value in sorted(leaves)]
    whole = json.dumps([text, data, ranks, stack.device(ranks), stack.versions(), _engine()])
    return hashlib.sha256(whole.encode()).hexdigest()


def _engine(course_lib: Path = LIBRARY) -> str:
    """What this project itself does in a rank: its sums, its norms, its settings for a CPU can change a result too."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in forkserver.rank_code(course_lib))).hexdigest()


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _stamp(name: str) -> list[Any]:
    """What is in the files behind a path or a data prefix, so that new data means a new run and the same data does not.

    A notebook that is run again writes its small files again: their contents count, not their time.  Large ones would
    take too long to read, so for them size and time stand in.
    """
    files = [Path(name), Path(f"{name}.bin"), Path(f"{name}.idx")]
    if os.path.isdir(name) and not os.path.isfile(f"{name}.bin"):  # below a data prefix Megatron keeps its own indices
        files += sorted(Path(name).rglob("*"))
    # os.path, because a text that is no path may be too long for one, which pathlib takes for an error
    return [[str(file), _content(file)] for file in files if os.path.isfile(file)]


def _content(file: Path) -> str | list[int]:
    about = file.stat()
    if about.st_size > MOST_BYTES_READ:
        return [about.st_size, about.st_mtime_ns]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def note(run: runs.Run, *, digest: str, seed: int) -> None:
    """Write into a run's directory that it is whole; only after success."""
    runs.write_json(run.path / "sweep.json", {"digest": digest, "seed": seed})


def find(digest: str) -> runs.Run | None:
    """The newest finished run with this digest, or None."""
    for run in runs.listing():
        path = run.path / "sweep.json"
        if path.exists() and json.loads(path.read_text())["digest"] == digest:
            return run
    return None

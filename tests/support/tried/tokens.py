"""Answers to the exercises of lesson 04."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace as Some

import numpy as np

from course_lib.text import microscope
from support.tried import Tried


def bytes_of_a_token(folder: Path) -> Tried:
    """Rounding bits up to bytes, and what was true of the smaller vocabulary."""
    return Tried(4, [(3, "no such type"), (2, "65,536 ids"), (8, "smallest")], [131072])


def blend_of_three(folder: Path) -> Tried:
    """Weights in another order, only two sources, and weights that mean something else."""
    shares = {"prose": 0.5, "code": 0.3, "notes": 0.2}
    prefixes = {name: folder / name for name in shares}

    def cfg(weights: list[float] | None, names: str = "prose code notes") -> Some:
        return Some(
            dataset=Some(blend_per_split=[([str(prefixes[name]) for name in names.split()], weights), None, None])
        )

    wrong = [
        (cfg([3, 5, 2]), "on the wrong sources"),
        (cfg([5, 3], "prose code"), "3 prefixes"),
        (cfg(None), "Each prefix has a weight"),
        (cfg([0.5, 0.3, 0.3]), "divides each weight"),
    ]
    return Tried(cfg([5, 3, 2]), wrong, [shares, prefixes])


def written(prefix: Path, documents: list[list[int]]) -> Path:
    """The two files as Megatron writes them, ids of two bytes."""
    lengths = np.array([len(ids) for ids in documents], "<i4")
    pointers = 2 * np.concatenate([[0], np.cumsum(lengths[:-1])])
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
    ends = np.arange(len(documents) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.astype("<i8").tobytes() + ends.tobytes())
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    return prefix


def rescued(folder: Path) -> Tried:
    """The torn file itself, the half document closed as if it were whole, and one too few."""
    documents = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 0]]
    index = microscope.read(written(folder / "whole", documents))
    torn = written(folder / "torn", documents)
    Path(f"{torn}.bin").write_bytes(Path(f"{torn}.bin").read_bytes()[:16])
    solution = written(folder / "mended", documents[:2])
    more = written(folder / "more", [*documents[:2], [9, 0]])
    fewer = written(folder / "fewer", documents[:1])
    other = written(folder / "other", [[5, 6, 0, 0], [8, 0]])
    wrong = [(torn, "cut off"), (more, "cut in the middle"), (fewer, "more of them"), (other, "closed once")]
    return Tried(solution, wrong, [torn, index])

"""Lesson 04: bytes of a token, a blend of three sources, and documents that survived a cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from course_lib.lesson.verdicts import Unfit, Verdict, own_files, right, value, wrong
from course_lib.text import microscope


def bytes_of_a_token(answer: int, ids: int) -> Verdict:
    """How many bytes does Megatron write for each token of a vocabulary with so many ids?

    Source: megatron-core 0.19.2 `datasets/indexed_dataset.py`, `DType.optimal_dtype`.
    """
    needed = -(-(ids - 1).bit_length() // 8)
    return value(
        answer,
        2 if ids < 65500 else 4,
        why="more ids than two bytes can number, and three bytes are no type; so the same tokens take twice the space.",
        otherwise="A token is one number of a type that NumPy knows: which is the smallest that holds the largest id?",
        hints=[
            (
                needed,
                f"{needed} bytes would hold the ids, and there is no such type: Megatron writes whole NumPy numbers.",
            ),
            (2, "Two bytes number 65,536 ids; how many has this tokenizer?"),
        ],
    )


def blend_of_three(answer: Any, shares: Mapping[str, float], prefixes: Mapping[str, Path]) -> Verdict:
    """Which configuration draws the samples from three sources in these shares?

    Args:
        shares: The share of each source, by its name.
        prefixes: Where the ids of each source are.
    """
    blends = getattr(getattr(answer, "dataset", None), "blend_per_split", None)
    if blends is None:
        raise Unfit("a configuration is asked for, a copy of `cfg` in whose `dataset.blend_per_split` the blend stands")
    if not blends[0]:
        return wrong("The first entry is the blend of the training data, and it is empty.")
    paths, weights = blends[0]
    if len(paths) != len(shares) or {str(path) for path in paths} != {str(prefixes[name]) for name in shares}:
        return wrong(f"{len(shares)} prefixes are needed, without suffix, one a source: {', '.join(shares)}.")
    if weights is None or len(weights) != len(paths):
        return wrong("Each prefix has a weight; without weights the shares follow from how much text there is.")
    names = {str(prefixes[name]): name for name in shares}
    asked = {names[str(path)]: weight / sum(weights) for path, weight in zip(paths, weights, strict=True)}
    off = [name for name, share in shares.items() if abs(asked[name] - share) > 1e-6]
    if off and sorted(asked.values()) == sorted(shares.values()):
        return wrong(
            f"The shares are the right ones, on the wrong sources: {', '.join(off)}. Weights follow the prefixes."
        )
    if off:
        got = ", ".join(f"{name} {share:.0%}" for name, share in asked.items())
        return wrong(f"This blend asks for {got}: Megatron divides each weight by their sum.")
    return right(
        "each source gets its share of the samples; only the ratio of the weights counts, so 5, 3 and 2 do as well."
    )


def rescued(answer: str | Path, torn: Path, index: microscope.Index) -> Verdict:
    """Which files hold all documents of a torn `.bin` that are whole?

    Args:
        answer: The prefix of the files that were written.
        torn: The prefix of the torn file.
        index: The index from before, which fits the whole file.
    """
    import numpy as np

    found = own_files(answer)
    item = np.dtype(index.type_name).itemsize
    whole = int((index.pointers + item * index.lengths <= Path(f"{torn}.bin").stat().st_size).sum())
    if len(found.lengths) > whole:
        return wrong(
            f"{len(found.lengths):,} documents, and the file holds fewer whole ones: the last one was cut in the middle."
        )
    if len(found.lengths) < whole:
        return wrong(f"{len(found.lengths):,} documents, and more of them lie wholly before the cut.")
    size = int(item * index.lengths[:whole].sum())
    if Path(f"{answer}.bin").read_bytes() != Path(f"{torn}.bin").read_bytes()[:size]:
        return wrong(
            "As many documents as there should be, and other ids: is each closed once, by the end of a document?"
        )
    return right(f"{whole:,} documents are whole, to the last id; a training run can read them.")

"""Answers to the exercises of lesson 05."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Some

import pandas as pd

from course_lib.lesson.exercises import tokenizer_swap
from course_lib.text import indexed
from support.tried import Tried


def nemotron_tokens(folder: Path) -> Tried:
    """The ratio upside down, and against bytes."""
    table = pd.DataFrame({"tokenizer": ["bytes", "BPE", "Nemotron"], "tokens": [4000, 2000, 1000]})
    return Tried(500, [(2000, "other way round"), (250, "single bytes"), (3, "same text")], [table])


def no_row_for_nothing(folder: Path) -> Tried:
    """The default divisor, another layout, and a fixed number of ids."""

    def cfg(tp: int = 8, divisor: int = 125, ids: int | None = None) -> Some:
        model = Some(tensor_model_parallel_size=tp, make_vocab_size_divisible_by=divisor)
        return Some(model=model, tokenizer=Some(use_tokenizer_vocab_size=True, vocab_size=ids))

    wrong = [
        (cfg(divisor=128), "1,024 rows"),
        (cfg(tp=1), "a layout is not the way out"),
        (cfg(ids=1024), "of 1,000 ids"),
    ]
    return Tried(cfg(), wrong)


def ids_of_the_text(folder: Path) -> Tried:
    """Nothing mended, the end moved along, off by one, the end doubled, and a document lost."""
    here, end = [[1010, 1020], [1030]], 2

    def files(name: str, *documents: list[int], closed_by: int = end) -> Path:
        vocab_size = tokenizer_swap.NEMOTRON_IDS
        return indexed.write(documents, folder / name, vocab_size=vocab_size, end_of_document=closed_by).prefix

    wrong = [
        (files("same", [10, 20], [30]), "off by 1,000 in each of them"),
        (files("moved", *here, closed_by=1002), "ends with id 1002"),
        (files("one", [1009, 1019], [1029]), "off by 1 in each"),
        (files("twice", [1010, 1020, end], [1030, end]), "an id too many"),
        (files("fewer", here[0]), "1 documents"),
        (files("shorter", [1010], [1030]), "2 ids, and its text 3"),
    ]
    return Tried(files("yours", *here), wrong, [here, end])

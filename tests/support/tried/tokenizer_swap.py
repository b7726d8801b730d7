"""Answers to the exercises of lesson 05."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace as Some

import pandas as pd

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


def rise_of_the_loss(folder: Path) -> Tried:
    """The loss itself, the rows, and bits."""
    rise = math.log(512 / 384)
    wrong = [
        (math.log(512), "by how much it is above"),
        (128, "how many rows were added"),
        (rise / math.log(2), "in bits"),
    ]
    return Tried(rise, wrong, [384, 512])

"""What a reader sees of a loss mask, in colours and without them, and what Bridge's data set says of its own labels."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from course_lib.figures import plots, tokens
from course_lib.text import microscope

LABELS = pd.DataFrame(
    [
        (0, 0, "def f", "prompt", 0),
        (0, 1, "\n", "separator", 1),
        (0, 2, " <b>", "answer", 1),
        (0, 3, "<|end|>", "end of document", 1),
        (0, 4, "<|end|>", "padding", 0),
        (1, 0, "x", "prompt", 0),
    ],
    columns=["row", "position", "token", "kind", "loss"],
)


def test_a_mark_stands_under_the_tokens_with_loss_and_no_other():
    """Colour says what a token is, and the mark what it costs, so that one can be read without the other."""
    page = tokens.coloured(LABELS)._repr_html_()
    legend, *rows = re.split("<p ", page)[1:]
    marks = [re.findall(r"border-bottom: 3px solid (#\w+)", row) for row in rows]
    assert [len(each) for each in marks] == [3, 0]
    assert set(marks[0]) <= set(plots.COLOURS.values()), "colours that are seen on a light and on a dark page"
    backgrounds = re.findall(r"background: (#\w+)", rows[0])
    assert len(set(backgrounds)) == 5, "five kinds, five colours"
    assert "&lt;b&gt;" in rows[0] and "<b>" not in page, "a token is text, whatever it looks like"
    assert all(kind in legend for kind in LABELS.kind)


def test_without_colours_words_say_the_same():
    """In a terminal, and for who cannot see the colours."""
    first, second = str(tokens.coloured(LABELS)).splitlines()
    assert first == (
        "row 0: prompt 'def f', loss 0; separator '\\n', loss 1; answer ' <b>', loss 1; "
        "end of document '<|end|>', loss 1; padding '<|end|>', loss 0"
    )
    assert second == "row 1: prompt 'x', loss 0"


class Pairs:
    """Stands for Bridge's data set: one pair of 3 + 3 ids with its end, padded to eight."""

    tokenizer = type("Names", (), {"detokenize": staticmethod(lambda ids: f"t{ids[0]}")})()

    def __getitem__(self, number: int) -> dict:
        return {"input_ids": [5, 6, 7, 1, 8, 9, 0], "answer_start_idx": 3}

    def collate_fn(self, items: list[dict]) -> dict:
        import torch

        ids = [item["input_ids"][1:] + [0, 0] for item in items]
        return {"labels": torch.tensor(ids), "loss_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]] * len(items))}


def test_labels_are_named_by_what_they_belong_to():
    """The end of a document and the padding are one id, and not one kind."""
    found = microscope.labels(Pairs(), [0])
    kinds = ["prompt"] * 2 + ["separator"] + ["answer"] * 2 + ["end of document"] + ["padding"] * 2
    assert found.kind.tolist() == kinds
    assert found.token.tolist()[-3:] == ["t0"] * 3 and found.loss.tolist()[-3:] == [1, 0, 0]
    assert found.groupby("kind").loss.sum()["prompt"] == pytest.approx(0)

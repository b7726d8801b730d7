"""Tables for reading: nothing is cut, nothing runs off the page, and nothing is taken for HTML."""

from __future__ import annotations

import pandas as pd
import pytest

from course_lib.lesson import tables


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0003, "0.0003"),
        (1.0, "1"),
        (float("nan"), "–"),
        (pd.NA, "–"),
        (None, "None"),
        ([1, 2], "[1, 2]"),
        (1168251, "1168251"),
        ("</s>", "&lt;/s&gt;"),
        ("transformer_engine", "transformer_<wbr>engine"),
        ("26.02.rc1", "26.02.<wbr>rc1"),
        ("~/my_course/runs", "~/my_course/runs"),
    ],
)
def test_a_value_is_shown_whole(value: object, shown: str):
    """Numbers are short, a missing one is a dash, a name may go on below at a joint, and a path can be copied."""
    frame = pd.DataFrame({"value": pd.Series([value], dtype=object), "why": ["because"]})
    assert f">{shown}</td>" in tables.full(frame).to_html()


def test_a_column_may_lack_numbers():
    """pandas keeps whole numbers with gaps in a type of its own."""
    frame = pd.DataFrame({"GPUs": pd.array([8, None], dtype="Int64"), "why": ["because", None]})
    shown = tables.full(frame, index=False).to_html()
    assert ">8</td>" in shown and ">–</td>" in shown


def test_the_names_of_rows_and_columns_go_on_below_too():
    """A long field name as a row or a column would make the table wider than the page."""
    frame = pd.DataFrame({"tokens_per_second": [1]}, index=pd.Index(["model.masked_softmax"], name="field"))
    shown = tables.full(frame).to_html()
    assert "tokens_<wbr>per_<wbr>second" in shown and "model.<wbr>masked_<wbr>softmax" in shown


def test_two_tables_put_together_are_shown():
    """Labels that repeat, as after pd.concat, are all shown; pandas alone refuses to style them."""
    one = pd.DataFrame({"a": [1, 2]}, index=["x", "y"])
    both = pd.concat([pd.concat([one, one]), pd.concat([one, one])], axis=1)
    page = tables.full(both).to_html()
    assert page.count(">x") == 2 and page.count(">a") == 2 and page.count("<td") == 8

"""Every claim of a check cell of lesson 18 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

import ast
from types import SimpleNamespace as Some
from typing import Any

import pandas as pd
import pytest

from book.builder import curation as measuring
from course_lib.experiments import executors, sweep
from course_lib.experiments.curated import known
from course_lib.text import planted
from support.lesson_cells import cells, falsify, gives, tagged

BIT = sweep.Change("text", "collected", "curated")


def shares(**changed):
    """Shares of each kind that three filters take."""
    table = pd.DataFrame(0.0, index=["equal", "words"], columns=["clean", *planted.FAULTS])
    table.loc["words", list(planted.FAULTS)] = [1.0, 0.9, 1.0, 0.0, 0.0, 1.0, 1.0]
    table.loc["equal", "exact duplicate"] = 1.0
    return table.assign(**changed)


def lesson_18(folder):
    """Facts of lesson 18."""
    mended = pd.DataFrame({"kind": ["mojibake"] * 2 + ["clean"] * 2, "text": list("abcd"), "good": list("abcd")})
    both = {"mended": mended}
    yield (
        "check-mend",
        both,
        [{"mended": mended.assign(text=list("xycd"))}, {"mended": mended.assign(text=list("abcx"))}],
    )
    found = (shares() * 50).astype(int)
    clean = pd.DataFrame({"kind": ["shuffled words"] * 49})
    score = {"share": shares(), "found": found, "planted": planted, "clean": clean, "each": 50}
    wrong = [
        {"share": shares(**{"near duplicate": 0.3})},
        {"found": found.assign(clean=50)},
        {"clean": clean.iloc[:10]},
    ]
    yield "check-score", score, wrong
    for name in ("theirs", "ours", "other"):
        for suffix in (".bin", ".idx"):
            (folder / f"{name}{suffix}").write_bytes(b"1" if name == "other" else b"0")
    ours = Some(write_texts=gives(Some(prefix=folder / "ours")))
    writer = {
        "theirs": folder / "theirs", "indexed": ours, "tokenizers": Some(load=gives(None)), "clean": Some(text=[]),
        "work": folder,
    }  # fmt: skip
    from pathlib import Path

    yield "check-writer", writer | {"Path": Path}, [{"theirs": folder / "other"}]
    pays = {"sweep": sweep, "bits": {"collected": [3.4, 3.5, 3.6], "curated": [3.1, 3.2, 3.3]}}
    yield "check-pays", pays, [{"bits": {"collected": [3.4, 3.5, 3.6], "curated": [3.4, 3.6, 3.5]}}]
    rows = {
        "much": {"what": "much", "before": [3.4, 3.5, 3.6], "after": [3.1, 3.2, 3.31]},
        "little": {"what": "little", "before": [3.4, 3.5, 3.6], "after": [3.4, 3.6, 3.5]},
        "harm": {"what": "harm", "before": [3.1, 3.2, 3.3], "after": [3.4, 3.5, 3.61]},
    }
    study = {"sweep": sweep, "change": BIT, "study": {"rows": list(rows.values())}}
    without = [{"study": {"rows": [row for name, row in rows.items() if name != gone]}} for gone in rows]
    yield "check-study", study, without
    kept = Some(kept=gives(Some(id=[1, 2])))
    ended = {"outcome": Some(alive=0, status="succeeded", peak_bytes=2**30), "clean": Some(id=[2, 1]), "work": folder}
    wrong = [
        {"outcome": Some(alive=alive, status="succeeded", peak_bytes=peak)} for alive, peak in ((1, 1), (0, 2**31))
    ]
    ways = {"executor": ["none", "Ray Data", "Xenna, streaming"], "outcome": ["succeeded", "succeeded", "failed"]}
    ended["table"] = pd.DataFrame(ways).assign(**{"documents": 489, "peak GiB": 1.2})
    wrong += [{"table": ended["table"].assign(**change)} for change in (
        {"outcome": "succeeded"}, {"documents": [488, 489, 489]}, {"peak GiB": 2.1},
    )]  # fmt: skip
    yield "check-ray", ended | {"curation": kept}, [*wrong, {"clean": Some(id=[1])}]
    published = [{"study": "scaling", "nodes": 1, "hours": 2.05}, {"study": "scaling", "nodes": 4, "hours": 0.5}]
    scale = {"published": {"rows": published}, "partitions": 20_000}
    slow = [*published[:1], {"study": "scaling", "nodes": 4, "hours": 1.0}]
    yield "check-scale", scale, [{"published": {"rows": slow}}, {"partitions": 10}]


NAMES = ["check-mend", "check-score", "check-writer", "check-pays", "check-study", "check-ray", "check-scale"]


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name, tmp_path):
    """A check that cannot fail proves nothing."""
    cells = {cell: (facts, wrong) for cell, facts, wrong in lesson_18(tmp_path)}
    falsify("18", name, *cells[name])


def test_every_check_cell_is_tried():
    """A new check cell needs facts here."""
    assert set(NAMES) == tagged("18", "check")


def test_the_stages_that_were_measured_are_those_of_the_lesson(tmp_path):
    """`data/curator_executors.json` holds what a program ran; the cells build their stages again, and both say the same."""
    wanted = {"min_words", "short", "filters", "pipeline"}
    nodes = [node for source, _ in cells("18").values() for node in ast.parse(source).body]
    kept = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nemo_curator")]
    for node in nodes:
        names = {getattr(one, "id", "") for one in getattr(node, "targets", [])} | {getattr(node, "name", "")}
        kept += [node] if names & wanted else []
    (tmp_path / "mended").mkdir()
    path = tmp_path / "mended" / "part-0.jsonl"
    path.touch()
    lesson: dict[str, Any] = {"work": tmp_path, "removal": tmp_path / "remove.parquet"}
    exec(compile(ast.Module(kept, []), "lesson 18", "exec", dont_inherit=True), lesson)
    measured = measuring.lesson_stages([str(path)], tmp_path, tmp_path / "out")
    assert _said(lesson["pipeline"]("out")) == _said(measured)


def _said(thing: Any) -> Any:
    """A stage, with the filters in it, as names and values."""
    if isinstance(thing, list):
        return [_said(one) for one in thing]
    if callable(thing):
        return thing.__qualname__
    if not hasattr(thing, "__dict__"):
        return thing
    return type(thing).__name__, {name: _said(value) for name, value in vars(thing).items() if name != "fs"}


def test_every_executor_has_a_row():
    """Seconds and memory of each, those that refuse with their reason."""
    rows = {row["executor"]: row for row in known("curator_executors")["rows"]}
    assert list(rows) == list(executors.EXECUTORS)
    assert all(row["why"] or row["run s"] for row in rows.values())

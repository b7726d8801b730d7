"""A profiler's trace: time is counted once, what lies outside the step is left out, and a missing trace is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib.reading import trace


def event(name: str, begin: float, took: float, thread: int = 1) -> dict:
    """A complete event, times in microseconds."""
    return {"ph": "X", "name": name, "ts": begin, "dur": took, "pid": 7, "tid": thread}


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """A run with a trace of one step of 10 ms, and with events before it and in another thread."""
    events = [
        {"ph": "M", "name": "process_name"},
        event("aten::mm", 100, 50),
        event("ProfilerStep#3", 1000, 10_000),
        event("aten::linear", 1000, 5000),
        event("aten::addmm", 1500, 4000),
        event("aten::mm", 7000, 1000),
        event("c10d::allreduce_", 8000, 2000),
        event("_ReduceFromModelParallelRegion", 10_400, 500),
        event("pt_data_worker", 1000, 9000, thread=2),
    ]
    (tmp_path / "torch_profile").mkdir()
    with gzip.open(tmp_path / "torch_profile" / "rank-0.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    return SimpleNamespace(path=tmp_path, name="profiled")


def test_time_is_counted_once(run: SimpleNamespace) -> None:
    """The parts are the step: an operator's time is less that of the operators inside it."""
    rows = trace.operators(run).set_index("operator")
    assert rows.self_ms.to_dict() == pytest.approx(
        {
            "aten::addmm": 4.0, "outside every operator": 1.5, "c10d::allreduce_": 2.0, "aten::linear": 1.0,
            "aten::mm": 1.0, "_ReduceFromModelParallelRegion": 0.5,
        }
    )  # fmt: skip
    assert rows.loc["aten::mm", "count"] == 1, "the one before the step is not counted"
    kinds = trace.by_kind(trace.operators(run))
    assert kinds.self_ms.sum() == pytest.approx(10.0) and kinds.share.sum() == pytest.approx(1)
    assert kinds.self_ms["messages"] == pytest.approx(2.5)
    assert kinds.loc["matrix products"].tolist() == pytest.approx([2, 5.0, 0.5])


def test_a_missing_trace_is_told(run: SimpleNamespace) -> None:
    """With the fields that write one."""
    with pytest.raises(ValueError, match="no trace of rank 3: set cfg.profiling.use_pytorch_profiler"):
        trace.operators(run, rank=3)

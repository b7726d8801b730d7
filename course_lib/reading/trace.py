"""What a rank did in a profiled step, from the trace that PyTorch's profiler writes for Megatron-Bridge."""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from course_lib.runs import Run

__all__ = ["by_kind", "operators"]

_KINDS = {
    "matrix products": re.compile(r"aten::(?:mm|bmm|addmm|baddbmm)$"),
    # torch's own, and Megatron Core's functions of autograd, whose messages of CPU ranks go by shared memory
    "messages": re.compile(r"c10d::|gloo:|nccl:|record_param_comms|_\w+ModelParallelRegion"),
    "attention": re.compile(r"aten::_scaled_dot_product"),
    "loss": re.compile(r"_VocabParallelCrossEntropy"),
}
_STEP = "ProfilerStep#"


def operators(run: Run, *, rank: int = 0) -> pd.DataFrame:
    """The operators of the profiled steps, by the time that each took itself.

    Time inside an operator that it called belongs to the called one, so nothing is counted twice.  What a step spent
    outside every operator is a row of its own: Python, and waiting.

    Returns:
        Rows `operator, kind, count, self_ms`, the longest first; together they are the steps.

    Raises:
        ValueError: That rank wrote no trace.

    Source: torch 2.13.0, `export_chrome_trace` in `profiler/profiler.py` (times in microseconds).
    """
    import pandas as pd

    path = run.path / "torch_profile" / f"rank-{rank}.json.gz"
    if not path.is_file():
        raise ValueError(
            f"run {run.name!r} has no trace of rank {rank}: set cfg.profiling.use_pytorch_profiler = True, name the rank in "
            "cfg.profiling.profile_ranks, and let profile_step_end be a step that the run reaches"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"].startswith(_STEP)]
    took: dict[tuple[str, str], list[float]] = {}
    for thread in {(step["pid"], step["tid"]) for step in steps}:
        own = [event for event in events if (event["pid"], event["tid"]) == thread and _inside(event, steps)]
        for event, alone in _alone(sorted(own, key=lambda event: (event["ts"], -event["dur"]))):
            name, kind = _named(event["name"])
            took.setdefault((name, kind), []).append(alone / 1e3)
    rows = [(name, kind, len(each), sum(each)) for (name, kind), each in took.items()]
    found = pd.DataFrame(rows, columns=["operator", "kind", "count", "self_ms"])
    return found.sort_values("self_ms", ascending=False, ignore_index=True)


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """The same by kind, with the share of the step.

    Args:
        rows: What `operators` returned.
    """
    sums = rows.groupby("kind")[["count", "self_ms"]].sum().sort_values("self_ms", ascending=False)
    return sums.assign(share=sums.self_ms / sums.self_ms.sum())


def _named(name: str) -> tuple[str, str]:
    if name.startswith(_STEP):
        return "outside every operator", "Python and waiting"
    return name, next((kind for kind, words in _KINDS.items() if words.match(name)), "other operators")


def _inside(event: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    middle = event["ts"] + event["dur"] / 2
    return any(step["ts"] <= middle <= step["ts"] + step["dur"] for step in steps)


def _alone(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each event of a thread with its microseconds less those of the events inside it; they come in the order of begin."""
    alone = [event["dur"] for event in events]
    open_: list[int] = []
    for number, event in enumerate(events):
        while open_ and events[open_[-1]]["ts"] + events[open_[-1]]["dur"] <= event["ts"]:
            open_.pop()
        if open_:
            alone[open_[-1]] -= event["dur"]
        open_.append(number)
    return list(zip(events, alone, strict=True))

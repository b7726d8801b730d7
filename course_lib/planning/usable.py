"""What of a GPU's memory a plan may use: the allocator's total less named lines, each with the report that it was read in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.common.project import DATA
from course_lib.common.units import GiB, MiB
from course_lib.planning import ceiling
from course_lib.planning.layout import Layout

__all__ = ["FILE", "GPU", "Line", "Usable", "markdown", "of"]

FILE = DATA / "usable_memory.json"
GPU = "H100 SXM 80GB"
"""The one GPU, by its name in `ceiling.gpus()`, whose lines the file holds."""


@dataclass(frozen=True)
class Line:
    """One reason why memory cannot be planned."""

    name: str
    taken_bytes: int
    source: str


@dataclass(frozen=True)
class Usable:
    """The memory of one GPU for one plan.

    Attributes:
        total_bytes: What torch's allocator sees of the GPU, the least that was reported.
    """

    total_bytes: int
    lines: tuple[Line, ...]

    @property
    def usable_bytes(self) -> int:
        """The total less the lines: a plan that is not above it fits."""
        return self.total_bytes - sum(line.taken_bytes for line in self.lines)


def of(cfg: Any, *, ranks: int, gpu: str = GPU, path: Path = FILE) -> Usable:
    """How much of an 80 GB H100 may a plan of this layout take?

    Args:
        gpu: Another one of `ceiling.gpus()`: its driver's total, less the same lines, which were reported for an H100 only.

    Returns:
        The total and the lines; a group of NCCL is counted for the world and for each kind of group with two ranks or more.
        The backward pass adds the gradients of one layer, which no plan keeps: those of its gate's halves, their product,
        and two streams.
    """
    facts = json.loads(path.read_text(encoding="utf-8"))
    layout, model = Layout.from_config(cfg, ranks=ranks), cfg.model
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    groups = sum(size > 1 for size in (ranks, tp, pp, cp, layout.data_parallel_size * cp))
    lines = [
        Line(
            f"{name}, {groups} groups" if row["per"] == "group" else name,
            row["mib"] * MiB * (groups if row["per"] == "group" else 1),
            row["source"],
        )
        for name, row in facts["lines"].items()
    ]
    tokens = model.seq_length // cp * cfg.train.micro_batch_size
    halves = 2 if model.gated_linear_unit else 1
    wide = ((halves + 1) * model.ffn_hidden_size + 2 * model.hidden_size) // tp
    lines.append(
        Line("gradients of one layer", tokens * wide * 2, "tokens x (gate's halves, product, two streams) x 2 bytes")
    )
    reported = min(row["gib"] for row in facts["allocator_total"]) * GiB
    total = reported if gpu == GPU else ceiling.gpus()[gpu].memory_bytes
    return Usable(round(total), tuple(lines))


def markdown(path: Path = FILE) -> str:
    """The facts as a table: what takes memory, how much, and who reported it."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| what | GiB | reported |", "|---|--:|---|"]
    for row in facts["allocator_total"]:
        lines.append(f"| torch's allocator sees | {row['gib']} | {row['says']}: {row['source']} |")
    for name, row in facts["lines"].items():
        per = " for each group" if row["per"] == "group" else ""
        lines.append(f"| {name}{per} takes | {row['mib'] / 1024:.2f} | {row['says']}: {row['source']} |")
    return "\n".join(lines)

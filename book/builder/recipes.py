"""NVIDIA's recipes for eight H100 as planned, as `data/recipes_8gpu_h100.json` and as tables of the book.

`python -m book.builder.recipes` writes the file; a test computes its pretraining recipes again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from book.builder import plan
from course_lib.common.project import DATA
from course_lib.common.units import gib
from course_lib.planning import recipe_plans

FILE = DATA / "recipes_8gpu_h100.json"


def make(task: str = "") -> dict[str, Any]:
    """All recipes, or those of one task, as they stand in the file."""
    from course_lib import stack

    stack.prepare_imports()
    return {
        "about": "Every recipe of the installed package for 8gpu_h100, planned on eight ranks. Nothing was run on a GPU.",
        "source": f"course_lib.planning.recipe_plans with {plan.packages()}",
        "rows": [recipe_plans.plan(*one) for one in recipe_plans.names() if task in one[2]],
    }


def read(path: Path = FILE) -> dict[str, Any]:
    """What the file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(content: Mapping[str, Any], *, tasks: tuple[str, ...]) -> str:
    """The recipes of some tasks as a table; all that cannot be built are one line below it.

    Args:
        content: What `read` or `make` returned.
        tasks: Of `pretrain`, `sft` and `peft`.
    """
    lines = ["| recipe | layout | number formats | planned, GiB | what memory says |", "|---|---|---|--:|---|"]
    rows = [row for row in content["rows"] if row["task"] in tasks]
    for row in rows:
        if "states_bytes" not in row:
            continue
        cuts = " ".join(
            f"{size.upper()}={row[size]}" for size in ("tp", "pp", "cp", "ep") if row[size] > 1 or size == "tp"
        )
        cuts += f", {row['seq_length']:,} tokens" + (f" x {row['micro_batch_size']}" * (row["micro_batch_size"] > 1))
        cuts += f", recomputes {row['recompute']}" if row["recompute"] else ""
        formats = f"{'FP8' if row['fp8'] else 'bf16'}, gradients {'fp32' if row['gradient_bytes'] == 4 else 'bf16'}"
        size = f"{gib(row['planned_bytes']):.1f}" if row["planned_bytes"] else f"states {gib(row['states_bytes']):.1f}"
        note = recipe_plans.NOTES.get(row["recipe"], "")
        note = f". {note[0].upper()}{note[1:]}" if note else ""
        lines.append(f"| `{_short(row)}` | {cuts} | {formats} | {size} | {recipe_plans.verdict(row)}{note} |")
    unknown = [f"`{_short(row)}`" for row in rows if "states_bytes" not in row]
    return "\n".join(
        [*lines, "", f"Not planned, because `data/models` does not have their shapes: {', '.join(unknown)}."]
    )


def _short(row: Mapping[str, Any]) -> str:
    """A recipe's name without what all of them share."""
    return row["recipe"].partition(":")[2].removesuffix("_config").replace("_8gpu_h100", "")


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")

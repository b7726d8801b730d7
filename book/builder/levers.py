"""The levers beside the layout on three models, as `data/levers.json` and as a table of the book.

`python -m book.builder.levers` writes the file; a test computes it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from book.builder import plan
from course_lib.common.project import DATA
from course_lib.common.units import gib
from course_lib.planning import levers, memory

FILE = DATA / "levers.json"


def make(models: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every lever for some models, 1B, 3B and 8B if None, without a cut and at TP=2, as it stands in the file."""
    rows = []
    for model, cfg in (models or plan.models()).items():
        for tp in (1, 2):
            base = memory.with_layout(cfg, tp=tp, sequence_parallel=tp > 1)
            for lever in levers.LEVERS:
                found = levers.effect(base, lever, ranks=plan.RANKS, vocab_size=plan.VOCAB_SIZE)
                change = found["ceiling_change"]
                found["ceiling_change"] = None if change is None else round(change, 4)
                rows.append({"model": model, "tp": tp, "dp": plan.RANKS // tp, "lever": lever.name} | found)
    return {
        "about": "Planned effect of one change each on the layouts of plans_8_gpu.json. Nothing was run on a GPU.",
        "source": f"course_lib.planning.levers with {plan.packages()}",
        "rows": rows,
    }


def read(path: Path = FILE) -> dict[str, Any]:
    """What the file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(content: Mapping[str, Any]) -> str:
    """The levers as a table: GiB saved for 1B, 3B and 8B, each at TP=1 and at TP=2, price and risk.

    Args:
        content: What `read` or `make` returned.
    """
    rows = {(row["lever"], row["tp"], row["model"]): row for row in content["rows"]}
    models = list(dict.fromkeys(row["model"] for row in content["rows"]))
    columns = [f"{model}, TP={tp}" for tp in (1, 2) for model in models]
    lines = [f"| lever | {' | '.join(columns)} | price | risk |", "|---|" + "--:|" * len(columns) + "---|---|"]
    for lever in levers.LEVERS:
        found = [rows[lever.name, tp, model] for tp in (1, 2) for model in models]
        changes = [row["ceiling_change"] for row in found if row["ceiling_change"]]
        price = lever.price
        if changes:
            price += f" ({-max(changes):.0%} to {-min(changes):.0%} of the ceiling)"
        saved = " | ".join(f"{gib(row['saved_bytes']):.1f}".replace("-", "−") for row in found)
        lines.append(f"| {lever.name} | {saved} | {price} | {lever.risk} |")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")

"""The eight-GPU plan of the book's page: three models, three layouts, planned bytes of the fullest rank.

The numbers are a row of `data/`, so that the book needs no model to be built; a test computes them again.
`python -m course_lib.eight_gpu_plan` writes the file.  Everything here is planned; nothing was run on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_lib.common.project import DATA

__all__ = ["FILE", "compute", "markdown", "read"]

FILE = DATA / "plans_8_gpu.json"
RANKS = 8
VOCAB_SIZE = 128256  # ids of Llama 3's tokenizer
LAYOUTS = ({"tp": 1, "cp": 1}, {"tp": 2, "cp": 1}, {"tp": 4, "cp": 1})
PUBLISHED = {"8B": ({"tp": 1, "cp": 2},)}
"""Layouts of one model besides: NVIDIA's recipe for 8B cuts its sequences."""
RECIPES = {"1B": "llama32_1b_pretrain_config", "3B": "llama32_3b_pretrain_config", "8B": "llama3_8b_pretrain_config"}


def compute() -> dict[str, Any]:
    """Plan every model in every layout, with the functions of lesson 06.

    Returns:
        What stands in the file: settings, and one row a plan with bytes by component.
    """
    from course_lib import memory, recipes, stack

    stack.prepare_imports()
    from megatron.bridge.recipes import llama

    rows = []
    for model, recipe in RECIPES.items():
        with recipes.offline():
            cfg = getattr(llama, recipe)()
        cfg.tokenizer.vocab_size = VOCAB_SIZE
        cfg.train.global_batch_size = 128
        for sizes in (*LAYOUTS, *PUBLISHED.get(model, ())):
            plan = memory.plan(memory.with_layout(cfg, **sizes, sequence_parallel=sizes["tp"] > 1), ranks=RANKS)
            row = {"model": model, "recipe": recipe, "tp": sizes["tp"], "pp": 1, "cp": sizes["cp"]}
            row["dp"] = RANKS // sizes["tp"] // sizes["cp"]
            row |= {"seq_length": cfg.model.seq_length, "micro_batch_size": cfg.train.micro_batch_size}
            rows.append(row | {"bytes": plan.components, "total_bytes": plan.total_bytes})
    versions = stack.versions()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("megatron-bridge", "megatron-core"))
    return {
        "about": "Planned bytes of the rank that needs the most, bf16 with fp32 gradients and the distributed optimizer, "
        "sequence parallelism where TP is above 1, no recomputation. Nothing was run on a GPU.",
        "source": f"course_lib.memory.plan (lesson 06) with {packages}",
        "vocab_size": VOCAB_SIZE,
        "plans": rows,
    }


def read(path: Path = FILE) -> dict[str, Any]:
    """What the file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(plans: dict[str, Any]) -> str:
    """The plan as a table in GiB, the verdict for an 80 GB H100 beside each row: its share of the memory that the driver reports.

    Args:
        plans: What `read` or `compute` returned.
    """
    from course_lib import compute as gpu_facts
    from course_lib.common.units import gib

    gpu = gpu_facts.gpus()["H100 SXM 80GB"]
    parts = list(plans["plans"][0]["bytes"])
    lines = [f"| model | layout | {' | '.join(parts)} | total, GiB | of an 80 GB H100 |"]
    lines.append("|---|---|" + "--:|" * (len(parts) + 2))
    for row in plans["plans"]:
        share = row["total_bytes"] / gpu.memory_bytes
        sizes = " | ".join(f"{gib(size):.1f}" for size in row["bytes"].values())
        cut = f" CP={row['cp']}" if row["cp"] > 1 else ""
        layout = f"TP={row['tp']} PP={row['pp']}{cut} DP={row['dp']}"
        verdict = f"{share:.0%}" + ("" if share < 1 else ", does not fit")
        lines.append(f"| {row['model']} | {layout} | {sizes} | {gib(row['total_bytes']):.1f} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(json.dumps(compute(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")

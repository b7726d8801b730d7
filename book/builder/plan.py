"""The eight-GPU plan of the book's page: three models, three layouts, planned bytes of the fullest rank.

The numbers are a row of `data/`, so that the book needs no model to be built; a test computes them again.
`python -m book.builder.plan` writes the file.  Everything here is planned; nothing was run on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_lib.common.project import DATA

__all__ = ["FILE", "make", "markdown", "models", "read"]

FILE = DATA / "plans_8_gpu.json"
RANKS = 8
VOCAB_SIZE = 128256  # ids of Llama 3's tokenizer
LAYOUTS = ({"tp": 2}, {"tp": 1}, {"tp": 4})
"""In the order in which they are tried."""
OTHERS = {"8B": ({"pp": 2}, {"cp": 2})}
"""Layouts of one model besides: a pipeline, and what NVIDIA's recipe for 8B does, which cuts its sequences."""
RECIPES = {"1B": "llama32_1b_pretrain_config", "3B": "llama32_3b_pretrain_config", "8B": "llama3_8b_pretrain_config"}


def models() -> dict[str, Any]:
    """The recipes of `RECIPES` by model, with Llama 3's ids, 128 sequences a step, and sequences that are whole."""
    from course_lib import recipes, stack

    stack.prepare_imports()
    from megatron.bridge.recipes import llama

    found = {}
    for model, recipe in RECIPES.items():
        with recipes.offline():
            found[model] = getattr(llama, recipe)()
        found[model].tokenizer.vocab_size, found[model].train.global_batch_size = VOCAB_SIZE, 128
        found[model].model.context_parallel_size = 1
    return found


def make() -> dict[str, Any]:
    """Plan every model in every layout, with the functions of lesson 06.

    Returns:
        What stands in the file: settings, and one row a plan with bytes by component.
    """
    from course_lib.planning import ceiling, memory, usable
    from course_lib.reading import baselines

    rows, first = [], {}
    gpu = ceiling.gpus()["H100 SXM 80GB"]
    for model, cfg in models().items():
        recipe = RECIPES[model]
        first[model] = round(baselines.first_loss(VOCAB_SIZE, cfg.model.hidden_size, cfg.model.init_method_std), 3)
        for sizes in (*LAYOUTS, *OTHERS.get(model, ())):
            cut = memory.with_layout(cfg, **sizes, sequence_parallel=sizes.get("tp", 1) > 1)
            plan, room = memory.plan(cut, ranks=RANKS), usable.of(cut, ranks=RANKS)
            row = {"model": model, "recipe": recipe} | {name: sizes.get(name, 1) for name in ("tp", "pp", "cp")}
            row["dp"] = plan.layout.data_parallel_size
            row |= {"seq_length": cfg.model.seq_length, "micro_batch_size": cfg.train.micro_batch_size}
            best = ceiling.of(cut, ranks=RANKS, gpu=gpu, vocab_size=VOCAB_SIZE).tokens_per_second_per_gpu
            row["tokens_per_second_per_gpu_at_best"] = round(best)
            rows.append(
                row | {"bytes": plan.components, "total_bytes": plan.total_bytes, "usable_bytes": room.usable_bytes}
            )
    return {
        "about": "Planned bytes of the rank that needs the most, bf16 with fp32 gradients and the distributed optimizer, "
        "sequence parallelism where TP is above 1, no recomputation. Nothing was run on a GPU.",
        "source": f"course_lib.planning.memory.plan (lesson 06) with {packages()}",
        "vocab_size": VOCAB_SIZE,
        "first_losses": first,
        "plans": rows,
    }


def packages() -> str:
    """What a planned number was computed with: the installed packages that decide it, and their versions."""
    from course_lib import stack

    versions = stack.versions()
    return ", ".join(f"{name} {versions[name]}" for name in ("megatron-bridge", "megatron-core"))


def read(path: Path = FILE) -> dict[str, Any]:
    """What the file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(plans: dict[str, Any]) -> str:
    """The plan as a table in GiB, with what a plan may use of an 80 GB H100 beside each row, and what is left of it.

    Less than nothing is left where a plan does not fit.
    PP and CP are named where they cut.

    Args:
        plans: What `read` or `make` returned.
    """
    from course_lib.common.units import gib

    parts = list(plans["plans"][0]["bytes"])
    lines = [f"| model | layout | {' | '.join(parts)} | total, GiB | usable | left |"]
    lines.append("|---|---|" + "--:|" * (len(parts) + 3))
    for row in plans["plans"]:
        left = gib(row["usable_bytes"] - row["total_bytes"])
        sizes = " | ".join(f"{gib(size):.1f}" for size in row["bytes"].values())
        cut = f" CP={row['cp']}" if row["cp"] > 1 else ""
        layout = f"TP={row['tp']}{f' PP={row["pp"]}' * (row['pp'] > 1)}{cut} DP={row['dp']}"
        verdict = f"{left:.1f}" if left >= 0 else f"**\u2212{-left:.1f}**"
        total, room = gib(row["total_bytes"]), gib(row["usable_bytes"])
        lines.append(f"| {row['model']} | {layout} | {sizes} | {total:.1f} | {room:.1f} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")

"""Lesson 14 under several seeds, as `data/alignment_seeds.json`, which the lesson holds its own numbers against.

`python -m book.builder.alignment 1 2 3` runs the lesson once a seed, some minutes each, and writes the file after each.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from course_lib.common import files
from course_lib.common.project import DATA
from course_lib.lesson import notebooks

FILE = DATA / "alignment_seeds.json"


def run(seed: int) -> dict[str, float]:
    """What the lesson measures under a seed."""
    parameters = {"seed": seed, "hold_against_seeds": False}
    with tempfile.TemporaryDirectory() as folder:
        return notebooks.execute("14", parameters=parameters, output_directory=Path(folder)).values["measured"]


def content(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content: the rows, and how they were measured."""
    packages = ("torch", "trl", "transformers", "nemo-gym", "megatron-bridge", "megatron-core")
    command = "python -m book.builder.alignment " + " ".join(str(row["seed"]) for row in rows)
    return {
        "about": "Lesson 14 once a seed, of the data's order, the faults and what is sampled, from one fine-tuned model.",
        "source": f"measured by this course: {command}, on 2 CPU cores",
        "date": datetime.date.today().isoformat(),
        "versions": {name: metadata.version(name) for name in packages},
        "rows": rows,
    }


if __name__ == "__main__":
    kept = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.exists() else []
    for seed in map(int, sys.argv[1:]):
        new = {"seed": seed} | run(seed)
        kept = sorted([*(row for row in kept if row["seed"] != seed), new], key=lambda row: row["seed"])
        files.write_text(FILE, json.dumps(content(kept), indent=1) + "\n")
        print(f"wrote {FILE}")

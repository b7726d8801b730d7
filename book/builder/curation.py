"""What lesson 18 shows and has no time to measure, as `data/curation_pays.json` and `data/curator_executors.json`.

`python -m book.builder.curation pays` trains on texts with different shares of noise and behind filters that are too
strict, in some minutes; `python -m book.builder.curation executors` tries each of Curator's executors on 2 cores.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from course_lib import launch, runs, stack
from course_lib.common import files
from course_lib.common.project import DATA
from course_lib.experiments import curated, executors, sweep
from course_lib.text import curation, planted

PAYS, EXECUTORS = DATA / "curation_pays.json", DATA / "curator_executors.json"
SEEDS, STEPS = (1, 2, 3), 240
NOISE_DOCUMENTS = (0.25, 1, 3)
"""German documents for each good one."""
SIGNS = (0.25, 0.15)
"""Largest shares of signs: Curator's default, and one that spares almost nothing but plain sentences."""
DEADLINE_SECONDS = 240.0
HERE = "none, in this process"


def pays() -> dict[str, Any]:
    """Bits per byte of held-out text, without and with each curation, once a seed."""
    launch.warm_up()
    stack.prepare_imports()
    curation.quiet()
    from nemo_curator.stages.text.filters.heuristic import string

    train, held_out = curated.split(planted.prose())
    english = string.CommonEnglishWordsFilter()
    parts = {f"noise {noise}": curated.collected(train, noise) for noise in NOISE_DOCUMENTS}
    parts["clean"] = curated.kept(english, parts[f"noise {NOISE_DOCUMENTS[-1]}"])
    for share in SIGNS:
        parts[f"signs {share}"] = curated.kept(string.NonAlphaNumericFilter(share), parts["clean"])
    written = curated.write(parts | {"held-out": held_out}, runs.directory() / "curation-pays", vocabulary_of=train)

    def bits(part: str) -> list[float]:
        cfg = curated.config(written[part], written["held-out"], steps=STEPS)
        done = sweep.repeat(cfg, seeds=SEEDS, name=part.replace(" ", "-"), ranks=curated.RANKS)
        return [round(curated.bits_per_byte(run, written["held-out"]), 4) for run in done]

    rows = []
    for noise in NOISE_DOCUMENTS:
        share = noise / (1 + noise)
        tokens = 1 - written["clean"].tokens / written[f"noise {noise}"].tokens
        rows.append(
            {"what": f"{share:.0%} German, taken out", "noise_documents": share, "noise_tokens": round(tokens, 3)}
        )
        rows[-1] |= {"before": bits(f"noise {noise}"), "after": bits("clean")}
    for share in SIGNS:
        left = written[f"signs {share}"].tokens / written["clean"].tokens
        rows.append({"what": f"at most {share:.0%} signs", "tokens_left": round(left, 3)})
        rows[-1] |= {"before": bits("clean"), "after": bits(f"signs {share}")}
    return {
        "about": "Bits per byte of held-out text before and after a curation, once a seed, for the same number of tokens.",
        "seeds": SEEDS,
        "steps": STEPS,
        "tokens": STEPS * curated.BATCH * curated.LENGTH,
        "rows": rows,
    }


def tried(names: Sequence[str]) -> dict[str, Any]:
    """Four stages over the lesson's crawl by these executors; rows of others stay as they were measured."""
    curation.quiet()
    from nemo_curator.stages.text.filters import ScoreFilter
    from nemo_curator.stages.text.filters.heuristic import string
    from nemo_curator.stages.text.io.reader import JsonlReader
    from nemo_curator.stages.text.io.writer import JsonlWriter

    rows = {row["executor"]: row for row in curated.known(EXECUTORS.stem)["rows"]} if EXECUTORS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        paths = curation.write(planted.faults(planted.prose()[:400], each=50), work / "crawl", partitions=4)
        for name in names:
            found = [string.WordCountFilter(min_words=10), string.BoilerPlateStringFilter()]
            reader = JsonlReader(file_paths=paths, files_per_partition=1)
            out = work / name.replace(", ", "-")
            stages = [reader, *map(ScoreFilter, found), JsonlWriter(path=str(out), mode="overwrite")]
            begin = time.perf_counter()
            if name == HERE:
                curation.step(stages)
                row = {"outcome": "succeeded", "start s": 0.0, "run s": round(time.perf_counter() - begin, 1)}
                row |= {"peak GiB": None, "ended by id": 0, "why": ""}
            else:
                one = executors.run(stages, name, deadline_seconds=DEADLINE_SECONDS)
                row = {"outcome": one.status, "start s": one.start_seconds, "run s": one.run_seconds}
                row |= {"peak GiB": round(one.peak_bytes / 2**30, 2), "ended by id": one.left, "why": one.why}
            documents = len(curation.kept(out)) if row["outcome"] == "succeeded" else None
            rows[name] = {"executor": name, "documents": documents} | row
            print(rows[name])
    about = "Four stages over 700 documents by each of Curator's executors; seconds are those of a busy machine."
    order = [name for name in (HERE, *executors.EXECUTORS) if name in rows]
    return {"about": about, "deadline_seconds": DEADLINE_SECONDS, "rows": [rows[name] for name in order]}


if __name__ == "__main__":
    name, *names = sys.argv[1:]
    file, content = (PAYS, pays()) if name == "pays" else (EXECUTORS, tried(names or (HERE, *executors.EXECUTORS)))
    packages = ("nemo-curator", "ray", "cosmos-xenna", "torch", "megatron-bridge", "megatron-core")
    content |= {
        "source": f"measured by this course: python -m book.builder.curation {name}, on 2 CPU cores",
        "date": datetime.date.today().isoformat(),
        "versions": {package: metadata.version(package) for package in packages},
    }
    files.write_text(file, json.dumps(content, indent=1) + "\n")
    print(f"wrote {file}")

"""What lesson 18 shows and has no time to measure, as `data/curation_pays.json` and `data/curator_executors.json`.

`python -m book.builder.curation pays` trains on texts with different shares of noise and behind filters that are too
strict, in some minutes; `python -m book.builder.curation executors` tries each of Curator's executors on 2 cores.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

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
DEADLINE_SECONDS = 200.0


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


def crawled(work: Path) -> list[str]:
    """The lesson's crawl in four files, and which of its documents are copies."""
    crawl = planted.faults(planted.prose()[:400], each=50)
    by_text = crawl.groupby("text")["id"].agg(list)
    curation.identify(by_text[by_text.map(len) > 1], work / "remove.parquet")
    return curation.write(crawl, work / "crawl", partitions=4)


def lesson_stages(paths: list[str], work: Path, out: Path) -> list[Any]:
    """The stages of lesson 18: reader, removal, four filters, writer."""
    from nemo_curator.stages.text.deduplication.removal import TextDuplicatesRemovalStage
    from nemo_curator.stages.text.filters import ScoreFilter
    from nemo_curator.stages.text.filters.heuristic import string
    from nemo_curator.stages.text.io.reader import JsonlReader
    from nemo_curator.stages.text.io.writer import JsonlWriter

    found = [string.WordCountFilter(min_words=10), string.NonAlphaNumericFilter(0.35)]
    found += [string.BoilerPlateStringFilter(), string.CommonEnglishWordsFilter()]
    return [
        JsonlReader(file_paths=paths, files_per_partition=1),
        TextDuplicatesRemovalStage(ids_to_remove_path=str(work / "remove.parquet"), id_field="id"),
        *map(ScoreFilter, found),
        JsonlWriter(path=str(out), mode="overwrite"),
    ]


def tried(names: Sequence[str]) -> dict[str, Any]:
    """The lesson's stages by these executors; rows of others stay where they were measured with the same packages."""
    curation.quiet()
    before = json.loads(EXECUTORS.read_text(encoding="utf-8")) if EXECUTORS.exists() else {}
    rows = {row["executor"]: row for row in before.get("rows", []) if before["versions"] == versions()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        paths = crawled(work)
        for name in names:
            out = work / name.replace(", ", "-")
            load = os.getloadavg()[0]
            one = executors.run(lesson_stages(paths, work, out), name, deadline_seconds=DEADLINE_SECONDS)
            rows[name] = {
                "executor": name,
                "outcome": one.status,
                "documents": len(curation.kept(out)) if one.status == "succeeded" else None,
                "start s": one.start_seconds,
                "run s": one.run_seconds,
                "processor s": one.processor_seconds,
                "peak GiB": round(one.peak_bytes / 2**30, 2),
                "load": round((load + os.getloadavg()[0]) / 2, 1),
                "ended by id": one.left,
                "date": datetime.date.today().isoformat(),
                "why": one.why,
            }
            print(rows[name], flush=True)
    return {
        "about": "The stages of lesson 18 over 700 documents in four files; an executor without a row was not run with them.",
        "deadline_seconds": DEADLINE_SECONDS,
        "machine": f"{executors.CORES} of {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
        "units": {
            "start s": "wall seconds until Ray answers",
            "run s": "wall seconds of the stages",
            "processor s": "of all its processes, imports and Ray's own among them",
            "peak GiB": "all its processes together, shared pages once",
            "load": "of the whole machine, mean of its minute before and after the run",
            "ended by id": "processes that were left and had to be ended",
        },
        "rows": [rows[name] for name in executors.EXECUTORS if name in rows],
    }


def versions() -> dict[str, str]:
    """Releases of what these numbers depend on."""
    packages = ("nemo-curator", "ray", "cosmos-xenna", "torch", "megatron-bridge", "megatron-core")
    return {package: metadata.version(package) for package in packages}


if __name__ == "__main__":
    name, *names = sys.argv[1:]
    file, content = (PAYS, pays()) if name == "pays" else (EXECUTORS, tried(names or executors.EXECUTORS))
    how = "on 2 CPU cores" if name == "pays" else "each row under the load and on the date that it says"
    content |= {
        "source": f"measured by this course: python -m book.builder.curation {name}, {how}",
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }
    files.write_text(file, json.dumps(content, indent=1) + "\n")
    print(f"wrote {file}")

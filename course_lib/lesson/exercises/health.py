"""Lesson 08: how long a leak takes, a learning rate that is tamed, and three sick runs without a name."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

from course_lib import runs
from course_lib.common import config
from course_lib.common.units import GB, GiB, MiB
from course_lib.lesson.verdicts import Unfit, Verdict, own_run, right, value, wrong

DISEASES = ("learning rate too high", "one rank keeps memory", "another vocabulary", "steps are skipped")
"""What a run of the exercise may have."""

SICK = {"run-a": DISEASES[2], "run-b": DISEASES[0], "run-c": DISEASES[1]}
STEPS, RANKS, VOCABULARY = 40, 8, 8192


def steps_until_full(answer: int, spare_bytes: int, bytes_per_step: int) -> Verdict:
    """How many further steps does a rank take until it holds so many bytes more?"""
    expected = spare_bytes // bytes_per_step
    return value(
        answer,
        expected,
        why="the spare bytes over the bytes of a step; the losses would have said nothing until the end.",
        otherwise="Bytes over bytes a step, both counted in the same unit.",
        hints=[
            (int(spare_bytes / GiB * GB) // bytes_per_step, "GiB is 2**30 bytes; that counts with 10**9."),
            (expected // RANKS, "Only one rank of eight grows, and nobody shares its memory."),
        ],
    )


def tamed(answer: runs.Run | str, hot: runs.Run) -> Verdict:
    """Which run differs from the hot one in its peak learning rate alone, and is healthy?"""
    from course_lib.reading import health

    run = own_run(answer)
    mine, theirs = config.flatten(run.config), config.flatten(hot.config)
    if mine["optimizer.lr"] >= theirs["optimizer.lr"]:
        return wrong(
            f"Its peak learning rate is {mine['optimizer.lr']:g}, and that of the hot run {theirs['optimizer.lr']:g}."
        )
    parts = ("model.", "train.", "scheduler.lr_warmup", "optimizer.")
    other = sorted(n for n in theirs if n.startswith(parts) and n != "optimizer.lr" and mine.get(n) != theirs[n])
    if other:
        return wrong(f"{', '.join(other[:3])} differ as well: then nobody knows what tamed it.")
    calm = health.smoothed(run.metrics.loss.astype(float))
    rise = float((calm - calm.cummin()).max())
    if rise > health.SPIKE_NATS:
        return wrong(f"Its smoothed loss still rises by {rise:.2f} nats/token above its lowest: lower yet.")
    last, before = run.metrics.loss.iloc[-1], hot.metrics.loss.iloc[-1]
    if not last < before:
        return wrong(
            f"It is calm, and ends at {last:.2f} nats/token, no lower than the hot run's {before:.2f}: that rate is too small."
        )
    return right(f"it ends at {last:.2f} nats/token, where the hot run had {before:.2f}, and nothing else was changed.")


def sick_runs(folder: Path) -> dict[str, runs.Run]:
    """Three run directories by name, each of a run that has one of the `DISEASES`."""
    return {name: _sick(folder / name, disease) for name, disease in SICK.items()}


def _sick(folder: Path, disease: str) -> runs.Run:
    """A run directory with the signs of a disease, and with the jitter that batches have."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(disease)
    model = {"hidden_size": 256, "init_method_std": 0.02}
    (folder / "config.yaml").write_text(json.dumps({"model": model}), encoding="utf-8")
    (folder / "launch.json").write_text(json.dumps({"device": "cpu", "ranks": RANKS}), encoding="utf-8")
    (folder / "outcome.json").write_text(json.dumps({"status": "succeeded"}), encoding="utf-8")
    hot, ids = disease == DISEASES[0], 131_072 if disease == DISEASES[2] else VOCABULARY
    steps, memory = [], []
    for step in range(1, STEPS + 1):
        loss = math.log(ids) + 0.05 - 3 * (1 - math.exp(-step / 15)) + draw.uniform(-0.1, 0.1) * (step > 1)
        loss += 0.25 * max(0, step - 12) * (step < 24) * hot + 2.7 * (step >= 24) * hot
        norm = 1.2 + draw.uniform(-0.2, 0.2) + 3 * (step > 12) * hot
        row = {
            "step": step,
            "time": float(step),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": 1e-3,
            "elapsed_ms": 500.0,
        }
        steps.append(row | {"tokens": 2048, "tokens_per_second": 4096.0, "skipped": False})
        for rank in range(RANKS):
            grown = 12 * MiB * step * (rank == 5 and disease == DISEASES[1])
            held = int(300 * MiB + draw.uniform(0, 2) * MiB + grown)
            memory.append(
                {"rank": rank, "step": step, "time": float(step), "memory_bytes": held, "peak_memory_bytes": held}
            )
    for name, rows in (("metrics", steps), ("memory", memory)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return runs.Run(folder)


def diagnoses(answer: Mapping[str, str]) -> Verdict:
    """Which disease has each of the three runs?"""
    if not isinstance(answer, Mapping) or not set(answer.values()) <= set(DISEASES):
        raise Unfit(f"a dictionary is asked for, from each run to one of {', '.join(map(repr, DISEASES))}")
    if missing := sorted(set(SICK) - set(answer)):
        return wrong(f"Not judged: {', '.join(missing)}.")
    look = {
        DISEASES[0]: "its smoothed loss has a lowest point long before the end: what happens after it?",
        DISEASES[1]: "its losses are spotless, so look at what each rank holds, step after step.",
        DISEASES[2]: "hold its very first loss against the formula, with the ids of the tokenizer that it should have.",
    }
    for name, disease in SICK.items():
        if answer[name] != disease:
            return wrong(f"{name}: {look[disease]}")
    return right(
        "three diseases, three places to look: the first step, the shape of the curve, and memory rank by rank."
    )

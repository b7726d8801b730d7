"""What people answer: for each exercise the solution and two wrong answers, a module a lesson as in the library.

An exercise `course_lib.lesson.exercises.NAME.judge` is tried with what `support.tried.NAME.judge(folder)` returns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from course_lib import runs


@dataclass(frozen=True)
class Tried:
    """Answers to one exercise.

    Attributes:
        solution: A right answer.
        wrong: Answers that people really give, each with words of its own hint; two of them at least.
        facts: What the exercise gets besides the answer.
    """

    solution: Any
    wrong: Sequence[tuple[Any, str]]
    facts: Sequence[Any] = ()


def run(
    folder: Path,
    name: str,
    *,
    losses: Sequence[float] = (7.0, 6.5, 6.0),
    config: Mapping[str, Any] | None = None,
    launch: Mapping[str, Any] | None = None,
    status: str = "succeeded",
    **columns: Sequence[Any],
) -> runs.Run:
    """A run directory as training leaves it behind, made of what a test says about it.

    Args:
        folder: Where the run's directory goes.
        name: Its name.
        losses: The loss of each step, in nats per token.
        config: What `config.yaml` says.
        launch: What `launch.json` says besides the device.
        status: How the run ended.
        columns: More columns of `metrics.jsonl`, a value a step.
    """
    place = folder / name
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(dict(config or {})))
    (place / "launch.json").write_text(json.dumps({"device": "cpu", **(launch or {})}))
    filled = {"loss": losses, "grad_norm": [loss / 10 for loss in losses], **columns}
    rows = [
        {"step": step, **{column: values[step - 1] for column, values in filled.items()}}
        for step in range(1, len(losses) + 1)
    ]
    assert all(math.isfinite(row["loss"]) for row in rows)
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "outcome.json").write_text(json.dumps({"status": status}))
    return runs.Run(place)

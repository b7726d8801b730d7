"""Lesson A: when a blend is fair, a guard before a run, and a configuration with three failures in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib import stack
from course_lib.common import config
from course_lib.experiments import specimens
from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong
from course_lib.planning import layout
from course_lib.runs import field_values

__all__ = ["Trials", "guard", "mended", "samples_until_fair", "three_failures", "trial_files"]

EVERY = 50  # steps between two checkpoints
PATTERN, TENSOR, EXPERTS, RANKS = "MEM*E", 2, 4, 8


@dataclass(frozen=True)
class Trials:
    """Three files and what is right to say of them.

    Attributes:
        good: A prefix whose `.bin` and `.idx` are whole.
        cut: One whose `.bin` ends early.
        rows: So many rows has the embedding; it has one for each id of `good`.
    """

    good: Path
    cut: Path
    rows: int


def samples_until_fair(answer: int, weights: Sequence[float]) -> Verdict:
    """From how many samples on is the small source's share at most twice its weight?"""
    small = min(weights) / sum(weights)
    fair = round(0.5 / small)  # it gives its first sample at once, and its second only when it is behind again
    return value(
        answer,
        fair,
        why="one sample in so many is twice the weight; it comes first, and then not again for a long time.",
        otherwise="The small source gives one sample early: after how many is one sample no more than twice its weight?",
        hints=[
            (round(1 / small), "Then the share is the weight itself; the question asks for twice the weight."),
            (10, "Ten samples have one of the small source among them: that is a tenth."),
        ],
        atol=1,
    )


def trial_files(folder: Path) -> Trials:
    """Make the files on which a guard is tried."""
    folder.mkdir(parents=True, exist_ok=True)
    good, cut = (specimens.corpus(folder / name, documents=10) for name in ("good", "cut"))
    with Path(f"{cut}.bin").open("r+b") as file:
        file.truncate(400)
    return Trials(good, cut, specimens.VOCABULARY)


def guard(answer: Callable[[Path, int], Any], trials: Trials) -> Verdict:
    """A function of a prefix and a number of rows that says whether a model with so many rows can train on the file."""
    if not callable(answer):
        raise Unfit(f"a function of prefix and rows is asked for; yours is of type {type(answer).__name__}")
    if not answer(trials.good, trials.rows):
        return wrong("It stops a file that is whole, and whose ids all have a row.")
    if answer(trials.cut, trials.rows):
        return wrong("It lets a file pass whose last documents are missing: its index promises more than there is.")
    largest = min(specimens.LENGTH - 1, specimens.VOCABULARY - 1)
    if answer(trials.good, largest):
        return wrong("It lets an id pass that has no row: with n rows the largest id is n - 1.")
    if not answer(trials.good, largest + 2):
        return wrong("It asks for more rows than the ids need.")
    return right("a second before the start instead of a message without a file name in the middle of a run.")


def three_failures() -> Any:
    """A configuration with a field that does not exist, a wrong number of layers, and experts without sequence parallelism."""
    stack.prepare_imports()
    from megatron.bridge.recipes.nemotronh import nemotron_3_nano as nano

    cfg = nano.nemotron_3_nano_pretrain_config()
    cfg.train.save_interval = EVERY
    cfg.model.hybrid_layer_pattern = PATTERN
    cfg.model.num_layers = len(PATTERN) + 1
    cfg.model.tensor_model_parallel_size = TENSOR
    cfg.model.expert_model_parallel_size = EXPERTS
    cfg.model.sequence_parallel = False
    return cfg


def mended(answer: Any, broken: Any) -> Verdict:
    """The configuration without its three failures, and otherwise as it was meant."""
    if not config.has(answer, "checkpoint.save_interval"):
        raise Unfit(f"a configuration is asked for; yours is of type {type(answer).__name__}")
    try:
        field_values.check_fields(answer)
    except field_values.FieldError as error:
        return wrong(f"One field is read by nobody: {error}")
    if answer.checkpoint.save_interval != EVERY:
        return wrong(f"It saves every {answer.checkpoint.save_interval} steps, and {EVERY} were meant.")
    model = answer.model
    if (model.hybrid_layer_pattern, model.num_layers) not in ((PATTERN, len(PATTERN)), (PATTERN, None)):
        return wrong(f"{model.num_layers} layers and the pattern {model.hybrid_layer_pattern!r}: count its letters.")
    if (model.tensor_model_parallel_size, model.expert_model_parallel_size) != (TENSOR, EXPERTS):
        return wrong(f"TP={TENSOR} and EP={EXPERTS} were meant to stay.")
    try:
        layout.require(answer, RANKS)
    except layout.LayoutError as error:
        return wrong(f"The layout is refused: {error}")
    return right("only the number of layers would have been refused by Bridge before a rank was started.")

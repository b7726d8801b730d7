"""Lesson 15: count what a better model lost, game a checker with one sentence, and mend an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.lesson.verdicts import Unfit, Verdict, right, value, wrong
from course_lib.reading import evaluation
from course_lib.text import docstrings

if TYPE_CHECKING:
    from course_lib.text.tasks import Pair

__all__ = ["broken_export", "lost_items", "mended_export", "one_for_all"]

BASE_OF_POSITIONS = 10_000.0
"""The base of the position code of older models, and the default of transformers."""


def lost_items(answer: int, outcomes: Callable[[str, str], Sequence[bool]]) -> Verdict:
    """How many items did the preferred model get wrong that the fine-tuned one had right?"""
    before, after = (outcomes(name, "pep257_fault") for name in ("fine-tuned", "preferred"))
    found = evaluation.paired(before, after)
    return value(
        answer,
        found.only_first,
        why="the rest of the difference is items that were won, and a score alone hides both.",
        otherwise="Put the two lists side by side and count where the first is true and the second false.",
        hints=[
            (found.only_second, "Those are the items that it won; the question is about those that it lost."),
            (
                found.only_second - found.only_first,
                "That is the difference of the two scores, won minus lost; count the lost ones alone.",
            ),
            (found.only_first + found.only_second, "Those are all items on which the two disagree."),
        ],
    )


def one_for_all(answer: str, pairs: Sequence[Pair], found: Mapping[str, Any]) -> Verdict:
    """One sentence that passes, and shares more words with the true docstrings than the model's own answers."""
    if not isinstance(answer, str):
        raise Unfit(f"a sentence is asked for, a string; yours is of type {type(answer).__name__}")
    failed = [name for name, holds in docstrings.checks(answer).items() if not holds]
    if failed:
        return wrong(f"It does not pass: {', '.join(failed)}.")
    shared = evaluation.mean([evaluation.word_f1(answer, pair.output) for pair in pairs]).value
    wanted = found["fine-tuned"].word_f1.value
    if shared <= wanted:
        return wrong(
            f"It passes, and shares {shared:.3f} with the truth, the model's answers {wanted:.3f}. Take the words that most "
            "docstrings have: which ones stand in nearly every one of them?"
        )
    return right(
        f"{shared:.3f} against {wanted:.3f}, and it knows no function. A second measure helps only until somebody aims at it."
    )


def broken_export(folder: Path, place: Path) -> Path:
    """A copy of an exported folder whose position code has another base.

    Args:
        folder: The sound one.
        place: Where the copy goes; what stands there is replaced.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = BASE_OF_POSITIONS
    (place / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return place


def mended_export(answer: Path, sound: Path, broken: Path) -> Verdict:
    """A folder with the configuration of the sound one, made of the broken one."""
    try:
        place = Path(answer)
    except TypeError:
        raise Unfit(f"a folder is asked for; yours is of type {type(answer).__name__}") from None
    if not (place / "config.json").exists():
        raise Unfit(f"{place} has no config.json: give the mended folder")
    if place.resolve() == Path(sound).resolve():
        return wrong("That is the sound folder itself. On another machine you would not have it: mend the broken one.")
    mine, theirs = (json.loads((each / "config.json").read_text(encoding="utf-8")) for each in (place, Path(sound)))
    if mine == theirs:
        return right(
            "no weight was wrong: a position code has none, so nothing was missing when the folder was loaded."
        )
    names = [name for name in theirs if mine.get(name) != theirs[name]]
    if names == ["rope_parameters"] and mine["rope_parameters"]["rope_theta"] == BASE_OF_POSITIONS:
        return wrong(
            "The weights are sound, and they are not all that makes a model. Compare `config.json` with the checkpoint's "
            "`run_config.yaml`, whose `rotary_base` has a number."
        )
    return wrong(
        f"{', '.join(names) or 'something'} is not what the exporter wrote: change what is wrong, and nothing else."
    )

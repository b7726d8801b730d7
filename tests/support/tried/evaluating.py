"""Answers to the exercises of lesson 15."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from course_lib.lesson.exercises import evaluating
from course_lib.text.tasks import Pair
from support.tried import Tried


def lost_items(folder: Path) -> Tried:
    """Counting the won ones, the difference, and both."""
    right = {"fine-tuned": [True] * 3 + [False] * 7 + [True] * 5, "preferred": [False] * 3 + [True] * 7 + [True] * 5}
    wrong = [(7, "items that it won"), (4, "won minus lost"), (10, "disagree"), (99, "side by side")]
    return Tried(3, wrong, [lambda name, task: right[name]])


def one_for_all(folder: Path) -> Tried:
    """A sentence with a fault, and one that says nothing."""
    pairs = [Pair("f: def f()", "Return the name of the given file.", "m")] * 4
    found = {"fine-tuned": SimpleNamespace(word_f1=SimpleNamespace(value=0.4))}
    wrong = [
        ("returns the file.", "begins with a capital"),
        ("Do some other things now.", "shares 0.000"),
        (3, "a string"),
    ]
    return Tried("Return a name of the given file.", wrong, [pairs, found])


def mended_export(folder: Path) -> Tried:
    """The sound folder itself, the broken one as it is, and one with another change."""
    sound, other = folder / "sound", folder / "other"
    sound.mkdir()
    (sound / "config.json").write_text(json.dumps({"vocab_size": 8, "rope_parameters": {"rope_theta": 500000.0}}))
    broken = evaluating.broken_export(sound, folder / "broken")
    mended = evaluating.broken_export(sound, folder / "mended")
    (mended / "config.json").write_bytes((sound / "config.json").read_bytes())
    evaluating.broken_export(sound, other)
    (other / "config.json").write_text(json.dumps({"vocab_size": 9, "rope_parameters": {"rope_theta": 500000.0}}))
    wrong = [
        (sound, "sound folder itself"),
        (broken, "rotary_base"),
        (other, "vocab_size is not"),
        (5, "a folder is asked for"),
    ]
    return Tried(mended, wrong, [sound, broken])

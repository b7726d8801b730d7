"""Answers to the exercises of lesson A."""

from __future__ import annotations

from pathlib import Path

from course_lib.lesson.exercises import failures
from course_lib.text import microscope
from support.tried import Tried


def samples_until_fair(folder: Path) -> Tried:
    """One sample in 500 is twice a thousandth."""
    return Tried(500, [(1000, "twice the weight"), (10, "a tenth"), (7, "no more than twice")], [[0.999, 0.001]])


def guard(folder: Path) -> Tried:
    """Guards that look at everything, at nothing, at the length only, and at one id too few."""
    trials = failures.trial_files(folder)

    def whole(prefix):
        try:
            index = microscope.read(prefix)
        except microscope.ForeignFile:
            return None
        return [microscope.document(index, number).max() for number in range(len(index.lengths))]

    def right(prefix, rows):
        largest = whole(prefix)
        return largest is not None and max(largest) < rows

    wrong = [
        (lambda prefix, rows: True, "last documents are missing"),
        (lambda prefix, rows: False, "stops a file that is whole"),
        (lambda prefix, rows: whole(prefix) is not None, "with n rows the largest id is n - 1"),
        (lambda prefix, rows: right(prefix, rows) and rows > 40, "more rows than the ids need"),
        (3, "a function of prefix and rows"),
    ]
    return Tried(right, wrong, [trials])


def mended(folder: Path) -> Tried:
    """Each failure mended but one."""

    def but(left: str = ""):
        cfg = failures.three_failures()
        if left != "field":
            del cfg.train.save_interval
        if left != "interval":
            cfg.checkpoint.save_interval = 50
        if left != "layers":
            cfg.model.num_layers = 5
        if left != "experts":
            cfg.model.sequence_parallel = True
        if left == "sizes":
            cfg.model.tensor_model_parallel_size = 1
        return cfg

    wrong = [
        (but("field"), "read by nobody"),
        (but("interval"), "50 were meant"),
        (but("layers"), "count its letters"),
        (but("experts"), "sequence parallelism"),
        (but("sizes"), "meant to stay"),
        (3, "a configuration is asked for"),
    ]
    return Tried(but(), wrong, [failures.three_failures()])

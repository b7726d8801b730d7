"""Where the project's folders are, and every environment variable that the course reads."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DATA",
    "LIBRARY",
    "PROJECT",
    "RUNS",
    "VARIABLES",
    "Variable",
    "environment_kept",
    "refusal",
    "untested_allowed",
    "variable",
]

PROJECT = Path(__file__).resolve().parents[2]
LIBRARY = PROJECT / "course_lib"
DATA = PROJECT / "data"
RUNS = PROJECT / "runs"


@dataclass(frozen=True)
class Variable:
    """An environment variable of the course; `form` is what its value must match, `must` says so in words."""

    name: str
    default: str
    meaning: str
    form: str = ".*"
    must: str = ""


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("COURSE_RUNS", "runs/ of the project", "folder that holds the run directories"),
        Variable(
            "COURSE_LEDGER",
            "nemotron-course/ledger.json in XDG_STATE_HOME, else in ~/.local/state",
            "file of your predictions and attempts",
        ),
        Variable(
            "COURSE_DEVICE",
            "cuda if every rank can have a GPU of its own, else cpu",
            "where ranks run",
            "cpu|cuda",
            "'cpu' or 'cuda'",
        ),
        Variable(
            "COURSE_THREADS",
            "each rank's share of the cores, 1 on a busy machine",
            "threads of each CPU rank",
            "[1-9][0-9]*",
            "a whole number of at least 1",
        ),
        Variable(
            "COURSE_ALLOW_UNTESTED",
            "0",
            "1 lets ranks start with versions that the course was not tested with, or on GPUs without Transformer Engine",
            "0|1",
            "'0' or '1'",
        ),
        Variable(
            "COURSE_TARGET",
            "not set",
            "confirms for ranks started by hand the function that launch.json names",
        ),
        Variable(
            "COURSE_LAYERS",
            "not set",
            "modules of your own whose layer specifications a configuration may name",
            r"[A-Za-z_][\w.]*(,[A-Za-z_][\w.]*)*",
            "names of modules with commas between them",
        ),
        Variable(
            "COURSE_STARTER_PID",
            "not set; the launcher sets it for torchrun",
            "process whose end ends the ranks",
            "[1-9][0-9]*",
            "the id of a process",
        ),
        Variable(
            "COURSE_GPU_GATE", "not set; the GPU check sets it", "file that a GPU rank waits for before it begins"
        ),
    )
}


def variable(name: str) -> str | None:
    """What an environment variable of the course says; an empty one counts as not set.

    Raises:
        ValueError: If the table has no such variable, or its value has no meaning.
    """
    value = os.environ.get(name, "")
    if words := refusal(name, value):
        raise ValueError(words)
    return value or None


def refusal(name: str, value: str) -> str | None:
    """Why a variable of that name may not have that value, or `None`.

    >>> refusal("COURSE_THREADS", "none").partition(", or")[0]
    "COURSE_THREADS is 'none'; it must be a whole number of at least 1"
    """
    if name not in VARIABLES:
        near = difflib.get_close_matches(name, VARIABLES, n=1)
        return f"the course reads no variable {name}: did you mean {near[0] if near else ' or '.join(VARIABLES)}?"
    known = VARIABLES[name]
    if not value or re.fullmatch(known.form, value, re.DOTALL):
        return None
    return f"{name} is {value!r}; it must be {known.must}, or unset for the default: {known.default}"


def untested_allowed() -> bool:
    """Whether `COURSE_ALLOW_UNTESTED` lets ranks start where the course promises nothing."""
    return variable("COURSE_ALLOW_UNTESTED") == "1"


@contextmanager
def environment_kept(wanted: Mapping[str, str] | None = None) -> Iterator[None]:
    """This process's environment is afterwards what it was; inside it is `wanted`, or at first as before.

    Variables that stay are never away: other threads of a kernel read them meanwhile.
    """
    before = dict(os.environ)
    try:
        if wanted is not None:
            _replace_environment(wanted)
        yield
    finally:
        _replace_environment(before)


def _replace_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)

"""The map of NVIDIA's stack: six systems, what each takes and gives, and one object that proves its role.

Everything is read from `data/stack.json`; versions and files come from what is installed.  `course_lib.machine.stack_diagram`
draws it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common.project import DATA, PROJECT
from course_lib.machine import installation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Box", "Proof", "Question", "beside", "boxes", "flows", "home", "prove", "questions", "table"]

_FILE = DATA / "stack.json"
_LIMIT_S = 420  # importing AutoModel takes ten seconds, or minutes on a machine that others use


@dataclass(frozen=True)
class Box:
    """One system of the stack, as `data/stack.json` describes it.

    Attributes:
        name: What people call it.
        layer: data, blueprint, orchestration, engine or machinery.
        role: What it does, in a sentence.
        distribution: The installed package, None for a repository that is not one.
        tested: The version that the course was written against.
        module: Where the object is imported from.
        object: The object that proves the role.
        kind: What sort of object it is.
        consumes: What it takes.
        produces: What it gives.
        isolated: Whether it must be imported in a process of its own, because it does not accept stand-ins.
        enters: At which moment of a project it enters.
        repository: Owner and name on GitHub.
        shown_in: Lessons that use it.
    """

    name: str
    layer: str
    role: str
    distribution: str | None
    tested: str
    module: str
    object: str
    kind: str
    consumes: str
    produces: str
    isolated: bool
    enters: str
    repository: str
    shown_in: str


@dataclass(frozen=True)
class Question:
    """A question of a working day, the system whose repository answers it, and why."""

    question: str
    answer: str
    reason: str


@dataclass(frozen=True)
class Proof:
    """That an object exists: what it is and the file that defines it, below site-packages where it is there."""

    name: str
    type: str
    file: str


def boxes(*, path: Path = _FILE) -> tuple[Box, ...]:
    """The six systems.

    >>> [box.name for box in boxes() if box.layer == "machinery"]
    ['Megatron-LM']
    """
    return tuple(Box(**row) for row in _read(path)["boxes"])


def questions(*, path: Path = _FILE) -> tuple[Question, ...]:
    """The exercise "which repository do I open?"."""
    return tuple(Question(**row) for row in _read(path)["questions"])


def beside() -> pd.DataFrame:
    """Systems of the stages that this course does not run: one row each, with its stage, role, repository and source."""
    import pandas as pd

    return pd.DataFrame(_read(_FILE)["beside"])


def flows(*, path: Path = _FILE) -> tuple[tuple[str, str, str], ...]:
    """What goes from which system to which: (from, to, what)."""
    return tuple((start, end, what) for start, end, what in _read(path)["flows"])


def table(shown: Sequence[Box] | None = None) -> pd.DataFrame:
    """One row a system with the version and the file that this environment has."""
    import pandas as pd

    rows = []
    for box in boxes() if shown is None else shown:
        version = installation.version(box.distribution) if box.distribution else f"{box.tested} (read, not installed)"
        rows.append((box.name, box.layer, box.role, box.consumes, box.produces, version or "not installed", home(box)))
    return pd.DataFrame(rows, columns=["system", "layer", "role", "consumes", "produces", "version", "imported from"])


def prove(box: Box) -> Proof:
    """Import the object that proves a role.

    Args:
        box: One system.

    Returns:
        What was found.

    Raises:
        ImportError: If the module or the object is not there; the message names the package and the fix.
    """
    try:
        if box.isolated:
            return Proof(box.name, *_in_a_child(box))
        found = getattr(importlib.import_module(box.module), box.object)
        return Proof(box.name, type(found).__name__, _short(inspect.getsourcefile(found)))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{box.module}.{box.object} of {box.name} cannot be imported ({error}): run `make setup`, "
            f"which installs {box.distribution or 'the course'} {box.tested}"
        ) from error


def home(box: Box) -> str:
    """The file of a system's top package, found without importing it; `not installed` if there is none."""
    module = installation.PACKAGES.get(box.distribution or "", "course_lib")
    return _short(str(next(iter(installation.places(module)), "not installed")))


def _in_a_child(box: Box) -> tuple[str, str]:
    code = (
        f"import importlib, inspect; found = getattr(importlib.import_module({box.module!r}), {box.object!r}); "
        "print('proof:', type(found).__name__, inspect.getsourcefile(found))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ImportError(f"no answer within {_LIMIT_S} s") from None
    line = next((line for line in done.stdout.splitlines() if line.startswith("proof: ")), None)
    if line is None:
        raise ImportError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer")
    _, kind, file = line.split(" ", 2)
    return kind, _short(file)


def _short(file: str | None) -> str:
    """A path below site-packages or the project, as it is the same on every machine."""
    text = str(file)
    project = str(PROJECT) + "/"
    return text.split("site-packages/")[-1].removeprefix(project)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

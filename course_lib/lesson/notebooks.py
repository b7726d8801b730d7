"""Lessons as files: list them, execute one, and read back what it left behind.

The executed copy is what the book shows, so it is written whole or not at all: under a temporary name, then renamed.
A lesson that fails leaves ``NAME.failed.ipynb`` with the traceback, and the last good copy stays.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.common import screen
from course_lib.common.project import PROJECT, environment_kept

SCREEN_LINES = 15  # of an error message: what still fits on one screen with the rest
GUESS = re.compile(r"(?m)^(guess\w*) = None\b")
NUMBERED = re.compile(r"(\d\d|[a-z])_[a-z0-9_]+\.ipynb")  # not JupyterLab's 03_x-Copy1.ipynb beside 03_x.ipynb


class LessonError(ValueError):
    """A lesson cannot be started: there is none of that number, or a parameter is unknown."""


class LessonFailed(RuntimeError):
    """A cell of a lesson raised an error."""


@dataclass(frozen=True)
class Lesson:
    """What a lesson says about itself in its own text."""

    number: str
    title: str
    question: str
    minutes: int | None
    path: Path


@dataclass(frozen=True)
class Executed:
    """An executed lesson.

    Attributes:
        figures: PNG files beside it, in the order of the page.
        values: What the notebook published by ``publish``.
    """

    path: Path
    figures: list[Path]
    runs: list[Path]
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)


def listing(*, directory: Path | None = None) -> list[Lesson]:
    """List the lessons in reading order; number, title, question and minutes come from their text."""
    return [describe(path) for path in notebooks(directory)]


def notebooks(directory: Path | None = None) -> list[Path]:
    """The lessons' notebooks in reading order; a copy that somebody made of one is none."""
    directory = directory or PROJECT / "notebooks"
    return sorted(path for path in directory.glob("*.ipynb") if NUMBERED.fullmatch(path.name))


def find(number: str, *, directory: Path | None = None) -> Path:
    """Return the notebook of a lesson.

    Args:
        number: "03", "3" or "a", or the whole name.
        directory: Where the lessons are, by default ``notebooks/``.

    Raises:
        LessonError: There is no such lesson, or more than one.
    """
    directory = directory or PROJECT / "notebooks"
    wanted = str(number).removesuffix(".ipynb").lower()
    wanted = wanted.zfill(2) if wanted.isdigit() else wanted
    names = notebooks(directory)
    found = [path for path in names if path.stem == wanted or path.stem.split("_")[0] == wanted]
    if len(found) != 1:
        known = ", ".join(path.stem for path in names) or "none"
        raise LessonError(f"lesson {number!r} names {len(found)} notebooks in {directory}; the lessons are: {known}.")
    return found[0]


def execute(
    number: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    output_directory: Path | None = None,
    directory: Path | None = None,
    kernel: Any = None,
) -> Executed:
    """Execute a lesson from top to bottom, with progress on stderr, and keep the executed copy.

    Args:
        number: The lesson ("03").
        parameters: New values for names of the lesson's parameters cell and of its cells of guesses.
        output_directory: Where the executed copy goes, by default ``book/lessons/``.
        directory: Where the lessons are, by default ``notebooks/``; also the notebook's working directory.
        kernel: Manager of a running kernel, which goes on afterwards with its own working directory and variables; by
            default a new one, which ends with the lesson.

    Returns:
        The executed copy, its figures, and the run directories that it showed.

    Raises:
        LessonError: There is no such lesson, or it has no such parameter.
        LessonFailed: A cell raised an error; the message names the cell and the error.
    """
    import nbformat
    import papermill

    source = find(number, directory=directory)
    target = (output_directory or PROJECT / "book" / "lessons").resolve() / source.name
    lesson = nbformat.read(source, as_version=4)
    given = _enter_guesses(lesson, dict(parameters or {}))
    _require_parameters(source, given)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial.ipynb")
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    ledger = target.parent / ".ledger.json"  # a headless run makes no predictions of yours
    start = time.monotonic()
    progress = _Progress(source)
    try:
        with environment_kept({"COURSE_LEDGER": os.fspath(ledger), **kernel_environment()}):
            papermill.execute_notebook(
                lesson,
                partial,
                parameters=given,
                kernel_name="python3",
                progress_bar=False,
                extra_arguments=["--log-level=40"],  # a kernel warns about its own transport each time it starts
                cwd=source.parent,
                km=kernel,
                on_cell_execute=progress.cell_starts,
                on_cell_executed=progress.cell_ends,
            )
        progress.close("done")
        notebook = json.loads(partial.read_text(encoding="utf-8"))
        for part in (notebook, *notebook["cells"]):
            part["metadata"].pop("papermill", None)  # it holds this machine's paths and clock
        figures = _extract_figures(notebook, target.with_name(f"{source.stem.split('_')[0]}_figures"))
        partial.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, target)
    except (
        papermill.PapermillExecutionError,
        RuntimeError,
        TimeoutError,
    ) as error:  # a cell failed, or the kernel died
        progress.close("stopped")
        name = getattr(error, "ename", type(error).__name__)
        lines = str(getattr(error, "evalue", error)).strip().splitlines()
        message = "\n".join([*lines[:SCREEN_LINES], "..."] if len(lines) > SCREEN_LINES else lines)
        where = "There is no output."
        if partial.exists():
            os.replace(partial, failed)
            where = f"The whole output is in {failed}"
        raise LessonFailed(f"{source.stem}, cell {progress.cell}: {name}: {message}\n{where}") from error
    finally:
        partial.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    values, runs = _published(notebook)
    return Executed(path=target, figures=figures, runs=runs, seconds=time.monotonic() - start, values=values)


def guesses(lesson: str, *, directory: Path | None = None) -> list[str]:
    """The names that a lesson's cells of guesses assign, in the order of the page."""
    notebook = json.loads(find(lesson, directory=directory).read_text(encoding="utf-8"))
    return [name for cell in _guess_cells(notebook) for name in GUESS.findall("".join(cell["source"]))]


def _guess_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if "guess" in cell["metadata"].get("tags", ())]


def _enter_guesses(notebook: Mapping[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Write guesses into their cells, as a learner does, and return the other parameters.

    papermill puts all its parameters below the parameters cell, where the cell of the guess would undo them.
    """
    entered = set()

    def written(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in parameters:
            return match.group()
        entered.add(name)
        return f"{name} = {parameters[name]!r}"

    for cell in _guess_cells(notebook):
        cell["source"] = GUESS.sub(written, cell["source"])
    return {name: value for name, value in parameters.items() if name not in entered}


def _require_parameters(source: Path, parameters: dict[str, Any]) -> None:
    """Refuse an unknown parameter: papermill only warns, and the lesson would run with its default."""
    if not parameters:
        return
    import papermill

    known = papermill.inspect_notebook(source)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        names = ", ".join([*sorted(known), *guesses(source.stem, directory=source.parent)]) or "none"
        raise LessonError(f"{source.stem} has no parameter {', '.join(unknown)}; its parameters are: {names}.")


def kernel_environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a kernel of the course inherits.

    A kernel named `python3` in the learner's home or on JUPYTER_PATH must not win over the course's own, and with
    PYTHONDONTWRITEBYTECODE every kernel would compile every module again.
    """
    kept = {name: value for name, value in given.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = [os.path.join(sys.prefix, "share", "jupyter"), given.get("JUPYTER_PATH", "")]
    return kept | {"JUPYTER_PATH": os.pathsep.join(filter(None, path))}


class _Progress:
    """One line for each cell on stderr."""

    def __init__(self, source: Path) -> None:
        self.name = source.stem
        self.started = time.monotonic()
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        self.total = sum(cell["cell_type"] == "code" for cell in cells)
        self.done = 0
        self.cell = "none"
        self.line = screen.Line(in_logs=True)
        self.line.say(self._words("starting a kernel"), now=True)

    def cell_starts(self, *, cell: Any, cell_index: int) -> None:
        if cell["cell_type"] == "code":
            self.cell = str(cell.get("id", cell_index))
            self.line.say(self._words(self.cell), now=True)

    def cell_ends(self, *, cell: Any, cell_index: int, execute_reply: Any) -> None:
        self.done += 1

    def close(self, how: str) -> None:
        self.line.close(self._words(how))

    def _words(self, what: str) -> str:
        return f"{self.name}  cell {self.done} of {self.total}  {time.monotonic() - self.started:5.1f} s  {what}"


def _extract_figures(notebook: dict[str, Any], directory: Path) -> list[Path]:
    """Write every PNG output as ``CELL.png`` (``CELL-2.png`` for a cell's second picture); old pictures go."""
    shutil.rmtree(directory, ignore_errors=True)
    figures: list[Path] = []
    for cell in notebook["cells"]:
        pictures = [
            output["data"]["image/png"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
        ]
        for position, picture in enumerate(pictures, start=1):
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / (f"{cell['id']}.png" if position == 1 else f"{cell['id']}-{position}.png")
            path.write_bytes(base64.b64decode("".join(picture)))
            figures.append(path)
    return figures


def _published(notebook: dict[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    values: dict[str, Any] = {}
    runs: list[Path] = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            published = output.get("metadata", {}).get("course", {})
            values.update(published)
            if "run" in published and Path(published["run"]) not in runs:
                runs.append(Path(published["run"]))
    return values, runs


def describe(path: Path) -> Lesson:
    """What a lesson's notebook says about itself in its text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    first = prose[0] if prose else ""
    heading = re.search(r"^# (.+)$", first, flags=re.MULTILINE)
    question = re.search(r"^(?!#)(.*\?)", first, flags=re.MULTILINE)
    minutes = next((re.search(r"(\d+)\s+minutes", text) for text in prose if re.search(r"(\d+)\s+minutes", text)), None)
    return Lesson(
        number=path.stem.split("_")[0],
        title=heading.group(1).strip() if heading else path.stem,
        question=question.group(1).strip().strip("*_ ") if question else "",
        minutes=int(minutes.group(1)) if minutes else None,
        path=path,
    )

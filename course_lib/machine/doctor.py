"""What can this machine run, and what is wrong with it? `course doctor`.

The checks are those of `readings` and `installation`.  Looking takes about a second; importing the
packages beside the engine, in processes of their own, takes several more, and `report(imports=False)` leaves it out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib import stack
from course_lib.common.project import VARIABLES
from course_lib.lesson import notebooks
from course_lib.machine import installation, readings
from course_lib.machine.installation import Package
from course_lib.machine.readings import Finding
from course_lib.stack import StandIn

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["Lesson", "Report", "as_json", "lessons_that_run", "main", "report", "show", "table"]

WORST_FIRST = ("fail", "warn", "ok")
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Lesson:
    """Whether a lesson runs live on this machine; `reason` says where it runs, or what stops it."""

    number: str
    title: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that `course doctor` knows."""

    findings: tuple[Finding, ...]
    packages: tuple[Package, ...]
    stand_ins: tuple[StandIn, ...]
    lessons: tuple[Lesson, ...]
    variables: tuple[dict[str, str], ...]

    @property
    def exit_code(self) -> int:
        """1 if a lesson could not run, else 0."""
        stopped = any(not lesson.runs for lesson in self.lessons)
        return int(stopped or any(finding.status == "fail" for finding in self.findings))


def report(*, imports: bool = True) -> Report:
    """Look at this machine: every finding, package, stand-in and lesson.

    Args:
        imports: Import NeMo Run, NeMo Curator and AutoModel, too, instead of only looking for them.
    """
    try:
        device = stack.device(stack.LESSON_RANKS)
    except ValueError:  # what COURSE_DEVICE says is neither; the finding about GPUs says so
        device = "cpu"
    findings = (*readings.findings(), *installation.findings(has_gpus=device == "cuda"))
    if imports:
        findings = (*findings, *installation.imports())
    lessons = lessons_that_run(findings, device=device)
    return Report(findings, installation.packages(), tuple(stack.stand_ins()), lessons, variables())


def lessons_that_run(
    findings: Iterable[Finding], *, folder: Path | None = None, device: str = "cpu"
) -> tuple[Lesson, ...]:
    """Which of the existing lessons run live on this machine.

    Lesson 00 only looks at the machine, so it runs wherever Python and Jupyter do; every other lesson trains.

    Args:
        folder: Folder with the lessons; the course's own if None.
        device: Where eight ranks would run, "cpu" or "cuda".
    """
    failed = [finding.name for finding in findings if finding.status == "fail"]
    trains = f"on {stack.LESSON_RANKS} GPUs" if device == "cuda" else "on the CPU"
    found = []
    for path in notebooks.notebooks(folder):
        number, _, title = path.stem.partition("_")
        only_looks = number == "00"
        stops = [name for name in failed if name == "Python" or not only_looks]
        reason = f"stopped by: {', '.join(stops)}" if stops else "looks at the machine" if only_looks else trains
        found.append(Lesson(number, title.replace("_", " "), not stops, reason))
    return tuple(found)


def variables() -> tuple[dict[str, str], ...]:
    """Every environment variable that the course reads, as rows `name, now, default, meaning`."""
    return tuple(
        {"name": row.name, "now": os.environ.get(row.name, ""), "default": row.default, "meaning": row.meaning}
        for row in VARIABLES.values()
    )


def table(report: Report) -> pd.DataFrame:
    """The findings as a frame with the columns finding, status, value and fix, problems first."""
    import pandas as pd

    frame = pd.DataFrame(map(asdict, report.findings)).rename(columns={"name": "finding"})
    return frame.sort_values(
        "status", key=lambda column: column.map(WORST_FIRST.index), kind="stable", ignore_index=True
    )


def as_json(report: Report) -> str:
    """The whole report as JSON, for scripts and bug reports."""
    return json.dumps(asdict(report) | {"exit_code": report.exit_code}, indent=2)


def show(report: Report) -> None:
    """Print the report as tables for a terminal."""
    from rich.console import Console
    from rich.text import Text

    def status(finding: Finding) -> Text:
        return Text(finding.status, style=COLOURS[finding.status])

    console = Console(markup=False, highlight=False)
    findings = [(finding.name, status(finding), finding.value) for finding in report.findings]
    console.print(_grid("This machine", ("what", "status", "found"), findings))
    prefix = f"{sys.prefix}/"
    packages = [
        (package.name, package.version, (package.file or "not importable").removeprefix(prefix))
        for package in report.packages
        if package.version
    ]
    console.print(_grid("NVIDIA's packages", ("package", "version", f"imported from (below {prefix})"), packages))
    absent = ", ".join(package.name for package in report.packages if not package.version)
    console.print(f"\nNot installed, and not needed on a CPU: {absent or 'none'}")
    stand_ins = [(row.name, row.reason, row.where) for row in report.stand_ins]
    console.print(_grid("Stand-ins", ("for", "why", "where"), stand_ins))
    lessons = [(row.number, "yes" if row.runs else "no", row.title, row.reason) for row in report.lessons]
    console.print(_grid("Lessons", ("no.", "runs", "title", "how"), lessons))
    settings = [(row["name"], row["now"] or "not set", row["default"], row["meaning"]) for row in report.variables]
    console.print(_grid("Environment variables", ("variable", "now", "default", "what it does"), settings))
    problems = [finding for finding in report.findings if finding.fix]
    console.print("\nTo mend:" if problems else "\nNothing to mend.")
    for finding in problems:
        console.print(Text.assemble(status(finding), f" {finding.name}: {finding.fix}"), soft_wrap=True)


def _grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    from rich.table import Table

    grid = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def main(*, json: bool = False, quick: bool = False) -> int:
    """Entry of `course doctor`; returns 1 if a lesson could not run."""
    if not (json or quick):
        print(
            f"Looking, and importing {', '.join(installation.IMPORTED)} (some seconds) ...", file=sys.stderr, flush=True
        )
    result = report(imports=not quick)
    if json:
        print(as_json(result))
    else:
        show(result)
    return result.exit_code

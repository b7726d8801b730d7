"""The command `course`: a thin door to the rest, which answers `--help` without importing torch."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="From NVIDIA's Nemotron blueprint to an 8-GPU pretraining run.")  # fmt: skip


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Look for packages without importing any.")] = False,
) -> None:
    """Look at this machine: what runs live here, what does not, and how to mend it."""
    from course_lib.machine import doctor as module

    raise typer.Exit(module.main(json=json, quick=quick))


@app.command()
def lesson(
    number: Annotated[str, typer.Argument(help="Number of the lesson, for example 03.")],
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE of the parameters cell.")
    ] = None,
    output_directory: Annotated[Path | None, typer.Option("--output", help="Folder for the executed copy.")] = None,
    open_hint: Annotated[bool, typer.Option("--open-hint", help="End with the next step.")] = False,
) -> None:
    """Run a lesson without a browser and say where its results are."""
    from course_lib.lesson import notebooks

    try:
        done = notebooks.execute(
            number, parameters=_parameters(parameters or []) or None, output_directory=output_directory
        )
    except (ValueError, notebooks.LessonFailed) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(summary(done))
    if open_hint:
        typer.echo("next step         make lab   (opens the lessons in JupyterLab)")


@app.command()
def lab(
    notebook: Annotated[str, typer.Argument(help="The notebook to open.")] = "notebooks/00_check_your_setup.ipynb",
    options: Annotated[list[str] | None, typer.Option("--option", help="Handed on to JupyterLab.")] = None,
) -> None:
    """Open JupyterLab on a lesson, while the stack is imported for its first run."""
    from course_lib.machine import desk as module

    module.start(notebook, options=options or [])


@app.command()
def ledger(
    lesson: Annotated[str | None, typer.Option(help="Only this lesson, for example 03.")] = None,
    history: Annotated[bool, typer.Option("--history", help="All attempts, not only the latest.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what is shown, after a question.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Forget without a question.")] = False,
) -> None:
    """Show your predictions beside what was measured, and your exercises."""
    from course_lib.lesson import ledger as module

    lesson = lesson and lesson.lower()  # as it stands in the notebook's name
    try:
        typer.echo(module.text(lesson=lesson, history=history))
        if reset and (yes or typer.confirm("Forget all of this?")):
            module.reset(lesson=lesson)
    except module.LedgerError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


@app.command("class")
def class_(
    ledgers: Annotated[list[Path], typer.Argument(help="Ledgers of learners, or a folder of them.")],
    to: Annotated[Path, typer.Option(help="The table; the picture stands beside it.")] = Path("class.csv"),
) -> None:
    """Put the ledgers of a class together, as one table and one picture."""
    from course_lib.lesson import classroom, ledger

    try:
        for file in classroom.write(ledgers, to):
            typer.echo(f"written: {_shown(file)}")
    except (classroom.ClassError, ledger.LedgerError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _parameters(pairs: list[str]) -> dict[str, object]:
    """Read NAME=VALUE pairs; a value is a Python literal, else text."""
    import ast

    values: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE, for example steps=20")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def _shown(path: Path) -> str:
    """A path as the learner can type it: relative where it lies below the current folder."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def summary(done: object) -> str:
    """Where the results of an executed lesson are, one a line.

    Args:
        done: A `notebooks.Executed` with `path`, `figures` and `runs`.
    """
    lines = ["", f"executed lesson   {_shown(done.path)}"]
    lines += [f"figure            {_shown(path)}" for path in done.figures]
    lines += [f"run directory     {_shown(path)}" for path in done.runs]
    return "\n".join(lines)


def main() -> None:
    """Entry of the console script `course`."""
    app(prog_name="course")


if __name__ == "__main__":
    main()

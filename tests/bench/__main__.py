"""The command behind `make bench`: `python -m tests.bench`."""

from typing import Annotated

import typer

from tests import bench


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Only this part, for example course-run; may be repeated.")
    ] = None,
) -> None:
    """Measure the engine and write the figures as JSON and as a table."""
    try:
        raise typer.Exit(bench.main(only or ()))
    except bench.UnknownPart as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)

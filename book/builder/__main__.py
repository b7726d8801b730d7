"""The command behind `make book` and `make archive`: `python -m book.builder`."""

from pathlib import Path
from typing import Annotated

import typer

from book import builder
from book.builder import archive, assets, facts
from course_lib.lesson import notebooks


def main(
    pack: Annotated[bool, typer.Option("--archive", help="Pack the pages into one zip file as well.")] = False,
) -> None:
    """Build the book from the executed lessons, with no request to the network's pages."""
    try:
        page = builder.build()
    except (builder.BookError, assets.AssetError, facts.FactError, notebooks.LessonFailed) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"book              {_shown(page)}")
    if pack:
        packed = archive.pack(page.parent, page.parent.parent / f"{archive.FOLDER}-book.zip")
        typer.echo(f"archive           {_shown(packed)}   (unpack it and open index.html; no server, no network)")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    typer.run(main)

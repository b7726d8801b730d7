"""The book: executed lessons and a few prose pages, as HTML that asks nothing of any other machine.

What was executed is what is published: the build runs no cell. Lessons that were never executed, or not since their
source changed, are executed first. The pages are put together in ``book/_build/source``: ``book/`` holds only sources.
The four JavaScript packages that a default book loads from CDNs come from the npm registry once, are held against their
checksums, and travel with the book.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from book.builder import facts, whole_path
from book.builder.assets import vendor
from book.builder.links import broken, external_loads
from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks

__all__ = ["BookError", "build"]


PROJECT_OF_A_READER = "~/course"
"""What a page says instead of the folder of whoever built the book."""


class BookError(RuntimeError):
    """The book cannot be built."""


def build(*, root: Path = PROJECT, execute: bool = True) -> Path:
    """Build the book.

    Args:
        root: The project, by default this one; a test gives a small copy.
        execute: Execute lessons that are missing or older than their source; otherwise they are left out.

    Returns:
        The front page, ``book/_build/html/index.html``.

    Raises:
        BookError: Sphinx warned, a page would load something from elsewhere, a link leads nowhere, or a picture has no
            words.
        book_facts.FactError: A page asks for a table that nobody makes.
        book_assets.AssetError: A JavaScript package is missing.
        lessons.LessonFailed: A lesson that had to be executed failed.
    """
    start = time.monotonic()
    book = root / "book"
    vendor(book / "assets")
    pages = _executed(root, execute=execute)
    source = _stage(book, pages)
    html = book / "_build" / "html"
    _say(f"building {len(pages)} lessons and {len(list(book.glob('*.md')))} pages")
    _run_jupyter_book(source, output=book)
    loads = external_loads(html)
    if loads:
        shown = "\n".join(loads[:20])
        raise BookError(
            f"{len(loads)} loads from other machines in the built book:\n{shown}\n"
            "Vendor them in PACKAGES of book/builder/assets.py."
        )
    stumbles = broken(html)
    if stumbles:
        shown = "\n".join(stumbles[:20])
        raise BookError(f"{len(stumbles)} broken links or silent pictures in the built book:\n{shown}")
    _say(f"built in {time.monotonic() - start:.0f} s: {html / 'index.html'}")
    return html / "index.html"


def _executed(root: Path, *, execute: bool) -> list[Path]:
    """Return the executed lessons, after executing those that are missing or older than their source."""
    directory, output = root / "notebooks", root / "book" / "lessons"
    paths = []
    for lesson in notebooks.listing(directory=directory):
        path = output / lesson.path.name
        if execute and (not path.is_file() or path.stat().st_mtime < lesson.path.stat().st_mtime):
            _say(f"executing {lesson.path.stem}")
            notebooks.execute(lesson.number, directory=directory, output_directory=output)
        if path.is_file():
            paths.append(path)
    return paths


def _stage(book: Path, pages: list[Path]) -> Path:
    """Put the pages together for Sphinx; a file that did not change keeps its time, so that Sphinx skips it."""
    source = book / "_build" / "source"
    texts = {path.name: path.read_text(encoding="utf-8") for path in [*book.glob("*.md"), *book.glob("_*.yml")]}
    wanted = {name: facts.fill(_linked(text, pages), root=book.parent) for name, text in texts.items()}
    wanted["_toc.yml"] = _contents(wanted["_toc.yml"], pages)
    whole = whole_path.parts(yaml.safe_load(wanted["_toc.yml"]), [notebooks.describe(page) for page in pages])
    head = whole_path.picture(whole, folder="lessons/")
    for page in book.glob("*.md"):
        title, _, rest = wanted[page.name].partition("\n")
        wanted[page.name] = f"{title}\n\n{head}\n{rest}"
    wanted |= {f"lessons/{path.name}": _page(path, project=book.parent, whole=whole) for path in pages}
    old = {
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and not path.is_symlink()
    }
    for name in old - set(wanted):
        if not name.startswith(("assets/", "static/")):
            (source / name).unlink()
    for name, text in wanted.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for folder in ("assets", "static"):
        link = source / folder
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(book / folder, source), target_is_directory=True)
    return source


def _contents(text: str, pages: list[Path]) -> str:
    """The table of contents without the patterns that match no lesson: a part whose lessons are left out is no part."""
    toc = yaml.safe_load(text)
    names = [f"lessons/{path.stem}" for path in pages]
    for part in toc["parts"]:
        part["chapters"] = [
            entry for entry in part["chapters"] if "glob" not in entry or fnmatch.filter(names, entry["glob"])
        ]
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]
    return yaml.safe_dump(toc, sort_keys=False)


def _linked(text: str, pages: list[Path]) -> str:
    """Turn links to lesson sources into links to their pages; a lesson that is left out is words alone."""
    names = {path.name for path in pages}
    return re.sub(
        r"\[([^]]+)\]\(\.\./notebooks/([^)]+)\)",
        lambda link: f"[{link[1]}](lessons/{link[2]})" if link[2] in names else link[1],
        text,
    )


def _page(path: Path, *, project: Path, whole: list[whole_path.Part]) -> str:
    """Turn an executed lesson into a page: it has its number and its place, links fit the book's folders, pictures have words.

    myst-nb takes the alternative text from the cell, while a notebook keeps it with the output.  Messages and tables
    name files of the project where it was executed, which says nothing to a reader.
    """
    number = path.stem.partition("_")[0].upper()
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"]).replace("](../book/", "](../")
            head = whole_path.picture(whole, number.lower())
            source = re.sub(r"\A# (.+)", rf"# {number} · \1\n\n{head}", source)  # the only title of a lesson
            cell["source"] = source.replace("](your_ledger.ipynb)", "](../your_ledger.md)")  # a reader has no ledger
        described = [
            output["metadata"]["image/png"]["alt"]
            for output in cell.get("outputs", ())
            if output.get("metadata", {}).get("image/png", {}).get("alt")
        ]
        if described:
            cell["metadata"]["mystnb"] = {"image": {"alt": " ".join(described)}}
    return json.dumps(notebook, indent=1, ensure_ascii=False).replace(os.fspath(project), PROJECT_OF_A_READER)


def _run_jupyter_book(source: Path, *, output: Path) -> None:
    """Run jupyter-book with warnings as errors; its output is shown when it fails."""
    build = ["build", ".", "--path-output", os.fspath(output.resolve()), "-W", "-n", "--keep-going", "-q"]
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", *build]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        told = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).splitlines()
        told = [line for line in told if re.search(r"WARNING|ERROR|error", line)] or told
        shown = "\n".join(told[-30:]).replace(f"{source}{os.sep}", "")
        raise BookError(f"jupyter-book failed (a warning is an error here):\n{shown}")


def _say(text: str) -> None:
    print(f"book: {text}", file=sys.stderr, flush=True)

"""The house keeps its floors: a room of course_lib imports lower rooms only, and only rank processes fake CUDA."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks

LIBRARY = PROJECT / "course_lib"
ROOMS = [
    *("common", "planning/layout", "stack", "runs", "ranks/cpu", "ranks", "figures", "text", "recipes", "lesson"),
    *("planning", "launch", "experiments", "reading", "machine/gpu", "machine", "lesson/exercises"),
]
"""From the ground up; the command `course` stands above them all."""
FILES = sorted(LIBRARY.rglob("*.py"))


def room(path: Path) -> str:
    """The room of a file or a folder of course_lib; the top itself is the attic."""
    inside = path.relative_to(LIBRARY).as_posix()
    return next((name for name in ROOMS if "/" in name and inside.startswith(name)), inside.partition("/")[0])


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, inside functions too; names of types alone do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node)


def upwards(path: Path, source: str) -> list[str]:
    """The imports of a file that its floor forbids."""
    mine, found = room(path), []
    height = ROOMS.index(mine) if mine in ROOMS else len(ROOMS)
    for line, name in imports(ast.parse(source)):
        top, *rest = name.split(".")
        if top in ("book", "tests"):
            found.append(f"line {line}: {name} is no part of the library")
        if top != "course_lib" or not rest:
            continue
        other = room(LIBRARY.joinpath(*rest))
        if other != mine and other in ROOMS and ROOMS.index(other) > height:
            found.append(f"line {line}: {mine} imports {other}, which stands above it")
        if other == "ranks/cpu" and not mine.startswith("ranks"):
            found.append(f"line {line}: only ranks/ may import ranks/cpu")
    return found


def name_of(path: Path) -> str:
    """A path as a test's id."""
    return path.relative_to(LIBRARY).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_lower_rooms_only(path: Path) -> None:
    """No import runs upwards, inside functions neither; so no two rooms import each other."""
    assert upwards(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("place", "line", "words"),
    [
        ("runs/__init__.py", "from course_lib import launch", "runs imports launch, which stands above it"),
        ("planning/layout/rules.py", "from course_lib.planning import memory", "planning/layout imports planning"),
        ("launch/__init__.py", "from course_lib.ranks import cpu", "only ranks/ may import ranks/cpu"),
        ("machine/doctor.py", "from book.builder import facts", "no part of the library"),
    ],
)
def test_a_broken_floor_is_found(place: str, line: str, words: str) -> None:
    """The rule fails on an import upwards, inside a function too."""
    (problem,) = upwards(LIBRARY / place, f"def f():\n    {line}\n")
    assert words in problem


def test_the_readme_shows_the_rooms_that_there_are() -> None:
    """The table of course_lib/README.md has each room once, in the order of its floor."""
    readme = (LIBRARY / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert re.findall(r"^\| \d \| `([\w/]+)/` ", readme, re.MULTILINE) == ROOMS
    assert {name.partition("/")[0] for name in ROOMS} == folders


def test_every_file_and_name_of_the_library_that_is_written_down_exists() -> None:
    """In code, lessons, pages and the Makefile a path or a dotted name in a string may be forgotten by a move."""
    files = [*PROJECT.glob("*.md"), PROJECT / "Makefile", PROJECT / "pyproject.toml"]
    for folder in ("course_lib", "book", "notebooks", "data"):
        files += [path for path in PROJECT.glob(f"{folder}/**/*") if path.suffix in (".py", ".md", ".ipynb", ".json")]
    generated = [PROJECT / "book" / name for name in ("_build", "lessons", "assets")]
    dead = []
    for path in files:
        if path == Path(__file__).resolve() or any(path.is_relative_to(folder) for folder in generated):
            continue
        text = path.read_text(encoding="utf-8").replace("\\", "")
        mine = r"course_lib|tests|book/builder" if path.suffix == ".md" else r"course_lib"  # others have tests, too
        written = re.findall(rf"\b(?:{mine})(?:/\w+)+\.py\b", text)
        paths = [name for name in written if not (PROJECT / name).is_file()]
        modules = re.findall(r"\bcourse_lib\.(\w+)(?:\.(\w+))?", text)
        dead += [f"{path.relative_to(PROJECT)}: {name}" for name in paths]
        for room_, name in modules:
            inside = LIBRARY / room_
            if not (inside.is_dir() or inside.with_suffix(".py").is_file() or room_.startswith("_")):
                dead.append(f"{path.relative_to(PROJECT)}: course_lib.{room_}.{name}")
        if path.suffix == ".md":  # what a page imports, no test runs
            for place, name in re.findall(r"from (course_lib(?:\.\w+)*) import (\w+)", text):
                inside = PROJECT / place.replace(".", "/")
                module = inside.with_suffix(".py") if inside.with_suffix(".py").is_file() else inside / "__init__.py"
                there = inside.joinpath(name).is_dir() or inside.joinpath(f"{name}.py").is_file()
                if not there and not (
                    module.is_file() and re.search(rf"\b{name}\b", module.read_text(encoding="utf-8"))
                ):
                    dead.append(f"{path.relative_to(PROJECT)}: {name} of {place}")
    assert sorted(set(dead)) == []


@functools.cache
def lesson_imports() -> dict[Path, set[str]]:
    """The files of course_lib that lessons import, with the numbers of those lessons."""
    found: dict[Path, set[str]] = {}
    for path in notebooks.notebooks():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for _, name in imports(ast.parse(code)):
            place = PROJECT.joinpath(*name.split("."))
            here, above = ({way.with_suffix(".py"), way / "__init__.py"} & set(FILES) for way in (place, place.parent))
            for file in here or above:
                found.setdefault(file, set()).add(path.stem.split("_")[0])
    return found


def test_the_readme_says_which_lessons_use_a_room() -> None:
    """The last column of the rooms' table is what the notebooks import, so a new import changes one line there."""
    lines = re.findall(
        r"^\| \d \| `([\w/]+)/` \|.*\| ([\da-z ]*)\|$", (LIBRARY / "README.md").read_text(), re.MULTILINE
    )
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path, lessons in lesson_imports().items():
        used[room(path)] |= lessons
    assert {name: told.strip() for name, told in lines} == {name: " ".join(sorted(used[name])) for name in ROOMS}


NEW = ("experiments", "text", "lesson", "lesson/exercises", "reading", "planning", "figures")
"""Rooms whose modules may say what they offer before a lesson imports them."""


@pytest.mark.parametrize("path", [path for path in FILES if room(path) not in NEW], ids=name_of)
def test_what_a_lesson_imports_says_what_it_offers(path: Path) -> None:
    """`__all__` bounds the face of a room and what a lesson imports; elsewhere the underscore says enough."""
    has_list = "\n__all__ = " in path.read_text(encoding="utf-8")
    assert has_list == (path in lesson_imports())

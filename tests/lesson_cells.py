"""Cells of lessons, executed one at a time with stand-ins for what the lesson had made by then."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from course_lib import cells as notebook_cells
from course_lib import checks, lessons


def cells(number: str) -> dict[str, tuple[str, list[str]]]:
    """Source and tags of each code cell of a lesson by id."""
    notebook = json.loads(lessons.find(number).read_text(encoding="utf-8"))
    code = notebook_cells.of_kind(notebook, "code")
    return {cell["id"]: (notebook_cells.source(cell), notebook_cells.tags(cell)) for cell in code}


def tagged(number: str, tag: str) -> set[str]:
    """The ids of a lesson's code cells with a tag."""
    return {name for name, (_, tags) in cells(number).items() if tag in tags}


def standard_modules(number: str) -> dict[str, ModuleType]:
    """What the lesson imports of Python's own library as whole modules, by name."""
    source = next(text for text, tags in cells(number).values() if "imports" in tags)
    aliases = [alias for node in ast.parse(source).body if isinstance(node, ast.Import) for alias in node.names]
    own = [alias for alias in aliases if alias.name in sys.stdlib_module_names]
    return {alias.asname or alias.name: importlib.import_module(alias.name) for alias in own}


def execute(number: str, name: str, things: dict[str, Any], change: tuple[str, str] | None = None) -> None:
    """Execute one cell of a lesson; it sees these things, `checks`, and what the lesson imports of Python's own library.

    Args:
        number: The lesson's number.
        name: The cell's id.
        things: What the cell finds, by name; a stand-in for `checks` may be among them.
        change: A text that stands once in the cell, and what a learner may have typed instead.
    """
    source = cells(number)[name][0]
    if change is not None:
        assert source.count(change[0]) == 1, f"the cell no longer says {change[0]!r}"
        source = source.replace(*change)
    code = compile(source, f"lesson {number}, cell {name}", "exec", dont_inherit=True)
    exec(code, {"checks": checks, **standard_modules(number), **things})


class Sample:
    """What `train[n]` is in lessons 04 and 08: ids in a row and their labels."""

    def __init__(self, labels: Callable[[np.ndarray], np.ndarray]) -> None:
        ids = np.arange(17)
        self.sample = {"tokens": ids[:-1], "labels": labels(ids[1:])}

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.sample

"""The cells of a notebook, read from plain JSON: by kind and by tag, their text, and their code as a tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Cell", "Notebook", "code_lines", "of_kind", "parse", "prose", "source", "tagged", "tags", "trees"]

Notebook = Mapping[str, Any]
Cell = Mapping[str, Any]


def of_kind(notebook: Notebook, kind: str) -> list[Cell]:
    """The cells of one kind, `"code"` or `"markdown"`."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def tagged(notebook: Notebook, tag: str) -> list[Cell]:
    """The cells that carry a tag."""
    return [cell for cell in notebook["cells"] if tag in tags(cell)]


def tags(cell: Cell) -> list[str]:
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


def source(cell: Cell) -> str:
    """The text of a cell, which a file may hold as one string or as a list of lines.

    Example:
        >>> source({"source": ["a = 1\\n", "b = 2"]}) == source({"source": "a = 1\\nb = 2"})
        True
    """
    return "".join(cell["source"])


def prose(cell: Cell) -> str:
    """The text of a markdown cell without its fenced code."""
    return re.sub(r"^(`{3,}|~{3,}).*?^\1", "", source(cell), flags=re.MULTILINE | re.DOTALL)


def code_lines(text: str) -> list[str]:
    """The lines that are neither empty nor only a comment.

    Example:
        >>> code_lines("# two numbers\\n\\na = 1  # one\\nb = 2")
        ['a = 1  # one', 'b = 2']
    """
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def parse(text: str) -> ast.Module | SyntaxError:
    """The text as a tree, or the error where it is not Python."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        return error


def trees(notebook: Notebook) -> Iterator[tuple[Cell, ast.Module]]:
    """Each code cell that is Python, with its tree."""
    for cell in of_kind(notebook, "code"):
        tree = parse(source(cell))
        if isinstance(tree, ast.Module):
            yield cell, tree

"""The habits of a lesson's code, as rules like those of `hygiene`: imports, plain Python, short cells, literal parameters."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support import notebook_cells as cells
from support.notebook_cells import Notebook

__all__ = [
    "cells_are_short",
    "code_is_narrow",
    "imports_are_together",
    "no_shell_and_no_tricks",
    "parameters_are_literals",
]

MAX_CODE_LINES = 24  # of at most MAX_WIDTH characters: a cell that fits on the screen together with its output
MAX_WIDTH = 88  # characters; what the book and a projector show without wrapping
MAX_IMPORT_LINES = 20  # no output; a line for each room says where one is


def imports_are_together(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """All imports stand in the imports cell, no name is imported with a star, and each is used."""
    imported: dict[str, str] = {}
    used: set[str] = set()
    for cell, tree in cells.trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if "imports" not in cells.tags(cell):
                    yield cell["id"], f"line {node.lineno} imports something: move it to the imports cell"
                for alias in node.names:
                    if alias.name == "*":
                        yield cell["id"], f"star import in line {node.lineno}: name what you need"
                    imported[alias.asname or alias.name.split(".")[0]] = cell["id"]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
    for name in sorted(set(imported) - used - {"*"}):
        yield imported[name], f"{name!r} is imported and never used"


def no_shell_and_no_tricks(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """No magics, no shell lines, no blanket filters, no path edits, no installs: a lesson is plain Python."""
    for cell in cells.of_kind(notebook, "code"):
        source = cells.source(cell)
        if re.search(r"^\s*(?:%|!|\?)|^\s*\w+\s*=\s*[!%]", source, flags=re.MULTILINE):
            yield cell["id"], "a magic or a shell line: show the command as text and let course_lib build it"
            continue
        tree = cells.parse(source)
        if isinstance(tree, SyntaxError):
            yield cell["id"], f"not Python: {tree.msg} in line {tree.lineno}"
            continue
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
            if (
                isinstance(node, ast.Call)
                and re.match(r"(warnings\.)?(filterwarnings|simplefilter)\(['\"]ignore", text)
                and len(node.args) + len(node.keywords) == 1
            ):
                yield cell["id"], "ignores all warnings: explain the one that you mean, and name it"
            if isinstance(node, ast.Attribute) and text == "sys.path":
                yield cell["id"], "edits or reads sys.path: course_lib is installed, import it"


def cells_are_short(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """A code cell fits on the screen together with its output."""
    for cell in cells.of_kind(notebook, "code"):
        count = len(cells.code_lines(cells.source(cell)))
        most = MAX_IMPORT_LINES if cell["id"] == "imports" else MAX_CODE_LINES
        if count > most:
            yield (
                cell["id"],
                f"{count} lines of code, needed at most {most}: split it or move a part to course_lib",
            )


def parameters_are_literals(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """The parameters cell holds literals, one a line, each with a comment, none depending on another."""
    for cell in cells.tagged(notebook, "parameters"):
        source = cells.source(cell)
        tree = cells.parse(source)
        if isinstance(tree, SyntaxError):
            continue  # no_shell_and_no_tricks says so
        lines = source.splitlines()
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                yield cell["id"], f"line {node.lineno} is not an assignment"
                continue
            try:
                ast.literal_eval(node.value)
            except ValueError:
                yield cell["id"], f"line {node.lineno} is not a literal: papermill can only replace literals"
            if "#" not in lines[(node.end_lineno or node.lineno) - 1]:
                yield cell["id"], f"line {node.lineno} has no comment: say what the parameter is, with its unit"


def code_is_narrow(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """No line of code wraps, one statement stands on a line, and settings are assigned one by one."""
    for cell in cells.of_kind(notebook, "code"):
        for number, line in enumerate(cells.source(cell).splitlines(), 1):
            if len(line) > MAX_WIDTH:
                yield cell["id"], f"line {number} has {len(line)} characters, needed at most {MAX_WIDTH}"
    for cell in cells.of_kind(notebook, "markdown"):
        for block in re.findall(r"^```.*?\n(.*?)^```", cells.source(cell), flags=re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if len(line) > MAX_WIDTH:
                    yield cell["id"], f"{line[:40]!r}... has {len(line)} characters, needed at most {MAX_WIDTH}"
    for cell, tree in cells.trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(map(_several_settings, node.targets)):
                yield cell["id"], f"line {node.lineno} assigns several settings: one a line can be read and compared"
            body = getattr(node, "body", None)
            for one, two in zip(body, body[1:], strict=False) if isinstance(body, list) else ():
                if one.end_lineno == two.lineno:
                    yield cell["id"], f"line {two.lineno} has two statements: give each a line"


def _several_settings(target: ast.expr) -> bool:
    return isinstance(target, ast.Tuple) and any(isinstance(each, ast.Attribute) for each in target.elts)

"""Where the documents of a corpus come from: this Python's library, or a folder of yours."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_LINE_BYTES = 64 * 2**20
"""No document is longer, be it a line or a file: a broken file may be one line of many gigabytes, and is not read."""

READ = (".txt", ".md", ".jsonl")
NUL = chr(0)
AN_ARRAY = "a JSON array, or JSON over several lines: JSONL has one object a line, and no brackets around them"

LICENCE = "PSF-2.0"
# Tables of numbers, and the topics that are read on their own.
LEFT_OUT = {"encodings", "pydoc_data"}
TESTS = {"test", "tests", "idle_test"}


class BadText(ValueError):
    """A file cannot be used as text; the message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One text with its provenance.

    Attributes:
        source: `"prose"`, `"code"`, or your own name.
        name: What it is, such as `"posixpath.join"`.
        licence: SPDX name of the licence.
    """

    text: str
    source: str
    name: str
    module: str
    licence: str


@dataclass(frozen=True)
class Documented:
    """A function of the standard library and what its docstring says.

    Attributes:
        file: The file's module, such as `"email.message"`.
        name: Qualified name in the file, such as `"Message.get_payload"`.
        signature: Such as `"def get_payload(self, i=None, decode=False)"`; empty for classes and modules.
    """

    module: str
    file: str
    name: str
    signature: str
    docstring: str


def python_documents(*, code: bool = True) -> Iterator[Document]:
    """The language reference, the docstrings and the source of this Python's standard library, without tests.

    A docstring is prose and not code: it is taken out of the source, so that no text counts twice.

    Args:
        code: Whether the source is wanted too, which takes half of the time.
    """
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(text, "prose", f"topic {name}", f"topic {name}", LICENCE)
    for module, file, path in _library():
        if (each := _file(path, module, file)) is None:
            continue
        source, found = each
        for one in found:
            yield Document(one.docstring, "prose", f"{file}.{one.name}".rstrip("."), module, LICENCE)
        if code:
            yield Document(without_docstrings(source), "code", file, module, LICENCE)


def library_functions() -> Iterator[Documented]:
    """Every function with a docstring that stands in a module, class or function itself, not under an `if` or a `try`."""
    for module, file, path in _library():
        if (each := _file(path, module, file)) is not None:
            yield from (one for one in each[1] if one.signature)


def _library() -> Iterator[tuple[str, str, Path]]:
    """Top-level module, full name and path of each file, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        # Names that CPython itself knows: not site-packages, not what a distribution added.
        if parts[0] in sys.stdlib_module_names and parts[0] not in LEFT_OUT and not TESTS & set(parts):
            yield parts[0], ".".join(parts).removesuffix(".__init__"), path


@functools.cache  # a corpus and its pairs are made in one process: parsing takes most of the time of either
def _file(path: Path, module: str, file: str) -> tuple[str, list[Documented]] | None:
    """The source of a file and its docstrings; nothing for a file in an older encoding, or a template."""
    try:
        source = path.read_text(encoding="utf-8")
        return source, documented(source, module=module, file=file)
    except (UnicodeDecodeError, SyntaxError):
        return None


@functools.lru_cache(maxsize=1)
def _parse(source: str) -> ast.Module:
    """Parse once for the three that look at it."""
    return ast.parse(source)


def documented(source: str, *, module: str, file: str) -> list[Documented]:
    """The docstrings of one file.

    Example:
        >>> source = 'class A:\\n    def f(self, x=1):\\n        "Double x."\\n'
        >>> [(found.name, found.signature, found.docstring) for found in documented(source, module="m", file="m")]
        [('A.f', 'def f(self, x=1)', 'Double x.')]
    """
    found: list[Documented] = []

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = names if isinstance(node, ast.Module) else (*names, node.name)
            if text := ast.get_docstring(node, clean=False):
                is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                signature = f"def {node.name}({ast.unparse(node.args)})" if is_function else ""
                found.append(Documented(module, file, ".".join(names), signature, inspect.cleandoc(text)))
            for child in node.body:
                visit(child, names)

    visit(_parse(source), ())
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and every statement in it; most of a tree are expressions, which hold no docstring."""
    yield node
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            yield from _statements(child)


def without_docstrings(source: str) -> str:
    """The source without its docstrings; a body that was nothing else becomes `...`.

    Example:
        >>> print(without_docstrings('def f():\\n    "Nothing."\\n\\ndef g():\\n    "One."\\n    return 1'))
        def f():
            ...
        <BLANKLINE>
        def g():
            return 1
    """
    lines = source.splitlines()
    for node in _statements(_parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0]
        first, last = lines[text.lineno - 1], lines[text.end_lineno - 1]
        alone = not first.encode()[: text.col_offset].strip() and not last.encode()[text.end_col_offset :].strip()
        if alone:
            keep = len(node.body) == 1 and not isinstance(node, ast.Module)
            lines[text.lineno - 1] = " " * text.col_offset + "..." if keep else None
            lines[text.lineno : text.end_lineno] = [None] * (text.end_lineno - text.lineno)
    return "\n".join(line for line in lines if line is not None)


def folder_documents(folder: Path, *, licence: str, source: str, leave_out: Sequence[str] = ()) -> Iterator[Document]:
    """The documents of a folder: one for each `.txt` and `.md` file, one for each line of a `.jsonl` file.

    Hidden files and folders are no text of yours: JupyterLab keeps old editions in one, git everything.  They are left
    out, and a warning names them.

    Args:
        leave_out: Patterns of files to leave out, such as `"*.png"`.

    Raises:
        BadText: If there is no file, or one is of another kind, a link that leads out of the folder, empty, no UTF-8, no
            JSON, has no text, or a document of more than 64 MiB, of which no more than that is read; names file and line.
    """
    folder = Path(folder)
    for path in _readable(folder, leave_out):
        name = path.relative_to(folder).as_posix()
        if path.stat().st_size == 0:
            raise BadText(f"{path}, line 1: the file is empty: remove it")
        if path.suffix.lower() != ".jsonl":
            yield Document(_whole(path), source, name, name, licence)
            continue
        for number, text in _lines(path):
            yield Document(text, source, f"{name} line {number}", f"{name} line {number}", licence)


def _readable(folder: Path, leave_out: Sequence[str]) -> list[Path]:
    """The files that are documents, in a fixed order; what else is there is named, by a warning or an error."""
    if not folder.is_dir():
        raise BadText(f"{folder} {'is a file: give the folder that it is in' if folder.exists() else 'does not exist'}")
    readable, hidden, outside, other = [], [], [], []
    for place, folders, names in os.walk(folder, onerror=_cannot_list):
        here = {name: Path(place, name) for name in (*folders, *names)}
        hidden += [path for name, path in here.items() if name.startswith(".")]
        kept = {
            name: path
            for name, path in here.items()
            if not name.startswith(".") and not any(path.relative_to(folder).match(pattern) for pattern in leave_out)
        }
        folders[:] = [name for name in folders if name in kept]
        for path in kept.values():
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                outside.append(path)
            elif path.is_file() and path.suffix.lower() in READ:
                readable.append(path)
            elif not path.is_dir():
                other.append(path)
    if outside:
        raise BadText(
            f"{_listed(outside, folder)} in {folder} lead out of it: copy what they point to into the folder, or leave "
            f"them out with leave_out={[path.name for path in outside[:3]]}"
        )
    if other:
        raise BadText(
            f"{_listed(other, folder)} in {folder} cannot be read: unpack or write them as .txt, .md or .jsonl, or leave "
            f"them out with leave_out={sorted({f'*{path.suffix}' if path.suffix else path.name for path in other})[:5]}"
        )
    if not readable:
        raise BadText(f"{folder} has no .txt, .md or .jsonl file")
    if hidden:
        warnings.warn(f"left out of {folder}, because hidden: {_listed(hidden, folder)}", stacklevel=2)
    return sorted(readable)


def _cannot_list(error: OSError) -> None:
    raise BadText(f"{error.filename}: {error.strerror}") from None


def _listed(paths: Sequence[Path], folder: Path) -> str:
    """The first names, and how many more there are."""
    names = [path.relative_to(folder).as_posix() for path in sorted(paths)]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        line = data.count(b"\n") + 1
        raise BadText(
            f"{path}, line {line}: more than {MAX_LINE_BYTES // 2**20} MiB in one document: cut the file into several, "
            "or write JSONL with one document a line"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadText(f"{path}, line {line}: {_not_utf8(error)}") from None
    _refuse_no_text(f"{path}, line {text.count(chr(10), 0, text.find(NUL)) + 1}", text)
    if not text.strip():
        raise BadText(f"{path}, line 1: the file has nothing but white space: remove it")
    return text


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _refuse_no_text(where: str, text: str) -> None:
    """What Python holds as text and no file may hold."""
    if NUL in text:
        raise BadText(f"{where}: a NUL byte: the file is binary, or UTF-16: save it as UTF-8, or leave it out")
    if bad := _SURROGATE.search(text):
        raise BadText(f"{where}: {bad.group()!r} is half a character: write it as UTF-8, or leave it out")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8, or leave it out"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank; a byte-order mark before the first one is none of it."""
    found = number = 0
    with path.open("rb") as file:
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(data) > MAX_LINE_BYTES:
                raise BadText(f"{where}: longer than {MAX_LINE_BYTES // 2**20} MiB: JSONL has one document a line")
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                entry = json.loads(line)
            except UnicodeDecodeError as error:
                raise BadText(f"{where}: {_not_utf8(error)}") from None
            except (ValueError, RecursionError) as error:
                spans = line.lstrip().startswith("[") or line.strip() == "{"
                raise BadText(
                    f"{where}: {AN_ARRAY if spans else f'not JSON ({error}): one object a line is needed'}"
                ) from None
            if isinstance(entry, list):
                raise BadText(f"{where}: {AN_ARRAY}")
            if not isinstance(entry, dict) or "text" not in entry:
                fields = f"the fields {', '.join(map(str, entry))}" if isinstance(entry, dict) else "no fields"
                raise BadText(f"{where}: has {fields}, needed 'text'")
            if not isinstance(entry["text"], str) or not entry["text"].strip():
                raise BadText(f"{where}: 'text' is empty or no string: remove the line")
            _refuse_no_text(where, entry["text"])
            found += 1
            yield number, entry["text"]
    if not found:
        raise BadText(f"{path}: the file has nothing but blank lines: remove it")

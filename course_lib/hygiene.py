"""The habits that every lesson keeps, as rules: each takes a notebook and returns the problems it finds.

``problems`` are failures; ``advice`` is about size, where a good reason may win.
A rule sees the notebook as plain JSON, so that all lessons are checked in milliseconds.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RULES", "TAGS", "Problem", "advice", "problems"]

TAGS = frozenset(
    "objectives prerequisites imports parameters predict run check exercise attempt solution takeaways next "
    "hide-input hide-cell".split()
)
MAX_CODE_LINES = 14  # a cell that fits on the screen together with its output
CODE_LINES, CODE_CELLS, WORDS = (80, 200), (12, 20), (1000, 1800)
READABLE_ID = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
RANDOM_ID = re.compile(r"^(?=[0-9a-f-]*[0-9])[0-9a-f]{6,}(-[0-9a-f]{4,})*$")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u26ff\u2705\u274c\u2728\u2b50]")
# A full stop, then a new sentence on the same line. "e.g. A", "vs. B" and "1. Item" are no sentence ends.
SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bno)(?<!^\d)(?<!\s\d)[.!?][)\"'*_]*\s+(?=[A-Z`*\"(])"
)

Notebook = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Attributes:
        cell: The cell's id, or an empty string for the notebook as a whole.
        rule: The rule's name.
        message: What was found and how to fix it.
    """

    cell: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.cell or 'notebook'}: {self.message} [{self.rule}]"


def problems(notebook: Notebook) -> list[Problem]:
    """Return every broken rule of a lesson's source."""
    return [Problem(cell, rule.__name__, message) for rule in RULES for cell, message in rule(notebook)]


def advice(notebook: Notebook) -> list[Problem]:
    """Say where a lesson leaves the usual size; a warning, because a good reason may win."""
    sources = [_source(cell) for cell in _cells(notebook, "code")]
    lines = sum(len(_code_lines(source)) for source in sources)
    words = sum(len(re.findall(r"\b\w[\w'-]*", _source(cell))) for cell in _cells(notebook, "markdown"))
    sizes = (("code lines", lines, CODE_LINES), ("code cells", len(sources), CODE_CELLS), ("words", words, WORDS))
    return [
        Problem("", "size", f"{count} {what}, where {low} to {high} are usual")
        for what, count, (low, high) in sizes
        if not low <= count <= high
    ]


Found = Iterator[tuple[str, str]]


def format_is_current(notebook: Notebook) -> Found:
    """The notebook is valid nbformat 4.5."""
    import nbformat
    from nbformat.validator import iter_validate

    if (notebook.get("nbformat"), notebook.get("nbformat_minor")) != (4, 5):
        yield "", f"format {notebook.get('nbformat')}.{notebook.get('nbformat_minor')}, needed 4.5"
        return
    for error in iter_validate(nbformat.from_dict(notebook), version=4, version_minor=5):
        yield "", f"not valid at {'/'.join(map(str, error.path))}: {error.message.splitlines()[0][:200]}"


def ids_are_readable(notebook: Notebook) -> Found:
    """Cell ids are lower-case words, each used once."""
    counts = Counter(cell.get("id", "") for cell in notebook["cells"])
    for name, count in counts.items():
        if count > 1:
            yield name, f"the id {name!r} is used {count} times: give each cell its own"
        if not READABLE_ID.match(name) or RANDOM_ID.match(name) or re.fullmatch(r"[0-9-]*", name):
            yield name, f"the id {name!r} says nothing: use words such as 'check-parameter-count'"


def no_outputs(notebook: Notebook) -> Found:
    """Sources carry no outputs and no execution counts."""
    for cell in _cells(notebook, "code"):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            yield cell["id"], "has outputs or an execution count: clear all outputs before you save"


def metadata_is_small(notebook: Notebook) -> Found:
    """Metadata is the kernel and the language, so that a save by another editor shows no difference."""
    metadata = notebook["metadata"]
    if set(metadata) != {"kernelspec", "language_info"}:
        yield "", f"metadata has {sorted(metadata)}, needed exactly kernelspec and language_info"
        return
    if metadata["kernelspec"].get("name") != "python3":
        yield "", f"the kernel is {metadata['kernelspec'].get('name')!r}, needed 'python3': it needs no registration"
    if metadata["language_info"].get("pygments_lexer") != "ipython3":
        yield "", "language_info needs pygments_lexer 'ipython3': the book colours code by it"
    for cell in notebook["cells"]:
        extra = sorted(set(cell["metadata"]) - {"tags"})
        if extra:
            yield cell["id"], f"cell metadata {extra}: only tags are kept"


def tags_are_known(notebook: Notebook) -> Found:
    """Tags come from a closed list, and the cells that every lesson needs are there once."""
    for cell in notebook["cells"]:
        unknown = sorted(set(_tags(cell)) - TAGS)
        if unknown:
            yield cell["id"], f"unknown tags {unknown}: the list is {sorted(TAGS)}"
    for tag in ("objectives", "prerequisites", "imports", "parameters", "takeaways"):
        count = len(_tagged(notebook, tag))
        if count != 1:
            yield "", f"{count} cells are tagged {tag!r}, needed exactly one"
    if not _tagged(notebook, "check"):
        yield "", "no cell is tagged 'check': a lesson proves its claim"


def one_title(notebook: Notebook) -> Found:
    """The first cell holds the only H1."""
    titles = [
        cell["id"]
        for cell in _cells(notebook, "markdown")
        for _ in re.findall(r"^# ", _prose(cell), flags=re.MULTILINE)
    ]
    if len(titles) != 1:
        yield "", f"{len(titles)} titles of level 1 (in {titles}), needed exactly one"
    elif titles[0] != notebook["cells"][0]["id"]:
        yield titles[0], "the title is not in the first cell"


def takeaways_mirror_objectives(notebook: Notebook) -> Found:
    """What the lesson promises is what it sums up: two lists of equal length."""
    lengths = [
        sum(len(re.findall(r"^(?:[-*]|\d+\.) ", _source(cell), flags=re.MULTILINE)) for cell in _tagged(notebook, tag))
        for tag in ("objectives", "takeaways")
    ]
    if lengths[0] != lengths[1] or not lengths[0]:
        yield (
            "",
            f"{lengths[0]} objectives and {lengths[1]} take-aways: each objective comes back once, with its number",
        )


def imports_are_together(notebook: Notebook) -> Found:
    """All imports stand in the imports cell, no name is imported with a star, and each is used."""
    imported: dict[str, str] = {}
    used: set[str] = set()
    for cell, tree in _trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if "imports" not in _tags(cell):
                    yield cell["id"], f"line {node.lineno} imports something: move it to the imports cell"
                for alias in node.names:
                    if alias.name == "*":
                        yield cell["id"], f"star import in line {node.lineno}: name what you need"
                    imported[alias.asname or alias.name.split(".")[0]] = cell["id"]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
    for name in sorted(set(imported) - used - {"*"}):
        yield imported[name], f"{name!r} is imported and never used"


def no_shell_and_no_tricks(notebook: Notebook) -> Found:
    """No magics, no shell lines, no blanket filters, no path edits, no installs: a lesson is plain Python."""
    for cell in _cells(notebook, "code"):
        source = _source(cell)
        if re.search(r"^\s*(?:%|!|\?)|^\s*\w+\s*=\s*[!%]", source, flags=re.MULTILINE):
            yield cell["id"], "a magic or a shell line: show the command as text and let course_lib build it"
            continue
        tree = _parse(source)
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


def cells_are_short(notebook: Notebook) -> Found:
    """A code cell fits on the screen together with its output."""
    for cell in _cells(notebook, "code"):
        count = len(_code_lines(_source(cell)))
        if count > MAX_CODE_LINES:
            yield (
                cell["id"],
                f"{count} lines of code, needed at most {MAX_CODE_LINES}: split it or move a part to course_lib",
            )


def parameters_are_literals(notebook: Notebook) -> Found:
    """The parameters cell holds literals, one a line, each with a comment, none depending on another."""
    for cell in _tagged(notebook, "parameters"):
        source = _source(cell)
        tree = _parse(source)
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


def one_sentence_a_line(notebook: Notebook) -> Found:
    """Prose has one sentence a source line, so that a change shows as one line."""
    for cell in _cells(notebook, "markdown"):
        for line in _prose(cell).splitlines():
            text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "x", line).strip()
            if text.startswith(("|", "<", ":")):
                continue  # tables cannot be broken into lines
            text = re.sub(r"^(?:[-*]|\d+\.)\s+|^#+\s+", "", text)
            if SENTENCE_END.search(text):
                yield cell["id"], f"two sentences on one line: {line.strip()[:60]!r}"


def plain_words(notebook: Notebook) -> Found:
    """No "simply" and no emoji."""
    for cell in notebook["cells"]:
        text = _source(cell)
        if re.search(r"\bsimply\b", text, flags=re.IGNORECASE):
            yield cell["id"], "says 'simply': it helps nobody for whom it is not simple"
        if EMOJI.search(text):
            yield cell["id"], "has an emoji"


def attempts_are_harmless(notebook: Notebook) -> Found:
    """An exercise has an attempt whose answer is None and a folded solution."""
    for cell in _tagged(notebook, "attempt"):
        if not re.search(r"=\s*None\b", _source(cell)):
            yield cell["id"], "the attempt does not start from `answer = None`"
    for cell in _tagged(notebook, "solution"):
        if "hide-cell" not in _tags(cell):
            yield cell["id"], "the solution is not folded: add the tag hide-cell"
    counts = {tag: len(_tagged(notebook, tag)) for tag in ("attempt", "solution")}
    if counts["attempt"] != counts["solution"]:
        yield "", f"{counts['attempt']} attempts and {counts['solution']} solutions: each attempt needs its solution"


RULES: tuple[Callable[[Notebook], Found], ...] = (
    format_is_current,
    ids_are_readable,
    no_outputs,
    metadata_is_small,
    tags_are_known,
    one_title,
    takeaways_mirror_objectives,
    imports_are_together,
    no_shell_and_no_tricks,
    cells_are_short,
    parameters_are_literals,
    one_sentence_a_line,
    plain_words,
    attempts_are_harmless,
)


def _cells(notebook: Notebook, kind: str) -> list[Mapping[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def _tagged(notebook: Notebook, tag: str) -> list[Mapping[str, Any]]:
    return [cell for cell in notebook["cells"] if tag in _tags(cell)]


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def _prose(cell: Mapping[str, Any]) -> str:
    """The text of a markdown cell without its fenced code."""
    return re.sub(r"^(`{3,}|~{3,}).*?^\1", "", _source(cell), flags=re.MULTILINE | re.DOTALL)


def _code_lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]


def _parse(source: str) -> ast.Module | SyntaxError:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        return error


def _trees(notebook: Notebook) -> Iterator[tuple[Mapping[str, Any], ast.Module]]:
    for cell in _cells(notebook, "code"):
        tree = _parse(_source(cell))
        if isinstance(tree, ast.Module):
            yield cell, tree

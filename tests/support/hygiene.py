"""The habits that every lesson keeps, as rules: each takes a notebook and returns the problems it finds.

``problems`` are failures; ``advice`` is about size, where a good reason may win.
A rule sees the notebook as plain JSON, so that all lessons are checked in milliseconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from support import hygiene_code, hygiene_learner
from support import notebook_cells as cells
from support.notebook_cells import Notebook

__all__ = ["RULES", "TAGS", "Problem", "advice", "problems"]

TAGS = frozenset(
    "objectives prerequisites imports parameters guess predict run check exercise attempt solution quiz takeaways next "
    "hide-input hide-output hide-cell".split()
)
CODE_LINES, CODE_CELLS, WORDS = (80, 280), (12, 20), (1000, 1800)
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 15  # read with understanding
WAITING = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")  # minutes, measured
READABLE_ID = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
RANDOM_ID = re.compile(r"^(?=[0-9a-f-]*[0-9])[0-9a-f]{6,}(-[0-9a-f]{4,})*$")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u26ff\u2705\u274c\u2728\u2b50]")
# A full stop, then a new sentence on the same line. "e.g. A", "vs. B" and "1. Item" are no sentence ends.
SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bno)(?<!^\d)(?<!\s\d)[.!?][)\"'*_]*\s+(?=[A-Z`*\"(])"
)


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
    own = {"guess", "attempt", "solution", "quiz", "exercise"}  # the learner's cells are counted by their own rules
    code = [cell for cell in cells.of_kind(notebook, "code") if not own & set(cells.tags(cell))]
    sources = [cells.source(cell) for cell in code]
    lines = sum(len(cells.code_lines(source)) for source in sources)
    words = sum(len(re.findall(r"\b\w[\w'-]*", cells.source(cell))) for cell in cells.of_kind(notebook, "markdown"))
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
    for cell in cells.of_kind(notebook, "code"):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            yield cell["id"], "has outputs or an execution count: clear all outputs before you save"


FOLDS = {
    "hide-cell": {"outputs_hidden": True, "source_hidden": True},
    "hide-input": {"source_hidden": True},
    "hide-output": {"outputs_hidden": True},
}
"""What JupyterLab needs to fold the cells that the book folds by their tags."""


def metadata_is_small(notebook: Notebook) -> Found:
    """Metadata is the kernel, the language and what is folded, so that a save by another editor shows no difference."""
    metadata = notebook["metadata"]
    if set(metadata) != {"kernelspec", "language_info"}:
        yield "", f"metadata has {sorted(metadata)}, needed exactly kernelspec and language_info"
        return
    if metadata["kernelspec"].get("name") != "python3":
        yield "", f"the kernel is {metadata['kernelspec'].get('name')!r}, needed 'python3': it needs no registration"
    if metadata["language_info"].get("pygments_lexer") != "ipython3":
        yield "", "language_info needs pygments_lexer 'ipython3': the book colours code by it"
    for cell in notebook["cells"]:
        extra = sorted(set(cell["metadata"]) - {"tags", "jupyter"})
        if extra:
            yield cell["id"], f"cell metadata {extra}: only tags and what JupyterLab folds are kept"
        folds = [FOLDS[tag] for tag in cells.tags(cell) if tag in FOLDS]
        given = cell["metadata"].get("jupyter")
        if given != (folds[0] if folds else None):
            needed = f"needed {folds[0]}" if folds else "no tag asks for it"
            yield cell["id"], f"'jupyter' is {given}, {needed}: JupyterLab folds by it what the book folds by tag"


def tags_are_known(notebook: Notebook) -> Found:
    """Tags come from a closed list, and the cells that every lesson needs are there once."""
    for cell in notebook["cells"]:
        unknown = sorted(set(cells.tags(cell)) - TAGS)
        if unknown:
            yield cell["id"], f"unknown tags {unknown}: the list is {sorted(TAGS)}"
    for tag in ("objectives", "prerequisites", "imports", "parameters", "takeaways"):
        count = len(cells.tagged(notebook, tag))
        if count != 1:
            yield "", f"{count} cells are tagged {tag!r}, needed exactly one"
    if not cells.tagged(notebook, "check"):
        yield "", "no cell is tagged 'check': a lesson proves its claim"


def one_title(notebook: Notebook) -> Found:
    """The first cell holds the only H1."""
    titles = [
        cell["id"]
        for cell in cells.of_kind(notebook, "markdown")
        for _ in re.findall(r"^# ", cells.prose(cell), flags=re.MULTILINE)
    ]
    if len(titles) != 1:
        yield "", f"{len(titles)} titles of level 1 (in {titles}), needed exactly one"
    elif titles[0] != notebook["cells"][0]["id"]:
        yield titles[0], "the title is not in the first cell"


def takeaways_mirror_objectives(notebook: Notebook) -> Found:
    """What the lesson promises is what it sums up: two lists of equal length."""
    lengths = [
        sum(
            len(re.findall(r"^(?:[-*]|\d+\.) ", cells.source(cell), flags=re.MULTILINE))
            for cell in cells.tagged(notebook, tag)
        )
        for tag in ("objectives", "takeaways")
    ]
    if lengths[0] != lengths[1] or not lengths[0]:
        yield (
            "",
            f"{lengths[0]} objectives and {lengths[1]} take-aways: each objective comes back once, with its number",
        )


def minutes_are_computed(notebook: Notebook) -> Found:
    """What a lesson says of its minutes is the time to read it, and the waiting that it names, in steps of five.

    Folded cells are not counted: who unfolds a solution has worked on it first, and nobody knows how long.
    """
    text = "\n".join(cells.source(cell) for cell in cells.tagged(notebook, "prerequisites"))
    said = re.search(r"(\d+) minutes(?:, (?:[\w ]*?)(\w+) of them waiting)?", text)
    if not said:
        yield "", "says no minutes: write `(about 20 minutes, two of them waiting)` where it says what is needed"
        return
    waiting = WAITING.index(said[2]) if said[2] in WAITING else 0
    words = sum(len(cells.prose(cell).split()) for cell in cells.of_kind(notebook, "markdown"))
    folded = {"solution", "quiz", "hide-input", "hide-cell"}
    open_ = [cell for cell in cells.of_kind(notebook, "code") if not folded & set(cells.tags(cell))]
    lines = sum(len(cells.code_lines(cells.source(cell))) for cell in open_)
    needed = 5 * ceil((words / WORDS_A_MINUTE + lines / LINES_A_MINUTE + waiting) / 5)
    if int(said[1]) != needed:
        yield "", f"says {said[1]} minutes; {words} words, {lines} lines and {waiting} of waiting make about {needed}"


def one_sentence_a_line(notebook: Notebook) -> Found:
    """Prose has one sentence a source line, so that a change shows as one line."""
    for cell in cells.of_kind(notebook, "markdown"):
        for line in cells.prose(cell).splitlines():
            text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "x", line).strip()
            if text.startswith(("|", "<", ":")):
                continue  # tables cannot be broken into lines
            text = re.sub(r"^(?:[-*]|\d+\.)\s+|^#+\s+", "", text)
            if SENTENCE_END.search(text):
                yield cell["id"], f"two sentences on one line: {line.strip()[:60]!r}"


def powers_are_code(notebook: Notebook) -> Found:
    """A power in prose stands in backquotes or in a formula; two bare ones print what is between them in bold."""
    for cell in cells.of_kind(notebook, "markdown"):
        for line in cells.prose(cell).splitlines():
            if found := re.search(r"\w+\*\*\d+", re.sub(r"`[^`]*`|\$[^$]*\$", "x", line)):
                yield cell["id"], f"{found[0]} is no formula in Markdown: write `{found[0]}` in backquotes"


def plain_words(notebook: Notebook) -> Found:
    """No "simply" and no emoji."""
    for cell in notebook["cells"]:
        text = cells.source(cell)
        if re.search(r"\bsimply\b", text, flags=re.IGNORECASE):
            yield cell["id"], "says 'simply': it helps nobody for whom it is not simple"
        if EMOJI.search(text):
            yield cell["id"], "has an emoji"


RULES: tuple[Callable[[Notebook], Found], ...] = (
    format_is_current,
    ids_are_readable,
    no_outputs,
    metadata_is_small,
    tags_are_known,
    one_title,
    takeaways_mirror_objectives,
    hygiene_code.imports_are_together,
    hygiene_code.no_shell_and_no_tricks,
    hygiene_code.cells_are_short,
    hygiene_code.parameters_are_literals,
    hygiene_code.code_is_narrow,
    minutes_are_computed,
    one_sentence_a_line,
    powers_are_code,
    plain_words,
    hygiene_learner.guesses_come_first,
    hygiene_learner.attempts_hide_the_answer,
    hygiene_learner.exercises_are_a_ladder,
    hygiene_learner.a_quiz_has_three_questions,
)

"""The habits that leave the work to the learner, as rules like those of `hygiene`: guesses, attempts, the ladder, the quiz."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from course_lib.lesson import quiz
from support import notebook_cells as cells
from support.notebook_cells import Cell, Notebook

__all__ = ["a_quiz_has_three_questions", "attempts_hide_the_answer", "exercises_are_a_ladder", "guesses_come_first"]

LADDER = ("read", "do", "repair")
EXERCISES = "course_lib.lesson.exercises"


def _calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a dotted name."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def _tree(cell: Cell) -> ast.Module:
    tree = cells.parse(cells.source(cell))
    return tree if isinstance(tree, ast.Module) else ast.Module([], [])  # no_shell_and_no_tricks says so


def guesses_come_first(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """A guess is a name that starts at None, stands before the folded prediction, and reaches the ledger as what it is."""
    known: set[str] = set()
    entered: set[str] = set()
    for cell in cells.of_kind(notebook, "code"):
        if "guess" in cells.tags(cell):
            for line in cells.code_lines(cells.source(cell)):
                found = re.fullmatch(r"(guess\w*) = None  # \S.*", line)
                if not found:
                    yield cell["id"], f"{line!r} is no guess: write `guess = None  # yours, in GiB`, and nothing else"
                else:
                    known.add(found.group(1))
        for call in _calls(_tree(cell), "checks.predict"):
            if not {"predict", "hide-input"} <= set(cells.tags(cell)):
                yield cell["id"], "predicts in the open: give the cell the tags predict and hide-input"
            for word in call.keywords:
                name = ast.unparse(word.value)
                if word.arg == "guess" and name not in known:
                    yield cell["id"], f"enters {name} as a guess, and no cell tagged guess above it has that name"
                entered |= {name} if word.arg == "guess" else set()
    if not known:
        yield "", "no cell is tagged guess: before the run the learner says what they expect"
    for name in sorted(known - entered):
        yield "", f"nobody hears of {name}: enter it by checks.predict(..., guess={name})"


def attempts_hide_the_answer(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """An attempt starts from None and names an exercise of the library; neither check nor answer stands in its cell."""
    modules = {
        alias.asname or alias.name
        for _, tree in cells.trees(notebook)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == EXERCISES
        for alias in node.names
    }
    judges: list[str] = []
    for cell in cells.tagged(notebook, "attempt"):
        tree = _tree(cell)
        empty = {
            ast.unparse(target)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "None"
            for target in node.targets
        }
        calls = _calls(tree, "checks.attempt")
        if len(calls) != 1 or len(calls[0].args) < 2 or ast.unparse(calls[0].args[0]) not in empty:
            yield (
                cell["id"],
                "an attempt is `answer = None  # what`, and one `checks.attempt(answer, module.exercise, ...)`",
            )
            continue
        judge = ast.unparse(calls[0].args[1])
        judges.append(judge)
        if judge.split(".")[0] not in modules or judge.count(".") != 1:
            yield cell["id"], f"{judge} is no exercise of a module that is imported from {EXERCISES}"
        for node in ast.walk(tree):
            own = isinstance(node, ast.Call) and re.match(r"checks\.(?!attempt$)", ast.unparse(node.func))
            if own or isinstance(node, ast.Lambda | ast.Compare | ast.Assert):
                yield cell["id"], f"`{ast.unparse(node)}` is a check: it tells the answer, so it belongs to {EXERCISES}"
        for node in ast.walk(calls[0]):
            if isinstance(node, ast.Constant):
                yield (
                    cell["id"],
                    f"the exercise gets {node.value!r}: let it compute what is right from what the lesson made",
                )
    for cell in cells.tagged(notebook, "solution"):
        if "hide-cell" not in cells.tags(cell):
            yield cell["id"], "the solution is not folded: add the tag hide-cell"
    solved = [
        ast.unparse(call.args[1])
        for cell in cells.tagged(notebook, "solution")
        for call in _calls(_tree(cell), "checks.solution")
        if len(call.args) > 1
    ]
    if sorted(solved) != sorted(judges):
        yield (
            "",
            f"attempts are judged by {judges}, solutions by {solved}: each exercise has one solution that it judges",
        )


def exercises_are_a_ladder(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """Two or three exercises, each harder: `attempt-read`, `attempt-do`, `attempt-repair`, and their solutions."""
    for tag in ("attempt", "solution"):
        names = [cell["id"] for cell in cells.tagged(notebook, tag)]
        usual = [f"{tag}-{rung}" for rung in LADDER if f"{tag}-{rung}" in names]
        if names != usual or len(names) < 2:
            yield "", f"the cells tagged {tag} are {names}: two or three of {LADDER} in this order, as {tag}-read"


def a_quiz_has_three_questions(notebook: Notebook) -> Iterator[tuple[str, str]]:
    """One folded cell shows the lesson's quiz, which has three questions."""
    found = cells.tagged(notebook, "quiz")
    if len(found) != 1:
        yield "", f"{len(found)} cells are tagged quiz, needed exactly one: three questions close a lesson"
    for cell in found:
        call = re.fullmatch(r'quiz\.show\("(\w+)"\)', cells.source(cell).strip())
        if not call or "hide-input" not in cells.tags(cell):
            yield cell["id"], 'the cell is `quiz.show("NN")`, with the tags quiz and hide-input'
            continue
        try:
            count = len(quiz.read(call.group(1)))
        except quiz.QuizError as error:
            yield cell["id"], str(error)
        else:
            if count != 3:
                yield cell["id"], f"{quiz.path(call.group(1)).name} has {count} questions, needed three"

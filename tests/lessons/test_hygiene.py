"""Every lesson keeps the habits, each habit is tested with a notebook that breaks it, and the project keeps its own."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks
from support import hygiene
from support.notebooks_made_here import ATTEMPT, PREDICT, clean, code, markdown

LESSONS = [lesson.path for lesson in notebooks.listing()]
MODULES = sorted((PROJECT / "course_lib").rglob("*.py"))
Change = Callable[[dict[str, Any]], object]


def cell(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """The cell with this id."""
    return next(cell for cell in notebook["cells"] if cell["id"] == name)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_keeps_the_rules(path: Path) -> None:
    """No lesson breaks a rule; leaving the usual size is a warning."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert [str(problem) for problem in hygiene.problems(notebook)] == []
    for problem in hygiene.advice(notebook):
        warnings.warn(f"{path.stem}: {problem.message}", stacklevel=1)


def test_a_clean_notebook_has_no_problem() -> None:
    """The notebook that the other tests break keeps every rule."""
    assert hygiene.problems(clean()) == []


def change(name: str, **fields: object) -> Change:
    """A change of fields of one cell."""
    return lambda notebook: cell(notebook, name).update(fields)


def add(new: dict[str, Any]) -> Change:
    """A change that adds a cell before the take-aways."""
    return lambda notebook: notebook["cells"].insert(-1, new)


BREAKS: list[tuple[str, str, Change]] = [
    ("format_is_current", "an old format", lambda notebook: notebook.update(nbformat_minor=4)),
    ("format_is_current", "an invalid cell", change("sum", execution_count="three")),
    ("ids_are_readable", "a random id", change("sum", id="3f2a9c1b")),
    ("ids_are_readable", "a uuid", change("sum", id="3f2a9c1b-11aa-4bcd-9e0f-aabbccddeeff")),
    ("ids_are_readable", "capitals", change("sum", id="Sum_Up")),
    ("ids_are_readable", "an id used twice", change("sum", id="imports")),
    ("no_outputs", "an execution count", change("sum", execution_count=3)),
    ("no_outputs", "an output", change("sum", outputs=[{"output_type": "stream", "name": "stdout", "text": "4"}])),
    ("metadata_is_small", "widget state", lambda notebook: notebook["metadata"].update(widgets={})),
    ("metadata_is_small", "another kernel", lambda notebook: notebook["metadata"]["kernelspec"].update(name="my-env")),
    ("metadata_is_small", "no lexer", lambda notebook: notebook["metadata"]["language_info"].pop("pygments_lexer")),
    ("metadata_is_small", "cell metadata", change("sum", metadata={"collapsed": True})),
    ("metadata_is_small", "open in JupyterLab", change("solution-do", metadata={"tags": ["solution", "hide-cell"]})),
    ("metadata_is_small", "folded without a tag", change("sum", metadata={"jupyter": {"source_hidden": True}})),
    ("tags_are_known", "an unknown tag", change("sum", metadata={"tags": ["fancy"]})),
    ("tags_are_known", "no parameters cell", lambda notebook: notebook["cells"].remove(cell(notebook, "parameters"))),
    ("tags_are_known", "no check", change("check-the-sum", metadata={})),
    ("one_title", "two titles", add(markdown("second", "# Another title"))),
    ("one_title", "no title", change("title", source="## A small lesson\n")),
    ("takeaways_mirror_objectives", "one take-away for two", change("takeaways", source="- You added.\n")),
    ("imports_are_together", "an import elsewhere", change("sum", source="import os\ntotal = os.getpid()")),
    ("imports_are_together", "an unused import", change("imports", source="from course_lib.lesson import checks, notebooks, x")),
    ("imports_are_together", "a star import", change("imports", source="from course_lib.lesson.checks import *")),
    ("no_shell_and_no_tricks", "a magic", add(code("magic", "%matplotlib inline"))),
    ("no_shell_and_no_tricks", "a cell magic", add(code("magic", "%%bash\nls"))),
    ("no_shell_and_no_tricks", "a shell line", add(code("shell", "!ls"))),
    ("no_shell_and_no_tricks", "a captured shell line", add(code("shell", "files = !ls"))),
    ("no_shell_and_no_tricks", "a blanket filter", add(code("quiet", 'warnings.filterwarnings("ignore")'))),
    ("no_shell_and_no_tricks", "a path edit", add(code("path", 'sys.path.append("..")'))),
    ("no_shell_and_no_tricks", "broken Python", add(code("broken", "for x in"))),
    ("cells_are_short", "a long cell", add(code("long", "\n".join(f"value_{i} = {i}" for i in range(25))))),
    ("parameters_are_literals", "a computed parameter", change("parameters", source="a = 2  # a\nb = a + 1  # b")),
    ("parameters_are_literals", "no comment", change("parameters", source="first = 2\nsecond = 3  # another")),
    ("parameters_are_literals", "no assignment", change("parameters", source="print(2)  # shown")),
    ("minutes_are_computed", "no minutes", change("before-you-start", source="Nothing is needed.\n")),
    ("minutes_are_computed", "a guess", change("before-you-start", source="About 10 minutes.\n")),
    ("minutes_are_computed", "no waiting", change("before-you-start", source="5 minutes, five of them waiting.\n")),
    ("one_sentence_a_line", "two sentences", change("title", source="# T\n\nOne sentence. Another sentence.\n")),
    ("one_sentence_a_line", "two in a list", change("takeaways", source="- You added. You know it.\n- You did.\n")),
    ("powers_are_code", "a bare power", change("title", source="# T\n\nA GiB is 2**30, a GB 10**9.\n")),
    ("plain_words", "simply", change("title", source="# T\n\nSimply run it.\n")),
    ("plain_words", "an emoji", change("title", source="# T \U0001f680\n")),
    ("code_is_narrow", "a long line", change("sum", source="total = " + " + ".join(["first"] * 20))),
    ("code_is_narrow", "a long line in prose", change("title", source=f"# T\n\n```\n{'x' * 89}\n```\n")),
    ("code_is_narrow", "settings in a tuple", change("sum", source="a.b, a.c = 1, 2\ntotal = first")),
    ("code_is_narrow", "two statements", change("sum", source="a = 1; total = first")),
    ("guesses_come_first", "no guess", change("guess", metadata={})),
    ("guesses_come_first", "a filled guess", change("guess", source="guess = 4  # yours")),
    ("guesses_come_first", "no unit", change("guess", source="guess = None")),
    ("guesses_come_first", "a formula as a guess", change("predict", source=PREDICT.replace("guess=guess", "guess=2 + 2"))),
    ("guesses_come_first", "a guess that nobody enters", change("predict", source=PREDICT.replace(", guess=guess", ""))),
    ("guesses_come_first", "an open prediction", change("predict", metadata={"tags": ["predict"]})),
    ("guesses_come_first", "a guess after the prediction", lambda notebook: notebook["cells"].reverse()),
    ("attempts_hide_the_answer", "an answer", change("attempt-do", source=ATTEMPT.replace("None", "4"))),
    ("attempts_hide_the_answer", "no exercise", change("attempt-do", source="answer = None\nprint(answer)")),
    ("attempts_hide_the_answer", "a check", change("attempt-do", source=f"{ATTEMPT}\nchecks.claim(answer, 'x')")),
    ("attempts_hide_the_answer", "a comparison", change("attempt-do", source=f"{ATTEMPT}\nanswer == first")),
    ("attempts_hide_the_answer", "a lambda", change("attempt-do", source=ATTEMPT.replace("report", "lambda: 0"))),
    ("attempts_hide_the_answer", "a literal", change("attempt-do", source=ATTEMPT.replace("report", "4"))),
    ("attempts_hide_the_answer", "a judge of its own", change("attempt-do", source=ATTEMPT.replace("setup.", ""))),
    ("attempts_hide_the_answer", "an open solution", change("solution-do", metadata={"tags": ["solution"]})),
    ("attempts_hide_the_answer", "a solution of something else", change("solution-do", source="checks.claim(1, 'x')")),
    ("exercises_are_a_ladder", "one exercise", change("attempt-do", metadata={})),
    ("exercises_are_a_ladder", "no solution", change("solution-do", metadata={})),
    ("exercises_are_a_ladder", "another name", change("attempt-do", id="attempt-more")),
    ("a_quiz_has_three_questions", "no quiz", change("quiz", metadata={})),
    ("a_quiz_has_three_questions", "an open quiz", change("quiz", metadata={"tags": ["quiz"]})),
    ("a_quiz_has_three_questions", "no such quiz", change("quiz", source='quiz.show("none")')),
    ("a_quiz_has_three_questions", "something else", change("quiz", source="print(1)")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "what", "breaks"), BREAKS, ids=[f"{rule}: {what}" for rule, what, _ in BREAKS])
def test_a_broken_rule_is_found(rule: str, what: str, breaks: Change) -> None:
    """Each rule finds the notebook that breaks it, and says something."""
    notebook = clean()
    breaks(notebook)
    found = [problem for problem in hygiene.problems(notebook) if problem.rule == rule]
    assert found and all(problem.message for problem in found)


def test_every_rule_is_broken_once() -> None:
    """No rule is without a test that breaks it."""
    assert {rule for rule, _, _ in BREAKS} == {rule.__name__ for rule in hygiene.RULES}


@pytest.mark.parametrize(
    "line",
    [
        "It is 3.14 nats, e.g. A or B.",
        "| a cell. Another | x |",
        "1. First item",
        "See `a.b. C` for it.",
        "A link to [it](https://example.org/a. B) ends here.",
        "```\nOne. Two. Three.\n```",
    ],
)
def test_what_is_no_second_sentence(line: str) -> None:
    """Numbers, abbreviations, tables, code and links are no second sentence."""
    notebook = clean()
    cell(notebook, "title")["source"] = f"# T\n\n{line}\n"
    assert [problem for problem in hygiene.problems(notebook) if problem.rule == "one_sentence_a_line"] == []


def test_size_is_advice() -> None:
    """A lesson of another size than usual is no failure."""
    assert {problem.rule for problem in hygiene.advice(clean())} == {"size"}


# The project's own habits.

HEAVY = {
    "torch",
    "megatron",
    "transformers",
    "matplotlib",
    "pandas",
    "numpy",
    "IPython",
    "papermill",
    "ipywidgets",
    "nbformat",
}
# What a rank process executes; everything else may be imported in a notebook's kernel.  (Lessons 11 and 12 import by_hand
# to print its source, after they imported torch.)
IN_RANKS_ONLY = {"ranks", "by_hand", "by_hand_ranks"}
IN_RANKS_ONLY |= {"preload"}  # of the GPU check: the process that its checks are forked from
IN_RANKS_ONLY |= {
    "state_space",
    "state_spaces",
    "te_layers",
}  # tensors, which a lesson imports after `prepare_imports()`


def module_name(path: Path) -> str:
    """The dotted name of a module of course_lib."""
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def top_level_imports(path: Path) -> set[str]:
    """Modules that a file imports when it is imported itself, without those under TYPE_CHECKING."""
    names: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit(node.body + node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body + node.orelse + node.finalbody)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return names


KERNEL_MODULES = [
    path for path in MODULES if not IN_RANKS_ONLY & set(path.relative_to(PROJECT / "course_lib").with_suffix("").parts)
]


def test_importing_course_lib_does_nothing() -> None:
    """`import course_lib` loads no other module of the course and nothing heavy."""
    code_ = "import sys, course_lib; print([m for m in sys.modules if 'course_lib.' in m], {heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code_.replace("{heavy}", repr(HEAVY))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] set()"


def test_kernel_modules_are_light_and_never_fake_cuda() -> None:
    """Importing all that a notebook may import loads nothing heavy, and never `course_lib.ranks.cpu`."""
    names = [module_name(path) for path in KERNEL_MODULES if path.stem != "__main__"]
    code_ = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), [m for m in sys.modules if m.startswith('course_lib.ranks.cpu')])"
    )
    done = subprocess.run([sys.executable, "-c", code_], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[] []"), done.stderr


def test_no_circle_of_imports() -> None:
    """No module of course_lib imports itself by way of others."""
    names = {module_name(path): path for path in MODULES}
    graph = {
        name: {other for other in top_level_imports(path) if other in names and other != name}
        for name, path in names.items()
    }
    graph = {name: others - {"course_lib"} for name, others in graph.items()}
    while graph:
        free = [name for name, others in graph.items() if not others & set(graph)]
        assert free, f"these import each other: {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_public_module_says_what_it_is_and_offers(path: Path) -> None:
    """A module has a docstring; what `__all__` lists, where there is one, exists."""
    if path.stem in ("__init__", "__main__") or path.stem.startswith("_"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == "__all__"
    ]
    if not listed:
        return
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    defined |= {name.id for node in assigned for name in ast.walk(node) if isinstance(name, ast.Name)}
    defined |= {name.split(".")[-1] for name in top_level_imports(path)}
    assert set(listed[0]) <= defined


def test_no_path_of_one_machine() -> None:
    """No file of the project names a home directory or a workplace."""
    texts = {".py", ".ipynb", ".md", ".toml", ".yml", ".yaml", ".json", ".css", ".js", ""}
    folders = ["course_lib", "notebooks", "tests", "data", ".ci"]
    files = [path for folder in folders for path in (PROJECT / folder).rglob("*")] + list(PROJECT.glob("*"))
    files += list((PROJECT / "book").glob("*")) + list((PROJECT / "book" / "static").glob("*"))
    made = {"__pycache__", ".ipynb_checkpoints"}
    local = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w+")
    found = [
        f"{path.relative_to(PROJECT)}: {match.group()}"
        for path in files
        if path.is_file() and path.suffix in texts and path.name != "uv.lock" and not made & set(path.parts)
        for match in local.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []

"""What the course refuses ends in the learner's cell; a fault of the course's own shows every frame."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from course_lib.lesson import notebooks

SETUP = """
from pathlib import Path
from course_lib import launch, recipes, stack
from course_lib.common import config
from course_lib.experiments import hello, sweep
from course_lib.lesson import checks
from course_lib.planning import layout, memory, messages
from course_lib.text import corpus, indexed, tokenizers
stack.prepare_imports()
from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
with recipes.offline():
    cfg = llama32_1b_pretrain_config()
cfg_tp3 = config.changed(cfg, {"model.tensor_model_parallel_size": 3})
"""

REFUSED = {
    "launch.run(cfg_tp3, ranks=8)": "LayoutError: this layout cannot run",
    'launch.run(Path("nowhere.yaml"), ranks=8)': "nowhere.yaml does not exist",
    'launch.prepare(cfg, ranks=8, target="x")': "'x' names no function",
    "hello.ranks(0)": "ranks=0 is not a number of ranks",
    "recipes.shrink(cfg, hidden_size=7)": "hidden_size=7 is not a multiple of num_attention_heads=32",
    "recipes.shrink(cfg, layers=3)": "no field 'model.layers'",
    'config.changed(cfg, {"model.layers": 3})': "no field 'model.layers'",
    "memory.plan(cfg_tp3, ranks=8)": "LayoutError: this layout cannot run",
    "layout.require(cfg_tp3, 8)": "TP=3 does not divide",
    "messages.expected(cfg_tp3, ranks=8)": "this layout cannot run",
    'corpus.build([], Path("corpus"), held_out_percent=60)': "held_out_percent=60: must be above 0 and below 50",
    'tokenizers.load(Path("nowhere"))': "nowhere/tokenizer.json does not exist",
    "sweep.one_change(cfg, cfg)": "the configurations do not differ",
    'checks.claim(False, "two and two are five")': "does not hold: two and two are five",
    "checks.solution(3, lambda answer: 1 / 0)": "the exercise cannot work with the answer 3",
}
SHOWN_WHOLE = {
    "%tb": ("in solution(", "checks.py", "ClaimFailed: "),  # the refusal just before
    "recipes.shrink(7, hidden_size=8)": ("in shrink(", "AttributeError"),
    "1 / 0": ("1 / 0", "ZeroDivisionError"),
}


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """What each cell of a notebook shows when it fails, executed in a kernel as JupyterLab and papermill do."""
    import nbclient
    import nbformat

    sources = [SETUP, *REFUSED, *SHOWN_WHOLE]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(
        notebook, allow_errors=True, kernel_name="python3", timeout=300, startup_timeout=300
    ).execute()
    shown = {}
    for cell in notebook.cells:
        lines = [line for output in cell.outputs for line in output.get("traceback", [])]
        shown[cell.source] = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))
    assert not shown.pop(SETUP)
    return shown


@pytest.mark.parametrize("cell", REFUSED)
def test_a_refusal_ends_in_the_cell(errors: dict[str, str], cell: str) -> None:
    """The line of the cell, then the sentence; no file of the course, no cause from below."""
    assert f"----> 1 {cell}" in errors[cell] and REFUSED[cell] in errors[cell]
    assert "File " not in errors[cell] and "The above exception" not in errors[cell]


@pytest.mark.parametrize("cell", SHOWN_WHOLE)
def test_any_other_error_keeps_its_frames(errors: dict[str, str], cell: str) -> None:
    """Nobody wrote a sentence for it, so where it happened is all there is; of a refusal, `%tb` shows as much."""
    assert all(words in errors[cell] for words in SHOWN_WHOLE[cell])


@pytest.mark.parametrize("path", notebooks.notebooks(), ids=lambda path: path.stem.split("_")[0])
def test_every_lesson_shortens_its_tracebacks(path: Path) -> None:
    """`prepare_imports` does it, in the cell of imports."""
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]}
    assert "stack.prepare_imports()" in cells["imports"]

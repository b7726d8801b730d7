"""The project's book with one small lesson, built once for all tests that look at it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from book import builder
from book.builder import assets as book_assets
from course_lib.common.project import PROJECT
from course_lib.figures import cuts
from course_lib.lesson import quiz, tables
from course_lib.reading import pipeline
from support.hygiene_code import MAX_WIDTH
from support.notebooks_made_here import clean, code, markdown, write

# One transparent pixel.
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def copy_book(tmp_path: Path) -> Path:
    """The project's book without what was generated, but with the tarballs that were already fetched."""
    root = tmp_path / "project"
    generated = shutil.ignore_patterns("_build", "lessons", "assets")
    shutil.copytree(PROJECT / "book", root / "book", ignore=generated)
    (root / "notebooks").mkdir()
    shutil.copytree(PROJECT / "data", root / "data")
    shutil.copy(PROJECT / "uv.lock", root)
    assets = book_assets.vendor(PROJECT / "book" / "assets")
    (root / "book" / "assets").symlink_to(assets, target_is_directory=True)
    return root


def executed_lesson(root: Path, *, extra: str = "") -> Path:
    """A lesson and its executed copy: a widget, a quiz, a picture with words, a formula, a diagram, tables, wide code."""
    import ipywidgets
    import pandas as pd
    from ipywidgets.embed import dependency_state

    lesson = clean()
    text = (
        "The loss is $\\ln V$ [nats](../book/glossary.md#nat).\nSee [your ledger](your_ledger.ipynb).\n\n"
        "| layer | bytes |\n|---|--:|\n| norm | 64 |\n\n"
        "```mermaid\nflowchart LR\n    a --> b\n```\n" + extra
    )
    lesson["cells"].insert(3, markdown("formula", text))
    lesson["cells"].insert(4, code("picture", f"words = {'x' * (MAX_WIDTH - len('words = '))}"))
    write(root / "notebooks" / "07_small.ipynb", lesson)
    words = {"alt": "Loss falls.", "width": 720}
    control = ipywidgets.Dropdown(options=["TP=1", "TP=2"], description="layout")
    names = ["model.gradient_accumulation_fusion", "transformer_engine", "AttnBackend.unfused"]
    wide = pd.DataFrame([[*names, 3e-5, "A CPU emulates the type, and takes six times as long as with fp32."]])
    rows = pipeline.replay(pipeline.one_forward_one_backward(2, 2))
    steps = cuts.pipeline_steps(rows, title="1F1B")._repr_mimebundle_()
    view = {"model_id": control.model_id, "version_major": 2, "version_minor": 0}
    lesson["cells"][4]["outputs"] = [
        {"output_type": "display_data", "data": {"image/png": PICTURE}, "metadata": {"image/png": words}},
        {"output_type": "stream", "name": "stdout", "text": f"wrote {root}/runs/smoke/config.yaml\n"},
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": view}, "metadata": {}},
        {"output_type": "display_data", "data": {"text/html": tables.full(wide).to_html()}, "metadata": {}},
        {"output_type": "display_data", "data": {"text/html": wide[[0, 3]].to_html()}, "metadata": {}},
        {"output_type": "display_data", "data": {"text/html": steps["text/html"]}, "metadata": {}},
    ]  # fmt: skip
    lesson["cells"][4]["execution_count"] = 1
    asked = next(cell for cell in lesson["cells"] if cell["id"] == "quiz")
    words = {"text/html": quiz.as_text(quiz.read("00"))}  # what a kernel without a browser shows
    asked |= {"execution_count": 2, "outputs": [{"output_type": "display_data", "data": words, "metadata": {}}]}
    state = {"state": dependency_state(control), "version_major": 2, "version_minor": 0}
    lesson["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    path = write(root / "book" / "lessons" / "07_small.ipynb", lesson)
    later = time.time() + 5
    os.utime(path, (later, later))
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book of this project with one small executed lesson, as HTML."""
    root = copy_book(tmp_path_factory.mktemp("book"))
    executed_lesson(root)
    return builder.build(root=root, execute=False).parent

"""The project's book with two small lessons, built once for all tests that look at it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from book import builder
from book.builder import assets as book_assets
from course_lib.common.project import PROJECT
from course_lib.figures import cuts
from course_lib.lesson import quiz, tables
from course_lib.planning import ceiling, controls, memory
from course_lib.planning.layout import Layout
from course_lib.reading import pipeline
from support import once
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


def planned(tp: int) -> tuple[Any, memory.Plan]:
    """A configuration and a plan of a model that nobody built, to draw."""
    fields = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    fields |= {"hidden_size": 4096, "ffn_hidden_size": 14336, "gated_linear_unit": True}
    model = SimpleNamespace(**fields, sequence_parallel=tp > 1, seq_length=8192, recompute_granularity=None)
    train = SimpleNamespace(micro_batch_size=1, global_batch_size=128)
    size = 2**36 // tp
    plan = memory.Plan(
        Layout(world_size=8, tensor_model_parallel_size=tp),
        memory.States(0, size, 0, size, size // 4, size // 8),
        memory.Activations(size // 2, 0, 1.0, 0, {}),
    )
    tokenizer = SimpleNamespace(vocab_size=128256)
    return SimpleNamespace(model=model, train=train, tokenizer=tokenizer, mixed_precision="bf16_mixed"), plan


def executed_frames(root: Path) -> Path:
    """A second lesson and its executed copy: the frames of two planned layouts."""
    from ipywidgets.embed import dependency_state

    both = {f"TP={tp}": planned(tp) for tp in (1, 2)}
    choices = {label: ("llama3_8b_pretrain_config", cfg) for label, (cfg, _) in both.items()}
    plans = {label: plan for label, (_, plan) in both.items()}
    panel = controls.frames(choices, plans, gpu=ceiling.gpus()["H100 SXM 80GB"])
    lesson = clean()
    lesson["cells"].insert(3, code("frames", "panel"))
    write(root / "notebooks" / "08_frames.ipynb", lesson)
    view = {"model_id": panel.model_id, "version_major": 2, "version_minor": 0}
    data = {"application/vnd.jupyter.widget-view+json": view}
    shown = [{"output_type": "display_data", "data": data, "metadata": {}}]
    lesson["cells"][3] |= {"execution_count": 1, "outputs": shown}
    state = {"state": dependency_state(panel), "version_major": 2, "version_minor": 0}
    lesson["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    path = write(root / "book" / "lessons" / "08_frames.ipynb", lesson)
    os.utime(path, (time.time() + 5,) * 2)
    return path


def build(folder: Path) -> Path:
    """Build the book of this project with two small executed lessons, as HTML."""
    root = copy_book(folder)
    executed_lesson(root)
    executed_frames(root)
    return builder.build(root=root, execute=False).parent


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small book's pages."""
    return once.for_all_workers(tmp_path_factory, "book", build)

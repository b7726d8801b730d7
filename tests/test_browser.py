"""The lessons as a learner meets them: JupyterLab in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest
from lab import PROJECT, browser, lab

from course_lib import runs

SHOTS = PROJECT / "book" / "_build" / "screenshots"


@pytest.fixture(scope="module", autouse=True)
def chromium():
    """A browser, installed if need be; what that takes is not part of a test."""
    return browser()


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """JupyterLab on copies of the lessons, so that a save does not touch the sources."""
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "book").symlink_to(PROJECT / "book")
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])))
    with lab(tmp_path, tmp_path / "runs") as page:
        yield page


def saved(desk, name: str) -> list[dict]:
    """The code cells of a notebook after JupyterLab saved it."""
    desk.save()
    content = json.loads((desk.root / "notebooks" / name).read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def errors(cells: list[dict]) -> list[str]:
    """Names of the errors that cells ended with."""
    return [output["ename"] for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def test_lesson_00_runs_in_the_browser(desk):
    """Run All goes through lesson 00 without an error, shows its figure, and asks no other machine for anything."""
    desk.open("notebooks/00_check_your_setup.ipynb")
    desk.shot(SHOTS / "00_open.png")
    desk.run_all()
    desk.wait(seconds=300)
    cells = saved(desk, "00_check_your_setup.ipynb")
    assert all(cell["execution_count"] for cell in cells) and not errors(cells)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    desk.shot(SHOTS / "00_done.png")
    assert desk.elsewhere == []


def test_an_interrupted_training_cell_leaves_no_rank(desk):
    """The stop button ends all ranks of lesson 03's run, and the same cell works when it is run again."""
    short = desk.root / "notebooks" / "03_smoke_test_with_mock_data.ipynb"
    content = json.loads(short.read_text())
    names = [cell["id"] for cell in content["cells"]]
    content["cells"] = content["cells"][: names.index("run") + 1]
    for cell in content["cells"]:
        if cell["id"] == "parameters":
            cell["source"] = "".join(cell["source"]).replace("steps = 12 ", "steps = 2000 ", 1)
    short.write_text(json.dumps(content))

    desk.open("notebooks/03_smoke_test_with_mock_data.ipynb")
    desk.run_all()
    pids = wait_for_training(desk.root / "runs" / "smoke")
    desk.page.locator(".jp-Notebook-cell.jp-mod-active, .jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
    desk.shot(SHOTS / "03_training.png")
    desk.menu("Kernel", "Interrupt Kernel")
    desk.wait(seconds=60)
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert runs.Run(desk.root / "runs" / "smoke").outcome.status == "interrupted"
    assert errors(saved(desk, short.name)) == ["RunInterrupted"]

    desk.menu("Run", "Run Selected Cell and Do not Advance")
    wait_for_training(desk.root / "runs" / "smoke-2")
    desk.menu("Kernel", "Interrupt Kernel")
    desk.wait(seconds=60)
    assert len(runs.Run(desk.root / "runs" / "smoke-2").metrics) > 0


def wait_for_training(path: Path, *, seconds: float = 240.0) -> list[int]:
    """Wait until a run has three steps, and return its ranks' process ids."""
    end = time.monotonic() + seconds
    while not (path / "config.yaml").exists() or len(runs.Run(path).metrics) < 3:
        assert time.monotonic() < end, f"no training in {path}"
        time.sleep(0.2)
    return [entry["pid"] for entry in runs.Run(path).ranks().values()]


def test_the_planner_answers_in_the_browser(desk):
    """In lesson 06 another tensor parallel size draws another picture, without running a cell."""
    path = desk.root / "notebooks" / "06_plan_an_8_gpu_run.ipynb"
    content = json.loads(path.read_text())
    content["cells"] = [
        cell
        for cell in content["cells"]
        if cell["id"] in ("imports", "parameters", "recipes") or "planner.controls(" in "".join(cell["source"])
    ]
    path.write_text(json.dumps(content))

    desk.open("notebooks/06_plan_an_8_gpu_run.ipynb")
    desk.run_all()
    desk.wait(seconds=300)
    assert not errors(saved(desk, path.name))
    picture = desk.page.locator("img.widget-image, .jupyter-widgets img").last
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")
    desk.page.locator(".widget-dropdown", has_text="TP").first.locator("select").select_option("4")
    end = time.monotonic() + 60
    while picture.get_attribute("src") == before:
        assert time.monotonic() < end, "the picture stayed the same"
        time.sleep(0.2)
    desk.shot(SHOTS / "06_planner.png")

"""The lessons as a learner meets them: JupyterLab in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from course_lib import runs
from course_lib.common.project import PROJECT
from course_lib.machine import desk as course_desk
from support.lab import browser, lab

SHOTS = PROJECT / "book" / "_build" / "screenshots"


@pytest.fixture(scope="module", autouse=True)
def chromium():
    """A browser, installed if need be; what that takes is not part of a test."""
    return browser()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """One JupyterLab on copies of the lessons, so that a save does not touch the sources."""
    root = tmp_path_factory.mktemp("desk")
    shutil.copytree(PROJECT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "book").symlink_to(PROJECT / "book")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])))
        with lab(root, root / "runs") as page:
            yield page


@pytest.fixture
def desk(jupyter):
    """JupyterLab for one lesson, whose kernel ends with the test."""
    jupyter.elsewhere.clear()
    yield jupyter
    jupyter.shut_down()


def changed(desk, name: str, change: Callable[[list[dict]], None]) -> None:
    """Change the cells of the copy of a lesson before JupyterLab opens it."""
    path = desk.root / "notebooks" / name
    content = json.loads(path.read_text())
    change(content["cells"])
    path.write_text(json.dumps(content))


def saved(desk, name: str) -> list[dict]:
    """The code cells of a notebook after JupyterLab saved it."""
    desk.save()
    content = json.loads((desk.root / "notebooks" / name).read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


PICTURE = ".jp-OutputArea img"
FOLDED = ".jp-Cell-inputWrapper .jp-Placeholder"


def outputs(cells: list[dict]) -> list[dict]:
    """The data of every output."""
    return [output.get("data", {}) for cell in cells for output in cell["outputs"]]


def without_words(cells: list[dict]) -> list[str]:
    """Cells that show a picture without alternative text."""
    return [
        cell["id"]
        for cell in cells
        for output in cell["outputs"]
        if "image/png" in output.get("data", {}) and not output["metadata"].get("image/png", {}).get("alt")
    ]


def look(desk, name: str) -> None:
    """Take a picture of the last figure in both themes; nothing was asked of any other machine."""
    desk.show(PICTURE)
    desk.shot(SHOTS / f"{name[:2]}_light.png")
    desk.theme("Dark")
    desk.show(PICTURE)
    desk.shot(SHOTS / f"{name[:2]}_dark.png")
    desk.theme("Light")
    assert desk.elsewhere == []


def errors(cells: list[dict]) -> list[str]:
    """Names of the errors that cells ended with."""
    return [output["ename"] for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def test_lesson_00_runs_in_the_browser(desk):
    """It opens with its table of contents, Run All ends without an error, figures have words, nothing goes elsewhere."""
    name = "00_check_your_setup.ipynb"

    def quick(cells: list[dict]) -> None:
        """Without the doctor's three imports, half of this lesson: `test_all_run` runs it with them."""
        report = next(cell for cell in cells if cell["id"] == "doctor-report")
        report["source"] = "".join(report["source"]).replace("doctor.report()", "doctor.report(imports=False)")

    changed(desk, name, quick)
    course_desk.prepare_workspace(desk.root / "workspaces", f"notebooks/{name}")
    desk.open(f"notebooks/{name}", reset=False)
    desk.page.wait_for_selector(".jp-TableOfContents-content >> text=What the doctor sees")
    desk.shot(SHOTS / "00_open.png")
    desk.run_all()
    desk.wait(seconds=300)
    cells = saved(desk, name)
    assert all(cell["execution_count"] for cell in cells) and not errors(cells)
    assert without_words(cells) == [] and any("image/png" in data for data in outputs(cells))
    desk.show(FOLDED)  # the solution stands below its attempt, and nobody reads it by accident
    assert desk.page.get_by_text("checks.attempt(").count() and not desk.page.get_by_text("checks.solution(").count()
    desk.shot(SHOTS / "00_folded.png")
    look(desk, name)


def test_lesson_03_goes_on_after_an_interrupt(desk):
    """The stop button ends all ranks; the next cell works, and so does lesson 03 on mock data in the same kernel."""
    name = "03_smoke_test_with_mock_data.ipynb"
    source = "cfg_long = copy.deepcopy(cfg)\ncfg_long.train.train_iters = 2000\n"
    source += 'launch.run(cfg_long, ranks=8, name="long")'

    def longer_and_shorter(cells: list[dict]) -> None:
        """A run to be stopped before the lesson's own on mock data; what launches or trains after it shows nothing else of a
        browser: `test_all_run` runs it."""
        left_out = ("by-hand", "check-by-hand", "solution-do", "prepare-text", "text-config", "run-real-text")
        left_out += ("check-real-text", "generate")
        assert set(left_out) <= {cell["id"] for cell in cells}
        cells[:] = [cell for cell in cells if cell["id"] not in left_out]
        place = [cell["id"] for cell in cells].index("run")
        cells.insert(place, {**cells[place], "id": "long", "source": source})

    changed(desk, name, longer_and_shorter)
    place = [cell["id"] for cell in json.loads((desk.root / "notebooks" / name).read_text())["cells"]].index("long")

    desk.open(f"notebooks/{name}")
    desk.run_all()
    pids = wait_for_training(desk.root / "runs" / "long")
    desk.page.locator(PICTURE).last.scroll_into_view_if_needed()
    desk.shot(SHOTS / "03_training.png")
    desk.menu("Kernel", "Interrupt Kernel")
    desk.wait(seconds=180)
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert runs.Run(desk.root / "runs" / "long").outcome.status == "interrupted"
    assert errors(saved(desk, name)) == ["RunInterrupted"]

    desk.select(place + 1)
    desk.menu("Run", "Run Selected Cell and All Below")
    wait_for_training(desk.root / "runs" / "smoke")
    desk.wait(seconds=600)
    cells = saved(desk, name)
    assert errors(cells) == ["RunInterrupted"] and all(cell["execution_count"] for cell in cells)
    assert without_words(cells) == []
    desk.open(f"notebooks/{name}")  # what was saved shows its pictures when it is opened again
    look(desk, name)


def wait_for_training(path: Path, *, seconds: float = 240.0) -> list[int]:
    """Wait until a run has three steps, and return its ranks' process ids."""
    end = time.monotonic() + seconds
    while not (path / "config.yaml").exists() or len(runs.Run(path).metrics) < 3:
        assert time.monotonic() < end, f"no training in {path}"
        time.sleep(0.2)
    return [entry["pid"] for entry in runs.Run(path).ranks().values()]


def test_the_planner_of_lesson_06_answers(desk):
    """Its cells end without an error, and another tensor parallel size draws another picture without running a cell."""
    name = "06_plan_an_8_gpu_run.ipynb"

    def planner_alone(cells: list[dict]) -> None:
        """What the planner's cell needs, and itself: `test_all_run` runs the whole lesson."""
        needed = ("imports", "parameters", "recipes", "plans", "figure", "planner")
        cells[:] = [cell for cell in cells if cell["id"] in needed]

    changed(desk, name, planner_alone)
    desk.open(f"notebooks/{name}")
    desk.run_all()
    desk.wait(seconds=400)
    cells = saved(desk, name)
    assert len(cells) == 6 and not errors(cells) and all(cell["execution_count"] for cell in cells)
    assert without_words(cells) == []
    panel = desk.page.locator(".jp-OutputArea", has=desk.page.locator(".widget-dropdown"))
    picture = panel.locator("img.widget-image, .jupyter-widgets img").first
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")
    desk.page.locator(".widget-dropdown", has_text="TP").first.locator("select").select_option("4")
    end = time.monotonic() + 60
    while picture.get_attribute("src") == before:
        assert time.monotonic() < end, "the picture stayed the same"
        time.sleep(0.2)
    look(desk, name)

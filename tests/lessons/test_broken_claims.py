"""Every lesson can fail: a claim that nothing could break would prove nothing."""

from __future__ import annotations

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from course_lib.common.project import PROJECT, environment_kept
from course_lib.lesson import notebooks

BROKEN = {
    "00": ({"seconds_limit": 0.0}, "a warm start takes less than 0 s"),
    "01": ({"engine": "NeMo Run"}, "NeMo Run is an engine"),
    "02": ({"layers_published": 32}, "which source did you believe"),
    "03": ({"learning_rate": 0.0}, "Is the learning rate zero?"),
    "04": ({"blend_weights": [0.3, 0.7]}, "Are the weights in the order of the prefixes"),
    "05": ({"special_ids": 999}, "Off by one?"),
    "08": ({"published_seq_length": 4096}, "Attention grows with it"),
    "09": ({"changed_learning_rate": 4e-3}, "Nothing differs, or too much"),
    "11": ({"tolerance": 0.0}, "the same features must be cut out of both"),
    "12": ({"tolerance": 0.0}, "Is the gradient averaged"),
    "06": ({"moment_bytes": 4}, "Is moment_bytes 8?"),
    "07": ({"second_node": 1}, "a second node changes two lines"),
    "13": ({"adapter_dim": 32}, "which is 25% of the width"),
    "14": ({"separator": "\n\n"}, "Is the template applied twice?"),
    "15": ({"difference": 0.05}, "Too few items"),
    "10": ({"resumed_steps": 15, "steps": 12}, "a longer run is another run"),
    "17": ({"tolerance": 0.0}, "the heads and layers that the checkpoint gives it"),
    "18": ({"threshold": 0.95}, "is a threshold too loose"),
    "20": ({"dpo_rate": 0.0}, "Is the learning rate of DPO zero?"),
    "19": ({"tolerance": 0.0}, "transformers computes Bridge's logits from the folder"),
    "16": ({"published_active": 3.2}, "Did you count both embeddings"),
    "a": ({"weights": [0.5, 0.5]}, "Is another version installed"),
}
"""For each lesson one parameter that breaks a claim, and the words of the check that must notice."""

NOT_NEEDED = {
    "00": ("doctor-report", "check-table", "stand-ins"),
    "04": ("check-split", "large", "microscope", "cut-off", "check-loss-free", "check-cuts"),
    "07": ("run", "nemo-run", "check-launchers", "plain-file", "check-plain-file")
    + ("silence", "check-silence", "first", "check-first"),
}
"""Cells of other claims than the broken one that take their time; `test_all_run` executes them."""


@pytest.fixture(scope="module")
def used_kernel(tmp_path_factory):
    """One kernel for all broken claims, and the folder of their copies; test_all_run.py gives each lesson a new one."""
    folder = tmp_path_factory.mktemp("broken")
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
    environment = {"COURSE_LEDGER": str(folder / "ledger.json"), **notebooks.kernel_environment()}
    with environment_kept(environment), client.setup_kernel(cwd=PROJECT / "notebooks"):
        yield client.km, folder


def needed(number: str, folder: Path) -> Path:
    """A folder with the lesson as far as its broken claim needs it."""
    lesson = nbformat.read(notebooks.find(number), as_version=4)
    left_out = NOT_NEEDED.get(number, ())
    assert set(left_out) <= {cell["id"] for cell in lesson.cells}
    lesson.cells = [cell for cell in lesson.cells if cell["id"] not in left_out]
    folder.mkdir(exist_ok=True)
    nbformat.write(lesson, folder / notebooks.find(number).name)
    return folder


@pytest.mark.parametrize("number", [lesson.number for lesson in notebooks.listing()])
def test_a_broken_claim_is_caught(number, used_kernel):
    """With one parameter wrong, the lesson stops at its own check, with a message that teaches."""
    kernel, folder = used_kernel
    parameters, words = BROKEN[number]
    guesses = dict.fromkeys(notebooks.guesses(number), 1.5)
    with pytest.raises(notebooks.LessonFailed, match="does not hold"):
        notebooks.execute(
            number,
            parameters=parameters | guesses,
            output_directory=folder,
            directory=needed(number, folder / "lessons"),
            kernel=kernel,
        )
    (failed,) = folder.glob(f"{number}_*.failed.ipynb")
    raised = [
        output["evalue"]
        for cell in json.loads(failed.read_text())["cells"]
        for output in cell.get("outputs", ())
        if output["output_type"] == "error"
    ]
    assert len(raised) == 1 and words in raised[0]
    ledger = folder / "ledger.json"  # a claim may break before anything is predicted
    entered = json.loads(ledger.read_text())["entries"] if ledger.exists() else []
    assert {entry["guess"] for entry in entered} <= {None, 1.5}, "guesses of a learner reach the ledger as they are"

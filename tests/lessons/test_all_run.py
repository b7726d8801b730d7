"""Every lesson runs from top to bottom; what was executed here is what the book shows.  And every lesson can fail."""

from __future__ import annotations

import json
import re

import pytest

from course_lib import runs
from course_lib.experiments import stages
from course_lib.lesson import notebooks
from support import executed_lessons

PROJECT_LESSONS = [lesson.number for lesson in notebooks.listing()]

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
    "07": ({"torchrun_learning_rate": 5e-4}, "The launcher changed what was trained"),
    "13": ({"adapter_dim": 32}, "which is 25% of the width"),
    "14": ({"separator": "\n\n"}, "Is the template applied twice?"),
    "15": ({"difference": 0.05}, "Too few items"),
    "10": ({"resumed_steps": 30}, "a longer run is another run"),
    "17": ({"tolerance": 0.0}, "the heads and layers that the checkpoint gives it"),
    "18": ({"threshold": 0.95}, "is a threshold too loose"),
    "20": ({"dpo_rate": 0.0}, "Is the learning rate of DPO zero?"),
    "19": ({"weight_decay": 0.1}, "which wins over cfg.optimizer's"),
    "16": ({"published_active": 3.2}, "Did you count both embeddings"),
    "a": ({"weights": [0.5, 0.5]}, "Is another version installed"),
}
"""For each lesson one parameter that breaks a claim, and the words of the check that must notice."""


def test_no_cell_reads_a_path_that_depends_on_where_it_runs():
    """A lesson that was copied elsewhere, or runs in an editor with another working directory, finds its files."""
    for lesson in notebooks.listing():
        for cell in json.loads(lesson.path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            assert not re.search(r"""["']\.\.?/""", source), (lesson.number, cell["id"])


def test_the_base_of_lessons_13_to_15_is_trained_once():
    """Before them, and no lesson's own seconds: whoever asks for it with the same seed finds this run."""
    base = stages.base(seed=1)
    assert stages.base(seed=1).path == base.path
    assert base.outcome.status == "succeeded" and base.metrics.loss.iloc[-1] < base.metrics.loss.iloc[0] - 1


@pytest.mark.parametrize("number", PROJECT_LESSONS)
def test_the_lesson_runs(number):
    """papermill executes the lesson on the real stack; its runs succeeded, and the copy stands in book/lessons."""
    with executed_lessons.alone(notebooks.find(number)):
        done = notebooks.execute(number)
    assert done.path.exists() and done.path.parent.name == "lessons"
    assert done.runs or number in ("00", "01", "02", "a"), "every lesson that trains names its run"
    assert all(runs.Run(path).outcome.status == "succeeded" for path in done.runs)
    assert done.figures or "<svg" in done.path.read_text(), "every lesson shows at least one figure"


@pytest.mark.parametrize("number", PROJECT_LESSONS)
def test_a_broken_claim_is_caught(number, tmp_path):
    """With one parameter wrong, the lesson stops at its own check, with a message that teaches."""
    parameters, words = BROKEN[number]
    guesses = dict.fromkeys(notebooks.guesses(number), 1.5)
    with pytest.raises(notebooks.LessonFailed, match="does not hold"):
        notebooks.execute(number, parameters=parameters | guesses, output_directory=tmp_path)
    (failed,) = tmp_path.glob("*.failed.ipynb")
    raised = [
        output["evalue"]
        for cell in json.loads(failed.read_text())["cells"]
        for output in cell.get("outputs", ())
        if output["output_type"] == "error"
    ]
    assert len(raised) == 1 and words in raised[0]
    ledger = tmp_path / ".ledger.json"  # the claim may break before anything is predicted
    entered = json.loads(ledger.read_text())["entries"] if ledger.exists() else []
    assert {entry["guess"] for entry in entered} <= {None, 1.5}, "guesses of a learner reach the ledger as they are"

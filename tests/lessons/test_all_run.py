"""Every lesson runs from top to bottom; what was executed here is what the book shows."""

from __future__ import annotations

import json
import re

import pytest

from course_lib import runs
from course_lib.experiments import stages
from course_lib.lesson import notebooks
from support import executed_lessons

PROJECT_LESSONS = [lesson.number for lesson in notebooks.listing()]


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

"""Every lesson runs from top to bottom; what was executed here is what the book shows.  And every lesson can fail."""

from __future__ import annotations

import pytest

from course_lib import lessons, runs

PROJECT_LESSONS = [lesson.number for lesson in lessons.listing()]

BROKEN = {
    "00": ({"seconds_limit": 0.0}, "a warm start takes less than 0 s"),
    "03": ({"learning_rate": 0.0}, "Is the learning rate zero?"),
    "07": ({"torchrun_learning_rate": 5e-4}, "The launcher changed what was trained"),
    "10": ({"resumed_steps": 30}, "a longer run is another run"),
}
"""For each lesson one parameter that breaks a claim, and the words of the check that must notice."""


@pytest.mark.parametrize("number", PROJECT_LESSONS)
def test_the_lesson_runs(number):
    """papermill executes the lesson on the real stack; its runs succeeded, and the copy stands in book/lessons."""
    done = lessons.execute(number)
    assert done.path.exists() and done.path.parent.name == "lessons"
    assert all(runs.Run(path).outcome.status == "succeeded" for path in done.runs)
    assert done.figures, "every lesson shows at least one figure"


@pytest.mark.parametrize("number", PROJECT_LESSONS)
def test_a_broken_claim_is_caught(number, tmp_path):
    """With one parameter wrong, the lesson stops at its own check, with a message that teaches."""
    parameters, words = BROKEN[number]
    with pytest.raises(lessons.LessonFailed, match="does not hold") as caught:
        lessons.execute(number, parameters=parameters, output_directory=tmp_path)
    text = str(caught.value) + "".join(path.read_text() for path in tmp_path.glob("*.ipynb"))
    assert words in text

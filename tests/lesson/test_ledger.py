"""The ledger as a learner meets it: exercises, the command, the page; predictions are in test_checks."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from course_lib.common.project import PROJECT
from course_lib.figures import plots
from course_lib.lesson import checks, ledger, notebooks, verdicts
from support import hygiene, hygiene_learner


@pytest.fixture(autouse=True)
def own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own ledger."""
    path = tmp_path / "ledger.json"
    monkeypatch.setenv("COURSE_LEDGER", os.fspath(path))
    return path


@pytest.fixture
def in_lesson_03(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell `attempt` of lesson 03 runs, in JupyterLab."""
    monkeypatch.setattr(ledger, "_running_cell", lambda: ("03", "attempt"))


def is_four(answer: object) -> verdicts.Verdict:
    """An exercise."""
    return verdicts.value(answer, 4, why="8 / 2.", otherwise="World size / TP.")


def test_attempts_are_counted_and_right_stays_right(in_lesson_03: None) -> None:
    """None is no attempt, a wrong answer is one, and a rerun of the stub does not take a solved exercise back."""
    for answer in (None, 3, 4, None, 3):
        checks.attempt(answer, is_four)
    assert ledger.exercises().to_dict("records") == [
        {"lesson": "03", "exercise": "attempt", "attempts": 3, "state": "right"}
    ]


def test_an_unsolved_exercise_is_not_yet_right(in_lesson_03: None) -> None:
    """Wrong answers alone leave it open."""
    checks.attempt(3, is_four)
    assert list(ledger.exercises().state) == ["not yet"]


def test_without_a_notebook_nothing_is_entered(own_ledger: Path) -> None:
    """A script or a headless run is no learner's attempt."""
    checks.attempt(4, is_four)
    assert not own_ledger.exists()


def test_a_broken_ledger_does_not_fail_an_attempt(in_lesson_03, own_ledger, capsys) -> None:
    """The answer is judged all the same, and a line says what to do about the file."""
    own_ledger.write_text("[]")
    checks.attempt(4, is_four)
    out = capsys.readouterr().out
    assert "right: " in out and "Move the file away" in out and own_ledger.read_text() == "[]"


@pytest.mark.parametrize(
    ("path", "expected"), [("notebooks/03_smoke.ipynb", "03"), ("a_museum.ipynb", "a"), ("Untitled.ipynb", "")]
)
def test_the_running_cell_is_what_jupyterlab_says(monkeypatch, path, expected) -> None:
    """The lesson's number comes from the session's path, the exercise's name from the cell's id."""
    import IPython

    shell = type("Shell", (), {"kernel": object(), "parent_header": {"metadata": {"cellId": "attempt"}}})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setenv("JPY_SESSION_NAME", path)
    assert ledger._running_cell() == (expected, "attempt")


def _try_many(worker: int) -> None:
    for number in range(5):
        ledger.attempted(True, lesson=f"{worker:02d}", name=f"e{number}")


def test_attempts_of_two_notebooks_at_once_all_arrive() -> None:
    """The same lock guards exercises."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_try_many, range(2))
    assert len(ledger.exercises()) == 10


def test_a_ledger_of_the_first_format_is_read_and_kept(own_ledger: Path) -> None:
    """A file from before exercises were kept loses nothing."""
    checks.predict("03", "loss", 6.0, "nats/token")
    old = {"format": 1, "entries": json.loads(own_ledger.read_text())["entries"]}
    own_ledger.write_text(json.dumps(old))
    ledger.attempted(True, lesson="03", name="attempt")
    assert len(ledger.table()) == 1 and len(ledger.exercises()) == 1


def test_reset_forgets_exercises_too(capsys) -> None:
    """Of one lesson, or all."""
    for lesson in ("03", "04"):
        ledger.attempted(True, lesson=lesson, name="attempt")
    ledger.reset(lesson="03")
    assert list(ledger.exercises().lesson) == ["04"]
    assert "1 exercise" in capsys.readouterr().out


def test_a_ledger_of_the_second_format_has_no_guesses(own_ledger: Path) -> None:
    """What stood in it may have been a formula of the page, so it is the course's number and never a guess."""
    old = {"lesson": "03", "name": "loss", "unit": "nats/token", "predicted": 6.0, "measured": 6.9}
    old |= {"predicted_at": 1.0, "measured_at": 2.0}
    own_ledger.write_text(json.dumps({"format": 2, "entries": [old], "exercises": []}))
    assert (ledger.table()["your guess"][0], ledger.table()["course"][0]) == ("", "6")
    assert len(ledger.scores()) == 0
    checks.predict("03", "loss", 6.9, "nats/token", guess=3)
    written = json.loads(own_ledger.read_text())
    assert written["format"] == 3 and [entry["guess"] for entry in written["entries"]] == [None, 3.0]


def fill() -> None:
    """Guesses: exact, ten times too low, a million times too high, one without a scale; and a prediction that is no guess."""
    for name, guess, measured in (("a", 4, 4), ("b", 1, 10), ("c", 1e6, 1), ("zero", 1, 0), ("formula", None, 7)):
        checks.predict("03", name, 7 if guess is None else None, "tokens", guess=guess)
        checks.measured(name, measured)


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((8, 4, 2, 1), "falls: a factor of 6"),
        ((1, 2, 4, 8), "does not fall: a factor of 1.5"),
        ((2, 2, 2), "so far there are 3"),
    ],
)
def test_the_page_says_whether_the_error_of_guesses_falls(factors: tuple[float, ...], words: str) -> None:
    """The second half of the lessons is held against the first; too high and too low count alike, formulas not at all."""
    for number, factor in enumerate(factors):
        for name, guess in (("high", factor), ("low", 1 / factor)):
            checks.predict(f"{number:02d}", name, 1000, "tokens", guess=guess)
            checks.measured(name, 1, lesson=f"{number:02d}")
    assert list(ledger.by_lesson().factor) == list(factors) and set(ledger.by_lesson().guesses) == {2}
    assert words in ledger.course_of_errors(ledger.by_lesson())


def test_the_page_compares_guesses_on_one_scale() -> None:
    """Every positive pair is drawn, an extreme one at the edge, and the words name the worst."""
    fill()
    scores = ledger.scores()
    assert list(scores.ratio) == [1, 0.1, 1e6]
    with plots.style():
        ax = ledger.draw(scores, ax=Figure().subplots(), title="1 of 3")
    assert list(ax.lines[-1].get_xdata()) == [1, 0.1, 100]
    assert "03  c" in ax.get_label() and "1e+06" in ax.get_label()


def command(*arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    """`course ledger` in a process."""
    words = [sys.executable, "-m", "course_lib", "ledger", *arguments]
    return subprocess.run(words, input=answer, capture_output=True, text=True, check=False)


def test_the_command_shows_and_forgets(own_ledger: Path) -> None:
    """It prints the table and the file; it forgets only after a yes; a broken file is named, not overwritten."""
    fill()
    shown = command("--reset", answer="n\n")
    assert "too low" in shown.stdout and str(own_ledger) in shown.stdout
    assert len(ledger.table()) == 5
    command("--reset", "--yes")
    assert len(ledger.table()) == 0
    own_ledger.write_text("{")
    broken = command()
    assert broken.returncode == 1 and "Move the file away" in broken.stderr and "Traceback" not in broken.stderr


def test_the_button_asks_before_it_forgets() -> None:
    """The first click only changes what the button says."""
    fill()
    button, said = ledger.forget_button().children
    button.click()
    assert len(ledger.table()) == 5 and "sure" in button.description
    button.click()
    assert len(ledger.table()) == 0 and "empty" in said.value


def test_the_ledgers_notebook_runs_and_keeps_the_habits(tmp_path: Path) -> None:
    """It is no lesson, so the rules about lessons do not hold; those about files and prose do, and its figure is there."""
    import papermill

    source = PROJECT / "notebooks" / "your_ledger.ipynb"
    content = json.loads(source.read_text(encoding="utf-8"))
    of_lessons = {hygiene.tags_are_known, hygiene.takeaways_mirror_objectives, hygiene_learner.guesses_come_first}
    of_lessons |= {hygiene_learner.exercises_are_a_ladder, hygiene_learner.a_quiz_has_three_questions}
    of_lessons |= {hygiene.minutes_are_computed}
    assert [found for rule in hygiene.RULES if rule not in of_lessons for found in rule(content)] == []
    assert source.stem not in {lesson.path.stem for lesson in notebooks.listing()}
    fill()
    done = papermill.execute_notebook(
        source, tmp_path / "done.ipynb", kernel_name="python3", progress_bar=False, cwd=source.parent
    )
    figures = [
        output["metadata"]["image/png"]["alt"]
        for cell in done.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert figures and "2 of 3" not in figures[0] and "1 of 3 guesses" in figures[0]

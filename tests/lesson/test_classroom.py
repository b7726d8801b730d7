"""A class's ledgers: one table, one picture, and a refusal that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from course_lib.__main__ import app
from course_lib.lesson import checks, classroom, ledger


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ledgers of two learners, written as a lesson writes them."""
    for learner, guess, right in (("ada", 2.0, True), ("7", 8.0, False)):
        monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / f"{learner}.json"))
        checks.predict("03", "first loss", 4.0, "nats", guess=guess)
        checks.measured("first loss", 4.0, lesson="03")
        ledger.attempted(right, lesson="a", name="foreign-id")
    (tmp_path / "ada.json.lock").touch()
    return tmp_path


def test_everybody_stands_in_one_table(folder: Path) -> None:
    """A row a guess and a row an exercise of each learner, with what their own ledgers say."""
    together = classroom.collect([folder])
    assert list(together.columns) == classroom.COLUMNS and len(together) == 4
    guesses = together[together.kind == "guess"].set_index("learner")
    assert guesses["guess / measured"].to_dict() == {"7": 2.0, "ada": 0.5} and set(guesses["course / measured"]) == {
        1.0
    }
    tried = together[together.kind == "exercise"].set_index("learner")
    assert tried.right.to_dict() == {"7": False, "ada": True} and set(tried.attempts) == {1}


def test_the_picture_says_what_it_draws(folder: Path) -> None:
    """Twice too much and half as much are off by the same factor; half of those who tried were right."""
    axes = Figure().subplots(1, 2)
    classroom.draw(classroom.collect([folder]), axes=axes)
    assert axes[0].get_label() == "lesson 03: guesses are off by a factor of 2"
    assert axes[1].get_label() == "lesson A: 50% of the tried exercises are right"


def test_the_command_writes_both_files(folder: Path) -> None:
    """A table that pandas reads back, and a picture."""
    to = folder / "out" / "class.csv"
    to.parent.mkdir()
    done = CliRunner().invoke(app, ["class", str(folder), "--to", str(to)])
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(to)) == 4
    assert to.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_lettered_lesson_is_named_either_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says lesson A, and its notebook begins with a small letter."""
    monkeypatch.setenv("COURSE_LEDGER", str(folder / "ada.json"))
    shown = [CliRunner().invoke(app, ["ledger", "--lesson", name]).output for name in ("A", "a")]
    assert shown[0] == shown[1] and "foreign-id" in shown[0] and "first loss" not in shown[0]


def test_a_learner_without_an_entry_is_no_trouble(tmp_path: Path) -> None:
    """An empty ledger gives no row, and the picture of nothing is still a picture."""
    (tmp_path / "new.json").write_text(json.dumps({"format": 3, "entries": [], "exercises": []}))
    table, picture = classroom.write([tmp_path], tmp_path / "class.csv")
    assert len(pd.read_csv(table)) == 0 and picture.stat().st_size > 0


def test_what_cannot_be_collected_is_named(folder: Path) -> None:
    """No file, a file that is no ledger, and two of one name; nothing is written."""
    with pytest.raises(classroom.ClassError, match="nobody"):
        classroom.collect([folder / "nobody.json"])
    (folder / "empty").mkdir()
    with pytest.raises(classroom.ClassError, match="empty"):
        classroom.collect([folder / "empty"])
    with pytest.raises(classroom.ClassError, match="ada"):
        classroom.collect([folder, folder / "ada.json"])
    (folder / "broken.json").write_text("{")
    to = folder / "class.csv"
    done = CliRunner().invoke(app, ["class", str(folder), "--to", str(to)])
    assert done.exit_code == 1 and "broken.json" in done.output and not to.exists()

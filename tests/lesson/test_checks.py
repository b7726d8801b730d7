"""Claims, exercises, expected errors and the ledger, as a learner meets them."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.lesson import checks


@pytest.fixture(autouse=True)
def own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own ledger; nobody's predictions are touched."""
    path = tmp_path / "state" / "ledger.json"
    monkeypatch.setenv("COURSE_LEDGER", os.fspath(path))
    return path


def test_a_claim_holds_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A claim that holds says so; one that fails raises with its explanation."""
    checks.claim(True, "8 ranks ran")
    assert capsys.readouterr().out == "holds: 8 ranks ran\n"
    with pytest.raises(checks.ClaimFailed, match=r"does not hold: 8 ranks ran\nLook at runs/smoke"):
        checks.claim([], "8 ranks ran", otherwise="Look at runs/smoke.")


def test_close_states_values_tolerance_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    """A comparison shows both numbers, the tolerance and the unit, whether it holds or not."""
    checks.close(6.95, 6.93, atol=0.05, what="loss", unit="nats/token")
    assert capsys.readouterr().out == "holds: loss is 6.95 nats/token, expected 6.93 within 0.05 nats/token\n"
    with pytest.raises(checks.ClaimFailed, match="they differ by 0.2 nats/token"):
        checks.close(7.13, 6.93, atol=0.05, what="loss", unit="nats/token")
    checks.close(102, 100, rtol=0.02, what="tokens", unit="tokens")


def test_close_refuses_not_a_number() -> None:
    """NaN is close to nothing, not even to NaN."""
    for measured, expected in ((float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(checks.ClaimFailed):
            checks.close(measured, expected, atol=10, what="loss", unit="nats/token")


def test_close_needs_a_tolerance() -> None:
    """A comparison of floats without a tolerance is a mistake in the lesson and says how to mend it."""
    with pytest.raises(ValueError, match="pass atol"):
        checks.close(1.0, 1.0, what="loss", unit="nats/token")


def test_an_expected_error_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The message is printed; no error, another message or another error do not pass."""
    with checks.expect_error(ValueError, contains="heads"):
        raise ValueError("TP=3 does not divide 8 heads")
    assert capsys.readouterr().out == "expected ValueError: TP=3 does not divide 8 heads\n"
    with pytest.raises(checks.ClaimFailed, match="raised no error"), checks.expect_error(ValueError):
        pass
    with pytest.raises(checks.ClaimFailed, match="layers"), checks.expect_error(ValueError, contains="layers"):
        raise ValueError("heads")
    with pytest.raises(KeyError), checks.expect_error(ValueError):
        raise KeyError("other")


def test_guess_prediction_and_measurement_meet(capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger sets the learner's guess and the course's number beside the measurement, and keeps them apart."""
    checks.predict("03", "loss at step 1", 6.6, "nats/token", guess=3.0)
    assert capsys.readouterr().out == ("loss at step 1: your guess 3 nats/token, the course predicts 6.6 nats/token\n")
    entered = {
        "lesson": "03", "quantity": "loss at step 1", "your guess": "3", "course": "6.6", "measured": "not yet",
        "unit": "nats/token", "your error": "", "course's error": "",
    }  # fmt: skip
    assert checks.ledger().iloc[0].to_dict() == entered
    checks.measured("loss at step 1", 6.0)
    said = "measured: loss at step 1 = 6 nats/token; your guess 3: 50% too low; the course's 6.6: 10% too high\n"
    assert capsys.readouterr().out == said
    errors = {"measured": "6", "your error": "50% too low", "course's error": "10% too high"}
    assert checks.ledger().iloc[0].to_dict() == entered | errors


def test_no_guess_is_no_error_and_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    """A learner who leaves None sees the measurement; a misspelt name is an error that names the known ones."""
    checks.predict("03", "tokens per step", None, "tokens", guess=None)
    checks.measured("tokens per step", 4096)
    out = capsys.readouterr().out
    assert "measured: tokens per step = 4,096 tokens\n" in out and "guess" not in out
    with pytest.raises(ValueError, match="'tokens per step'"):
        checks.measured("token per step", 4096)


@pytest.mark.parametrize("guess", ["5 GiB", [5], float("nan")])
def test_a_guess_that_is_no_number_is_not_entered(guess: object, capsys: pytest.CaptureFixture[str]) -> None:
    """It stops nothing: a line says how a guess is written."""
    checks.predict("06", "states", 5.0, "GiB", guess=guess)
    assert "write a number in GiB" in capsys.readouterr().out
    assert list(checks.ledger()["your guess"]) == [""] and list(checks.ledger()["course"]) == ["5"]


def test_a_rerun_loses_nothing() -> None:
    """Running a lesson again adds attempts; tested ones stay, and so do those of other lessons."""
    checks.predict("00", "cores", 4, "cores")
    for value in (6.0, 6.5):
        checks.predict("03", "loss", value, "nats/token")
        checks.measured("loss", 6.93)
    assert list(checks.ledger()["course"]) == ["4", "6.5"]
    assert list(checks.ledger(history=True)["course"]) == ["4", "6", "6.5"]
    assert list(checks.ledger(lesson="03")["course"]) == ["6.5"]


def test_the_first_guess_that_was_measured_counts() -> None:
    """Who guesses again knows the answer; a rerun without a guess takes none away."""
    for guess in (None, 3.0, 6.93, None):
        checks.predict("03", "loss", 6.9, "nats/token", guess=guess)
        checks.measured("loss", 6.93)
    assert list(checks.ledger()["your guess"]) == ["3"]
    assert list(checks.ledger(history=True)["your guess"]) == ["", "3", "6.93", ""]


def test_an_untested_prediction_may_be_corrected() -> None:
    """Until it is measured, a new value replaces the old one instead of adding an attempt."""
    checks.predict("03", "loss", 6.9, "nats/token", guess=1.0)
    checks.predict("03", "loss", 6.9, "nats/token", guess=2.0)
    assert list(checks.ledger(history=True)["your guess"]) == ["2"]


def test_reset_forgets_one_lesson_or_all() -> None:
    """The learner can forget what is in the ledger."""
    checks.predict("00", "cores", 4, "cores")
    checks.predict("03", "loss", 6.0, "nats/token")
    checks.reset_ledger(lesson="03")
    assert list(checks.ledger()["lesson"]) == ["00"]
    checks.reset_ledger()
    assert len(checks.ledger()) == 0


def _predict_many(worker: int) -> None:
    for number in range(10):
        checks.predict(f"{worker:02d}", f"q{number}", number, "units")


def test_two_notebooks_at_once_lose_nothing() -> None:
    """Predictions of several processes at the same moment all arrive, and the file is whole at every moment."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_predict_many, range(3))
    assert len(checks.ledger()) == 30


def test_a_broken_ledger_says_what_to_do(own_ledger: Path) -> None:
    """A file that is no ledger is never overwritten; the error names it and the way out."""
    own_ledger.parent.mkdir(parents=True)
    own_ledger.write_text("{not json")
    with pytest.raises(checks.LedgerError, match="COURSE_LEDGER"):
        checks.predict("03", "loss", 1.0, "nats/token")
    assert own_ledger.read_text() == "{not json"


def test_the_ledger_lives_in_the_users_state_directory(tmp_path: Path) -> None:
    """Without COURSE_LEDGER the file is below XDG_STATE_HOME, and its lines are plain JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "COURSE_LEDGER"}
    environment["XDG_STATE_HOME"] = os.fspath(tmp_path)
    code = "from course_lib.lesson import checks; checks.predict('03', 'loss', 1, 'nats/token')"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    stored = json.loads((tmp_path / "nemotron-course" / "ledger.json").read_text())
    assert stored["entries"][0]["name"] == "loss"

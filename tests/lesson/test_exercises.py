"""Each exercise passes its solution, answers None and two typical mistakes with words of their own, and never raises."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.lesson import checks, exercises, verdicts
from support import tried


def judges() -> Iterator[tuple[str, str]]:
    """Module and name of every exercise: the public functions that return a verdict."""
    for module in pkgutil.iter_modules(exercises.__path__):
        there = importlib.import_module(f"{exercises.__name__}.{module.name}")
        for name, function in inspect.getmembers(there, inspect.isfunction):
            own = function.__module__ == there.__name__ and not name.startswith("_")
            if own and function.__annotations__.get("return") == "Verdict":
                yield module.name, name


@pytest.fixture(autouse=True)
def own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's attempts are touched."""
    monkeypatch.setenv("COURSE_LEDGER", os.fspath(tmp_path / "ledger.json"))


@pytest.mark.parametrize(("module", "name"), [pytest.param(*each, id=".".join(each)) for each in judges()])
def test_an_exercise_knows_its_solution_and_its_typical_mistakes(
    module: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stub is not attempted, the solution is right, two mistakes get two hints, and no hint tells the answer."""
    judge = getattr(importlib.import_module(f"{exercises.__name__}.{module}"), name)
    given = getattr(importlib.import_module(f"{tried.__name__}.{module}"), name)(tmp_path)

    checks.attempt(None, judge, *given.facts)
    assert capsys.readouterr().out.startswith("not attempted")
    checks.solution(given.solution, judge, *given.facts)
    checks.attempt(given.solution, judge, *given.facts)
    assert capsys.readouterr().out.count("right: ") == 2

    hints = []
    for answer, words in given.wrong:
        verdict = verdicts.of(answer, judge, *given.facts)
        assert not verdict.right and words in verdict.hint, verdict.hint
        with pytest.raises(checks.ClaimFailed):
            checks.solution(answer, judge, *given.facts)
        hints.append(verdict.hint)
    assert len(set(hints)) >= 2, "two typical mistakes have a hint of their own"

    stranger = verdicts.of(object(), judge, *given.facts)
    assert not stranger.right and stranger.hint


def is_four(answer: object) -> verdicts.Verdict:
    """TP=2 on 8 ranks."""
    return verdicts.value(answer, 4, why="8 / 2.", otherwise="World size / TP.", hints=[(8, "TP takes its share.")])


@pytest.mark.parametrize("answer", [3, 8, "four", object(), [1, 2], float("nan")])
def test_an_attempt_never_fails_the_notebook(answer: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong answers of any kind get a line, and no error; a solution must be right."""
    checks.attempt(answer, is_four)
    assert capsys.readouterr().out.startswith("not yet: ")
    for none_or_wrong in (None, answer):
        with pytest.raises(checks.ClaimFailed):
            checks.solution(none_or_wrong, is_four)


def test_a_value_is_right_within_its_tolerance() -> None:
    """Each wrong value that was foreseen has its hint, the others share one; numbers of numpy and words are values too."""
    import numpy

    assert (
        is_four(numpy.int64(4)).right
        and is_four(8).hint == "TP takes its share."
        and is_four(5).hint != is_four(8).hint
    )
    assert verdicts.value(6.93, 6.931, atol=0.01, why="", otherwise="").right
    assert not verdicts.value(6.9, 6.931, atol=0.01, why="", otherwise="").right
    assert verdicts.value("lr", "lr", why="", otherwise="").right
    assert verdicts.value([1, 2], [1, 2], why="", otherwise="").right


def test_a_run_is_given_as_what_launch_returns_or_by_its_name(runs_directory: Path) -> None:
    """A run that failed, none of that name, and something else are told apart."""
    done = tried.run(runs_directory, "yours")
    tried.run(runs_directory, "broken", status="failed")
    assert [verdicts.own_run(answer) for answer in (done, "yours", done.path)] == [done] * 3
    for answer, words in (("broken", "failed"), ("other", "no run 'other'"), (4, "a run is asked for")):
        with pytest.raises(verdicts.Unfit, match=words):
            verdicts.own_run(answer)

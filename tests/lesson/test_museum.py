"""The exhibits of the failure museum: whole as data, each on its page, and a visit that notices when one no longer fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from course_lib.lesson import checks, ledger, museum, quiz
from support.lesson_cells import cells

ALL = museum.exhibits()


@pytest.mark.parametrize("name", ALL)
def test_an_exhibit_is_whole(name: str) -> None:
    """A layer that the picture draws, a symptom, a question with one right diagnosis and reasons, public sources, a mend."""
    one = ALL[name]
    assert one.layer in museum.LAYERS and one.symptom.strip() and one.mend.strip().endswith(".")
    assert one.question.text.endswith("?") and len(one.question.options) == 3
    assert sum(option.right for option in one.question.options) == 1
    assert all(len(option.reason.split()) >= 4 for option in one.question.options)
    (cause,) = (option.reason for option in one.question.options if option.right)
    assert one.sources and all(source.says in cause for source in one.sources) and cause.endswith(one.mend)
    for source in one.sources:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues/\d+|pull/\d+|blob/v[\w./-]+)", source.at)


def test_the_right_diagnosis_has_no_favourite_place() -> None:
    """Whoever always opens the first option is right in a third of the cases, more or less."""
    places = [[option.right for option in one.question.options].index(True) for one in ALL.values()]
    assert max(map(places.count, range(3))) <= len(ALL) // 2


def test_each_exhibit_stands_on_the_page_with_its_mend() -> None:
    """In the order of the data: a cell that fails, and at the end of its room a folded one that proves each mend."""
    page = cells("a")
    shown = re.findall(r'visit\.case\("([\w-]+)"\)', "\n".join(source for source, _ in page.values()))
    assert shown == list(ALL)
    for layer in museum.LAYERS:
        names = [name for name, exhibit in ALL.items() if exhibit.layer == layer]
        mends, tags = page[f"mends-{layer}"]
        assert {"check", "hide-cell"} <= set(tags)
        _, *parts = re.split(r"^# ([\w-]+)$", mends, flags=re.MULTILINE)
        assert parts[::2] == names and all("checks.claim(" in proof for proof in parts[1::2])
        assert all(f'visit.case("{name}")' in page[name][0] for name in names)
        assert list(page).index(f"mends-{layer}") == list(page).index(names[-1]) + 1


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A ledger of the test's own; returns what is displayed."""
    monkeypatch.setenv("COURSE_LEDGER", str(tmp_path / "ledger.json"))
    shown: list[object] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    return shown


def test_a_visit_shows_the_symptom_and_asks(one: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """An error is printed in one line and goes no further; what was printed alone counts as silent."""
    visit = museum.Visit()
    with visit.case("foreign-id"):
        raise IndexError("index out of\nrange in self")
    with visit.case("tiny-weight") as case:
        case.shows("a share of 0.1")
    with visit.case("no-makefile"):
        raise SystemExit("No targets specified and no makefile found")
    assert capsys.readouterr().out.splitlines()[0] == "IndexError: index out of range in self"
    assert visit.silent == ["tiny-weight"] and len(one) == 3
    assert "reason" not in one[0]["text/html"] and one[0]["text/html"].count("<details>") == 3


def test_an_exhibit_that_fails_no_longer_is_noticed(one: list[object]) -> None:
    """No error where one was, and another one."""
    visit = museum.Visit()
    with pytest.raises(checks.ClaimFailed, match="is mended"), visit.case("foreign-id"):
        pass
    with pytest.raises(checks.ClaimFailed, match="is mended"), visit.case("foreign-id"):
        raise ValueError("something else")
    assert not visit.cases and not one


def test_a_diagnosis_is_an_attempt(one: list[object]) -> None:
    """A click on an option goes into the ledger under the exhibit's name."""
    exhibit = ALL["foreign-id"]
    box = quiz.as_buttons((exhibit.question,), answered=lambda option: museum._answered(exhibit.name, option))
    wrong = next(place for place, option in enumerate(exhibit.question.options) if not option.right)
    box.children[1 + wrong].children[0].click()
    assert ledger.exercises(lesson="a")[["exercise", "attempts"]].values.tolist() == [["foreign-id", 1]]


def test_the_table_of_sources_has_a_row_an_exhibit() -> None:
    """Addresses are written as people write them."""
    table = museum.sources()
    assert list(table.exhibit) == list(ALL) and not table["reported at"].str.contains("https").any()

"""A lesson's quiz: right as data, buttons where a server answers, folded text where none does."""

from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.lesson import quiz

LESSONS = sorted(path.stem for path in quiz.QUIZZES.glob("*.toml"))


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_quiz_has_three_questions_with_reasons(lesson: str) -> None:
    """Three questions of three or four options, exactly one of them right, each with a reason; not always the same letter."""
    questions = quiz.read(lesson)
    assert len(questions) == 3
    for question in questions:
        assert question.text.strip().endswith("?") and 3 <= len(question.options) <= 4
        assert len({option.text for option in question.options}) == len(question.options)
        assert all(option.text.strip() and len(option.reason.split()) >= 4 for option in question.options)
    assert len({[option.right for option in question.options].index(True) for question in questions}) > 1


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quiz of one question."""
    monkeypatch.setattr(quiz, "QUIZZES", tmp_path)
    options = "".join(
        f'[[question.option]]\ntext = "{text}"\nreason = "{text}, because."\n{more}'
        for text, more in (("`a < b`", "right = true\n"), ("c", ""), ("d", ""))
    )
    (tmp_path / "99.toml").write_text(f'[[question]]\ntext = "Which?"\n{options}')
    return tmp_path / "99.toml"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("right = true\n", "", "0 right"), ("[[question]]", "[question", "no quiz"), ("reason", "why", "no quiz")],
)
def test_a_broken_quiz_is_named(one: Path, old: str, new: str, words: str) -> None:
    """Two right answers or none, broken TOML and a missing reason name the file."""
    one.write_text(one.read_text().replace(old, new))
    with pytest.raises(quiz.QuizError, match=words):
        quiz.read("99")
    with pytest.raises(quiz.QuizError, match="98"):
        quiz.read("98")


def test_the_text_unfolds_reasons_without_a_kernel(one: Path) -> None:
    """Options and their reasons stand in details, code is code, and nothing of the text becomes markup."""
    text = quiz.as_text(quiz.read("99"))
    assert text.count("<details>") == 3 and "<b>Right.</b> <code>a &lt; b</code>, because." in text
    assert "open" not in text and "color" not in text and "<script" not in text


def test_a_click_shows_the_reason(one: Path) -> None:
    """A button says whether its option is right, and why."""
    box = quiz.as_buttons(quiz.read("99"))
    _, first, second, _, said = box.children
    second.children[0].click()
    assert "Not this one." in said.value and "c, because." in said.value
    first.children[0].click()
    assert "Right." in said.value and first.children[0].button_style == "success"


@pytest.mark.parametrize("served", [False, True])
def test_widgets_only_where_somebody_can_click(one: Path, monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    """An executed copy holds text alone, so the book shows it; in JupyterLab the text is what a saved page falls back to."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if served:
        monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/99_x.ipynb")
    quiz.show("99")
    assert "<details>" in shown[0]["text/html"]
    assert ("application/vnd.jupyter.widget-view+json" in shown[0]) == served

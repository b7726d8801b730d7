"""The exam: twenty questions, an answer to each on another page, and no answer without a place that shows it."""

from __future__ import annotations

import re

from course_lib.common.project import PROJECT

QUESTIONS, ANSWERS = (
    (PROJECT / "book" / f"{name}.md").read_text(encoding="utf-8") for name in ("exam", "exam_answers")
)


def numbered(page: str) -> dict[str, list[tuple[int, str]]]:
    """The numbered items of a page, by its headings; an item goes on in indented lines."""
    parts = re.split(r"(?m)^## (.+)$", page)[1:]
    items = [re.findall(r"(?m)^(\d+)\. (.+(?:\n +.+)*)$", part) for part in parts[1::2]]
    return {
        title: [(int(number), text) for number, text in found] for title, found in zip(parts[::2], items, strict=True)
    }


def test_twenty_questions_have_twenty_answers() -> None:
    """The same numbers under the same headings, in order, on two pages."""
    asked, answered = numbered(QUESTIONS), numbered(ANSWERS)
    assert list(asked) == list(answered)
    for title in asked:
        assert [number for number, _ in asked[title]] == [number for number, _ in answered[title]]
    assert [number for found in asked.values() for number, _ in found] == list(range(1, 21))


def test_questions_ask_and_answers_say_where() -> None:
    """Each question has a question mark or a task; each answer ends with a lesson or a page, and no question has one."""
    for found in numbered(QUESTIONS).values():
        assert all("?" in text or "Explain" in text for _, text in found) and not any("](" in text for _, text in found)
    for found in numbered(ANSWERS).values():
        for number, text in found:
            targets = re.findall(r"\]\(([^)]+)\)", text)
            assert targets and text.endswith(")"), number
            assert all((PROJECT / "book" / target).exists() for target in targets), number


def test_all_parts_of_the_course_are_asked_about() -> None:
    """Lessons of every part are named in the answers."""
    named = set(re.findall(r"lesson (\d\d|A)\]", ANSWERS))
    assert {"02", "03", "11", "12", "13", "15", "16", "17", "A"} <= named

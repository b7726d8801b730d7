"""Where somebody reads, and one line that is written over itself."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from course_lib.common import screen


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("kernel", "is_a_terminal", "expected"),
    [(object(), True, "notebook"), (None, True, "terminal"), (None, False, "nowhere")],
)
def test_where_somebody_reads(
    kernel: object, is_a_terminal: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is a notebook; IPython in a terminal is none, and has no kernel."""
    import IPython

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=kernel) if kernel else SimpleNamespace())
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: is_a_terminal))
    assert screen.where() == expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert screen.shell() is None and "IPython" not in sys.modules
    monkeypatch.setattr(sys, "stderr", None)  # a process without one, such as a service
    assert screen.where() == "nowhere"


@pytest.mark.parametrize(
    ("place", "in_logs", "expected"),
    [
        ("terminal", False, "\r\x1b[Kone\r\x1b[Kthree\r\x1b[Kdone\n"),
        ("nowhere", False, ""),
        ("nowhere", True, "one\nthree\ndone\n"),
    ],
)
def test_the_line_is_rewritten_where_that_can_be_seen(
    place: str, in_logs: bool, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words that follow others too soon, or say the same again, are left out; the last ones always stay."""
    clock = Clock()
    monkeypatch.setattr(screen, "time", clock)
    monkeypatch.setattr(screen, "where", lambda: place)
    line = screen.Line(in_logs=in_logs)
    line.say("one")
    line.say("two")
    clock.now += 0.6
    line.say("one")
    line.say("three")
    line.close("done")
    assert capsys.readouterr().err == expected


def test_a_notebook_has_one_output_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved page then holds what the line said last, once."""
    import IPython.display

    shown: list[str] = []
    handle = SimpleNamespace(update=lambda words, raw: shown.append("update " + words["text/plain"]))

    def display(words: dict[str, str], **_: object) -> SimpleNamespace:
        shown.append("display " + words["text/plain"])
        return handle

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(screen, "where", lambda: "notebook")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    line = screen.Line()
    line.say("one")
    line.close("done")
    assert shown == ["display one", "update done"] and sys.stderr.getvalue() == ""

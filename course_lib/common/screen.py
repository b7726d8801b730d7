"""What a learner sees: where it is read, one line that is written over itself, and errors that end in the own cell."""

from __future__ import annotations

import opcode
import os
import sys
import time
from types import TracebackType
from typing import Any

from course_lib.common.project import PROJECT

SECONDS_BETWEEN_LINES = 0.5


def shell() -> Any | None:
    """The IPython shell of a notebook's kernel, or `None`; IPython is not imported for the question."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    found = get_ipython()
    return found if getattr(found, "kernel", None) is not None else None


def where() -> str:
    """Tell a `"notebook"` from a `"terminal"` from `"nowhere"`: a log file, a test."""
    if shell() is not None:
        return "notebook"
    return "terminal" if sys.stderr is not None and sys.stderr.isatty() else "nowhere"


class Line:
    """A line that says how far something is; its last words stay.

    In a notebook it is one output, so a saved page holds what it said last.  In a terminal it is rewritten in place.
    """

    def __init__(self, *, in_logs: bool = False) -> None:
        """With `in_logs`, each text is a line of its own where nobody can see one rewritten; else there is silence."""
        self._where, self._in_logs = where(), in_logs
        self._shown: Any = None
        self._text = ""
        self._next = 0.0

    def say(self, text: str, *, now: bool = False) -> None:
        """Write over the line; words that follow others within half a second are left out, unless `now`."""
        if text == self._text or (not now and time.monotonic() < self._next):
            return
        self._text, self._next = text, time.monotonic() + SECONDS_BETWEEN_LINES
        if self._where == "terminal":
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif self._where == "notebook":
            self._display({"text/plain": text})
        elif self._in_logs:
            print(text, file=sys.stderr, flush=True)

    def close(self, text: str) -> None:
        """Write the last words, which stay."""
        self.say(text, now=True)
        if self._where == "terminal":
            print(file=sys.stderr)

    def _display(self, words: dict[str, str]) -> None:
        from IPython.display import display

        if self._shown is None:
            self._shown = display(words, raw=True, display_id=True)
        else:
            self._shown.update(words, raw=True)


def shorten_tracebacks() -> None:
    """Let what the course refuses end in the learner's cell; outside a notebook this does nothing.

    What course_lib itself raises is a sentence for the learner, and the frames between it and the cell say nothing more.
    An error that rises from anywhere else keeps every frame, and `%tb` shows all of them in any case.
    """
    kernel = shell()
    if kernel is not None:
        kernel.set_custom_exc((Exception,), _show)


def _show(
    kernel: Any, kind: type[BaseException], error: BaseException, frames: Any, tb_offset: int | None = None
) -> None:
    refused, cause, quiet = _is_refusal(frames), error.__cause__, error.__suppress_context__
    try:
        if refused:
            error.__cause__, error.__suppress_context__ = None, True
        kernel.showtraceback((kind, error, _of_the_learner(frames) if refused else frames), tb_offset=tb_offset)
    finally:
        error.__cause__, error.__suppress_context__ = cause, quiet
        sys.last_traceback = frames  # what %tb and %debug take


def _is_refusal(frames: TracebackType) -> bool:
    """Whether a `raise` of course_lib made the error: any other error inside is a fault, to be seen whole."""
    while frames.tb_next:
        frames = frames.tb_next
    code = frames.tb_frame.f_code
    return _is_ours(code.co_filename) and code.co_code[frames.tb_lasti] == opcode.opmap["RAISE_VARARGS"]


def _is_ours(file: str) -> bool:
    return file.startswith(f"{PROJECT / 'course_lib'}{os.sep}")


def _of_the_learner(frames: TracebackType | None, *, entered: bool = False) -> TracebackType | None:
    """The frames up to course_lib, and behind them those of functions that the learner handed in."""
    if frames is None:
        return None
    file = frames.tb_frame.f_code.co_filename
    entered = entered or _is_ours(file)
    rest = _of_the_learner(frames.tb_next, entered=entered)
    if entered and (_is_ours(file) or file.startswith((sys.prefix, sys.base_prefix))):
        return rest
    return TracebackType(rest, frames.tb_frame, frames.tb_lasti, frames.tb_lineno)

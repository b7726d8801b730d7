"""Where somebody reads what is printed, and one line that is written over itself while something slow goes on."""

from __future__ import annotations

import sys
import time
from typing import Any

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

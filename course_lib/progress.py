"""One line that says how far something slow has come; it is written over itself, and its last words stay.

In a notebook the line is one output, so a saved page holds what it said last.  In a terminal it is rewritten in place,
and anything else (a log file, a test) gets silence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Line", "tokenising", "where"]

SECONDS_BETWEEN_LINES = 0.5


def where() -> str:
    """Tell a `"notebook"` from a `"terminal"` from `"nowhere"`, without importing IPython."""
    if "IPython" in sys.modules:
        from IPython import get_ipython

        if getattr(get_ipython(), "kernel", None) is not None:
            return "notebook"
    return "terminal" if sys.stderr is not None and sys.stderr.isatty() else "nowhere"


class Line:
    """The line; `say` as often as you like, and `close` at the end."""

    def __init__(self) -> None:
        self._where = where()
        self._shown: Any = None
        self._text = ""
        self._next = 0.0

    def say(self, text: str, *, now: bool = False) -> None:
        """Write over the line.

        Args:
            text: What to say.
            now: Even if the last words are younger than half a second.
        """
        if self._where == "nowhere" or text == self._text or (not now and time.monotonic() < self._next):
            return
        self._text, self._next = text, time.monotonic() + SECONDS_BETWEEN_LINES
        if self._where == "terminal":
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            return
        from IPython.display import display

        words = {"text/plain": text}
        if self._shown is None:
            self._shown = display(words, raw=True, display_id=True)
        else:
            self._shown.update(words, raw=True)

    def close(self, text: str) -> None:
        """Write the last words, which stay."""
        self.say(text, now=True)
        if self._where == "terminal":
            print(file=sys.stderr)


def tokenising(text_bytes: int) -> Callable[[int, float], None]:
    """What `indexed.write_texts(progress=...)` may call: share of the text, rate, and the time that is left.

    Args:
        text_bytes: Bytes of all texts in UTF-8.

    Raises:
        ValueError: If there is no text.
    """
    if text_bytes <= 0:
        raise ValueError(f"text_bytes={text_bytes}: must be positive")
    line = Line()

    def told(done_bytes: int, megabytes_per_second: float) -> None:
        rate = f"{megabytes_per_second:.1f} MB/s"
        if done_bytes >= text_bytes:
            line.close(f"{done_bytes / 1e6:.1f} MB tokenised, {rate}")
            return
        left_seconds = (text_bytes - done_bytes) / 1e6 / megabytes_per_second
        share = 100 * done_bytes / text_bytes
        line.say(f"{share:.0f}% of {text_bytes / 1e6:.1f} MB tokenised, {rate}, about {left_seconds:.0f} s left")

    return told

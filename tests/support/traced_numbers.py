"""Numbers in prose, and where they come from: a cell's output or code, a row of `data/`, or a short list with reasons.

A reader should be able to ask of every number on a page who says so.  This module finds the numbers of a text that
nothing on hand says.  It looks at digits in prose only: code, formulae, links and names such as `bf16`, H100 or 8B are
no statements of a number.  A number counts as traced when a source holds a value that rounds to it as it is written, in
the same unit or in one that a reader converts without thinking (percent, thousands, millions, KiB, MiB, GiB).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Number", "in_data", "in_lesson", "in_text", "untraced", "untraced_in_lesson"]

SCALES = (1.0, 1e2, 1e3, 1e6, 1e9, 1e12, 2.0**10, 2.0**20, 2.0**30)
# What is no statement of a number, and is taken out before the digits are read.
NO_PROSE = tuple(
    re.compile(pattern, re.MULTILINE | re.DOTALL)
    for pattern in (
        r"^[ \t]*(`{3,}|~{3,}|:::+)[^\n]*\n.*?^[ \t]*\1[ \t]*$",  # fenced blocks, in a list too
        r"`[^`\n]+`",
        r"\$\$.*?\$\$|\$[^$\n]+\$",
        r"\]\([^)\n]*\)",  # the target of a link
        r"<[^>\n]*>|https?://\S+",
        r"^[ \t]*\d+\.(?=\s)",  # the number of a list item
        r"^\|[ \t]*\d{1,2}[ \t]*(?=\|)",  # the number of a table's row
        r"\b[Ll]essons?(?: |\n)(?:\d\d|A)\b(?:(?:, | and | to | or )(?:\d\d|A)\b)*",
        r"^\|[^|\n]*\|[ \t]*(?:\d\d|A)(?=,| [A-Z])(?:, (?:\d\d|A)\b)*",  # lessons in the second column of a table
        r"\b[A-Z]+[ ]?=[ ]?\d+(?:\.\d+)?",  # TP=2
        r"\b20[12]\d\b(?![.,]\d)",  # a year
        r"\barXiv \d{4}\.\d{5}|\b(?:issue|pull request) \d+|\bcommit [0-9a-f]{7,}",  # where something was read
    )
)
# 1,235,814,400 or 3.14 or 1e-4, but no part of a name such as fp32, H100, 8B, 0.6.2 or e27b371.
DIGITS = re.compile(
    r"(?<![\w.,/#^-])[-+\u2212]?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)([eE][-+]?\d+)?(?![\w/]|[.,]\d|-\w)"
)
ANY_DIGITS = re.compile(r"\d{1,3}(?:[,_]\d{3})+(?:\.\d+)?(?:[eE][-+]?\d+)?|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Number:
    """A number as it is written in prose.

    Attributes:
        text: The digits.
        value: What they mean.
        tolerance: Half a unit of the last digit that is written; trailing zeros of a whole number are not digits.
        line: The line that it stands in.
    """

    text: str
    value: float
    tolerance: float
    line: str

    def __str__(self) -> str:
        return f"{self.text} in: {self.line}"


def in_text(markdown: str) -> list[Number]:
    """The numbers that a text states.

    Args:
        markdown: Prose with code, formulae and links in it.

    Example:
        >>> [number.text for number in in_text("Step 3 of `f(4)` takes 1,200 ms in bf16 on 8B, see lesson 05.")]
        ['3', '1,200']
    """
    plain = markdown
    for pattern in NO_PROSE:
        plain = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), plain)
    lines = markdown.splitlines()
    return [
        _number(match, lines[row].strip())
        for row, line in enumerate(plain.splitlines())
        for match in DIGITS.finditer(line)
    ]


def _number(match: re.Match[str], line: str) -> Number:
    digits, exponent = match.group(1).replace(",", ""), int((match.group(2) or "e0")[1:])
    whole, _, decimals = digits.partition(".")
    # 1,200 may be 1,234 to two digits; 12, 30 and 1,235,814,400 are meant as they are.
    rounded = not decimals and len(whole) > 2 and len(whole.rstrip("0")) <= 4
    zeros = len(whole) - len(whole.rstrip("0")) if rounded else 0
    last = 10.0 ** (zeros - len(decimals) + exponent)
    exact = not decimals and not zeros and not exponent and not 3 <= len(whole) <= 4
    return Number(match.group(), float(f"{digits}e{exponent}"), 0.0 if exact else 0.5 * last, line)


def in_lesson(notebook: Mapping[str, Any]) -> set[float]:
    """Every number that a lesson's cells hold or show: code, outputs, and the words of pictures.

    Args:
        notebook: An executed lesson.
    """
    texts: list[str] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        texts.append("".join(cell["source"]))
        for output in cell.get("outputs", ()):
            texts.append("".join(output.get("text", "")))
            texts += ["".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
            texts += [
                str(words.get("alt", "")) for words in output.get("metadata", {}).values() if hasattr(words, "get")
            ]
    return _values(texts)


def in_data(folder: Path) -> set[float]:
    """Every number of the facts in `data/`, in values and in the words of a row.

    Args:
        folder: The folder; its JSON files are read.
    """
    return _values(json.dumps(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.rglob("*.json")))


def _values(texts: Iterable[str]) -> set[float]:
    return {float(match.replace(",", "").replace("_", "")) for text in texts for match in ANY_DIGITS.findall(text)}


def untraced(markdown: str, sources: Iterable[float], *, allowed: Mapping[str, str] | None = None) -> list[Number]:
    """The numbers of a text that no source holds.

    Args:
        markdown: The text.
        sources: Values that somebody computed, measured or published.
        allowed: Words of a line, as they stand in the text, to the reason why its numbers need no source.

    Example:
        >>> [number.text for number in untraced("It has 465 KB in 12 topics.", {465_127.0})]
        ['12']
    """
    known = sorted(set(sources))
    reasons = allowed or {}
    return [
        number
        for number in in_text(markdown)
        if not _holds(known, number) and not any(words in number.line for words in reasons)
    ]


def _holds(known: list[float], number: Number) -> bool:
    from bisect import bisect_left

    for scale in SCALES:
        for low, high in _ranges(number, scale):
            place = bisect_left(known, low)
            if place < len(known) and known[place] <= high:
                return True
    return False


def _ranges(number: Number, scale: float) -> Iterator[tuple[float, float]]:
    """Where a source's value may lie: the number was shown divided by the scale, or, for percent, multiplied."""
    slack = 1e-12 * max(1.0, abs(number.value))
    low, high = number.value - number.tolerance - slack, number.value + number.tolerance + slack
    if scale == 1.0 or number.tolerance or number.value >= 100:
        yield low * scale, high * scale
    if scale == 100.0:
        yield low / scale, high / scale


def untraced_in_lesson(
    notebook: Mapping[str, Any], data: Iterable[float], *, allowed: Mapping[str, str] | None = None
) -> list[str]:
    """The untraced numbers of an executed lesson's prose, one line each.

    Args:
        notebook: The executed lesson.
        data: What `in_data` found.
        allowed: See `untraced`.
    """
    sources = in_lesson(notebook) | set(data)
    return [
        f"{cell['id']}: {number}"
        for cell in notebook["cells"]
        if cell["cell_type"] == "markdown"
        for number in untraced("".join(cell["source"]), sources, allowed=allowed)
    ]

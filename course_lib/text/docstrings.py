"""Does a text look like the first line of a docstring?  Five things that PEP 257 and its checkers ask of one.

A program can verify all five, and none of them knows the function: a text may pass and say nothing true about it.
"""

from __future__ import annotations

__all__ = ["FEWEST_WORDS", "MOST_WORDS", "checks", "passes", "score"]

FEWEST_WORDS, MOST_WORDS = 3, 12


def checks(text: str) -> dict[str, bool]:
    """What of the five holds; spaces at both ends do not count.

    Source: PEP 257, and pydocstyle's D200, D400, D401 and D403, which ask the same of a first line.

    >>> [name for name, holds in checks("returns the value").items() if not holds]
    ['ends in one period', 'begins with a capital', 'commands, as in "Return"']
    """
    line = text.strip()
    words = line.split()
    return {
        "one line": bool(line) and "\n" not in line,
        "ends in one period": line.endswith(".") and not line.endswith(".."),
        "begins with a capital": line[:1].isupper(),
        f"{FEWEST_WORDS} to {MOST_WORDS} words": FEWEST_WORDS <= len(words) <= MOST_WORDS,
        'commands, as in "Return"': bool(words) and not words[0].endswith("s"),
    }


def score(text: str) -> float:
    """Share of the five that hold, 0 to 1.

    >>> score("Return the value."), score("returns the value"), score("")
    (1.0, 0.4, 0.0)
    """
    found = checks(text).values()
    return sum(found) / len(found)


def passes(text: str) -> bool:
    """Whether all five hold.

    >>> passes("Return the value."), passes("Returns the value.")
    (True, False)
    """
    return all(checks(text).values())

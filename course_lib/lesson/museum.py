"""The failure museum of lesson A: exhibits as data, and a visit that shows a symptom before it asks for the cause.

What fails stands on the page, so that its reader sees the call.  Here stand the words that it must print, the diagnoses
to choose from, what mends it, and who reported it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.lesson import checks, ledger, quiz

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LAYERS", "Exhibit", "Visit", "exhibits", "sources"]

FILE = Path(__file__).parent / "exhibits.toml"
LESSON = "a"
LAYERS = ("packages", "launch", "configuration", "data", "model", "checkpoint")
"""Where in the stack an exhibit sits, in the order in which a run meets them."""
SHOWN = 300  # characters of an error's message: its first sentence, without the stack that torch appends


@dataclass(frozen=True)
class Source:
    """A public place where a failure of this kind was reported, and what it says there."""

    at: str
    says: str


@dataclass(frozen=True)
class Exhibit:
    """A failure: the words that it prints, the question about its cause, what mends it, and its sources."""

    name: str
    layer: str
    symptom: str
    question: quiz.Question
    mend: str
    sources: tuple[Source, ...]


def exhibits() -> dict[str, Exhibit]:
    """All exhibits by name, in the order of the page."""
    return {row["name"]: _exhibit(row) for row in tomllib.loads(FILE.read_text(encoding="utf-8"))["exhibit"]}


def _exhibit(row: dict) -> Exhibit:
    found = tuple(Source(**source) for source in row["source"])
    reported = "; ".join(f"{_short(source.at)} ({source.says})" for source in found)
    options = tuple(quiz.Option(**option) for option in row["option"])
    # Who finds the cause also hears who met it and what mends it; before, a title of an issue would give it away.
    told = tuple(
        replace(option, reason=f"{option.reason} Reported: {reported}. Mend: {row['mend']}") if option.right else option
        for option in options
    )
    question = quiz.Question(row["question"], told)
    return Exhibit(row["name"], row["layer"], row["symptom"], question, row["mend"], found)


@dataclass
class Case:
    """What one exhibit has shown so far; `raised` is None where it printed and raised nothing."""

    raised: str | None = None
    shown: list[str] = field(default_factory=list)

    def shows(self, text: object) -> None:
        """Print what somebody would see who does not know the cause."""
        self.shown.append(str(text))
        print(text)


class Visit:
    """One walk through the museum: which exhibits were seen, and which of them raised an error."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}

    @contextmanager
    def case(self, name: str) -> Iterator[Case]:
        """Let something fail, show its error in one line, and ask for the cause.

        Args:
            name: The exhibit.

        Raises:
            ClaimFailed: It failed another way than it did here, or not at all: perhaps upstream mended it.
        """
        exhibit, seen = exhibits()[name], Case()
        try:
            yield seen
        except (Exception, SystemExit) as error:
            seen.raised = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(seen.raised[:SHOWN])
        told = " ".join([*seen.shown, seen.raised or ""])
        if exhibit.symptom not in told:
            raise checks.ClaimFailed(
                f"does not hold: the exhibit {name} says {exhibit.symptom!r}; it said {told[:SHOWN]!r}\n"
                "Is another version installed, in which this is mended?"
            )
        self.cases[name] = seen
        quiz.display((exhibit.question,), answered=partial(_answered, name))

    @property
    def silent(self) -> list[str]:
        """The exhibits seen so far that raised no error."""
        return [name for name, case in self.cases.items() if case.raised is None]


def _answered(name: str, option: quiz.Option) -> None:
    """A diagnosis is an attempt at an exercise of the exhibit's name."""
    ledger.attempted(option.right, lesson=LESSON, name=name)


def sources() -> pd.DataFrame:
    """One row an exhibit: its layer, what mends it, where it was reported."""
    import pandas as pd

    rows = [
        {
            "exhibit": one.name,
            "layer": one.layer,
            "mend": one.mend.replace("`", ""),
            "reported at": ", ".join(_short(source.at) for source in one.sources),
        }
        for one in exhibits().values()
    ]
    return pd.DataFrame(rows)


def _short(address: str) -> str:
    """An address of GitHub as people write it.

    Example:
        >>> _short("https://github.com/NVIDIA/Megatron-LM/issues/705")
        'NVIDIA/Megatron-LM 705'
    """
    owner, project, kind, *rest = address.removeprefix("https://github.com/").split("/")
    return f"{owner}/{project} {rest[0] if kind in ('issues', 'pull') else rest[-1]}"

"""What a check of this machine found: one line of the doctor's table, with its fix where it is a problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "fail_unless", "warn_unless"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        name: What was looked at.
        status: "ok"; "warn" if every lesson still runs; "fail" if one could not.
        value: What was found, with its unit.
        fix: What to do about it; empty exactly when the status is "ok".
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") == bool(self.fix):
            raise ValueError(
                f"finding {self.name!r} is {self.status!r} with the fix {self.fix!r}: a fix belongs to a problem only"
            )


def fail_unless(holds: bool, name: str, value: str, fix: str) -> Finding:
    """A finding that stops lessons unless it holds.

    Example:
        >>> fail_unless(6 >= 8, "memory", "6 GiB", "Give it 8 GiB.").status
        'fail'
    """
    return Finding(name, "ok", value) if holds else Finding(name, "fail", value, fix)


def warn_unless(holds: bool, name: str, value: str, fix: str) -> Finding:
    """A finding that the learner should know of unless it holds.

    Example:
        >>> warn_unless(2 >= 2, "cores", "2", "Give it two cores.")
        Finding(name='cores', status='ok', value='2', fix='')
    """
    return Finding(name, "ok", value) if holds else Finding(name, "warn", value, fix)

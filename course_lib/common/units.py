"""Units: one meaning for each name, so that no number in the course is off by 7%.

A memory size in this course is counted in bytes and shown in GiB (2**30); a disk or network size that a
vendor states in GB is 10**9.  Convert once, where a number is shown.
"""

from __future__ import annotations

import math

__all__ = ["GB", "GiB", "MiB", "duration", "format_bytes", "format_number", "gib"]

MiB: int = 2**20
GiB: int = 2**30
GB: int = 10**9


def gib(size_bytes: float) -> float:
    """A size in bytes, in GiB (2**30 bytes).

    >>> gib(3 * 2**30)
    3.0
    """
    return size_bytes / GiB


def format_bytes(size_bytes: float) -> str:
    """A size, or a difference of two, with the largest binary unit that keeps it at 1 or above.

    >>> format_bytes(0), format_bytes(1023), format_bytes(1536), format_bytes(-5 * 2**30)
    ('0 B', '1023 B', '1.5 KiB', '-5.0 GiB')
    """
    size = float(size_bytes)
    if abs(round(size)) < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        # Half a digit early: 1023.96 KiB would be shown as 1024.0 KiB.
        if abs(size) < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def format_number(value: float) -> str:
    """A number as a person reads it: whole numbers with separators, others with four digits.

    >>> format_number(1234567), format_number(6.931471), format_number(0.00012), format_number(float("nan"))
    ('1,234,567', '6.931', '0.00012', 'nan')
    """
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def duration(seconds: float, *, rough: bool = False) -> str:
    """Write a duration as a person says it; an estimate is rounded to what it is worth.

    Example:
        >>> duration(7.31), duration(83), duration(83, rough=True), duration(4000)
        ('7.3 s', '1 min 23 s', '1.5 min', '1 h 6 min')
    """
    seconds = max(0.0, seconds)
    if seconds < 59.5:
        return f"{seconds:.0f} s" if rough or seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{round(whole / 30) / 2:g} min" if rough else f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

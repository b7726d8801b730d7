"""Units: one meaning for each name, so that no number in the course is off by 7%.

A memory size in this course is counted in bytes and shown in GiB (2**30); a disk or network size that a
vendor states in GB is 10**9.  Convert once, where a number is shown.
"""

from __future__ import annotations

import math

__all__ = ["GB", "GiB", "KiB", "MiB", "format_bytes", "format_count", "format_number", "gb", "gib"]

KiB: int = 2**10
MiB: int = 2**20
GiB: int = 2**30
GB: int = 10**9


def gib(size_bytes: float) -> float:
    """How many GiB (2**30 bytes) are these bytes?

    Args:
        size_bytes: A size in bytes.

    Returns:
        The size in GiB.

    >>> gib(3 * 2**30)
    3.0
    """
    return size_bytes / GiB


def gb(size_bytes: float) -> float:
    """How many GB (10**9 bytes) are these bytes?

    Args:
        size_bytes: A size in bytes.

    Returns:
        The size in GB.

    >>> gb(80 * 10**9), round(gib(80 * 10**9), 1)
    (80.0, 74.5)
    """
    return size_bytes / GB


def format_bytes(size_bytes: float) -> str:
    """A size with the largest binary unit that keeps it at 1 or above.

    Args:
        size_bytes: A size in bytes; may be negative when it is a difference.

    Returns:
        Text such as ``"1.5 GiB"``; whole bytes have no decimals.

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


def format_count(count: float) -> str:
    """A number of parameters or tokens, short: three significant digits and K, M, B (10**9) or T.

    Args:
        count: A number of things.

    Returns:
        Text such as ``"1.24B"``; below 1000 the whole number.

    >>> format_count(1_235_814_400), format_count(787_584), format_count(512), format_count(999_999)
    ('1.24B', '788K', '512', '1.00M')
    """
    size = float(count)
    if abs(round(size)) < 1000:
        return f"{size:.0f}"
    for unit in ("K", "M", "B", "T"):
        size /= 1000
        # 999.5 has three significant digits too many: it belongs to the next unit.
        if abs(size) < 999.5 or unit == "T":
            break
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f}{unit}"


def format_number(value: float) -> str:
    """A number as a person reads it: whole numbers with separators, others with four digits.

    Args:
        value: Any number; one that is not finite is named.

    >>> format_number(1234567), format_number(6.931471), format_number(0.00012), format_number(float("nan"))
    ('1,234,567', '6.931', '0.00012', 'nan')
    """
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"

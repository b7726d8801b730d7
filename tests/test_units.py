"""Units: bytes inside, GiB is 2**30, GB is 10**9."""

import doctest

import pytest

from course_lib import units


def test_documented_examples_hold() -> None:
    """Every example in the module's docstrings is true."""
    assert doctest.testmod(units).failed == 0
    assert doctest.testmod(units).attempted > 3


def test_gib_and_gb_are_not_the_same() -> None:
    """An 80 GB card holds 74.5 GiB: the two units differ by 7.4%."""
    assert units.gib(units.GiB) == units.gb(units.GB) == 1.0
    assert units.gb(units.GiB) == pytest.approx(1.0737, abs=1e-4)
    assert units.GiB == 1024 * units.MiB == 1024**2 * units.KiB


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (1023.6, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**3, "1.0 GiB"),
        (1536 * 1024**4, "1.5 PiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes_never_show_1024_of_a_unit(size_bytes: float, shown: str) -> None:
    """A size moves to the next unit before its number would be rounded to 1024."""
    assert units.format_bytes(size_bytes) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (999_499, "999K"),
        (999_500, "1.00M"),
        (9_994, "9.99K"),
        (9_996, "10.0K"),
        (99_960, "100K"),
        (8_030_261_248, "8.03B"),
        (25 * 10**12, "25.0T"),
        (2 * 10**15, "2000T"),
    ],
)
def test_counts_have_three_significant_digits(count: int, shown: str) -> None:
    """A count keeps three significant digits on either side of every rounding edge."""
    assert units.format_count(count) == shown

"""Units: bytes inside, GiB is 2**30, GB is 10**9."""

import pytest

from course_lib.common import units


def test_gib_and_gb_are_not_the_same() -> None:
    """An 80 GB card holds 74.5 GiB: the two units differ by 7.4%."""
    assert units.gib(80 * units.GB) == pytest.approx(74.5, abs=0.01)
    assert units.GiB / units.GB == pytest.approx(1.0737, abs=1e-4) and units.GiB == 1024 * units.MiB


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (1023.6, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**3, "1.0 GiB"),
        (500 * 1024**5, "500.0 PiB"),
        (1000 * 1024**2, "1000.0 MiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes_never_show_1024_of_a_unit(size_bytes: float, shown: str) -> None:
    """A size moves to the next unit before its number would be rounded to 1024."""
    assert units.format_bytes(size_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [
        (-1, "0.0 s", "0 s"),
        (7.31, "7.3 s", "7 s"),
        (59.6, "1 min 0 s", "1 min"),
        (83, "1 min 23 s", "1.5 min"),
        (4000, "1 h 6 min", "1 h 6 min"),
    ],
)
def test_durations_are_said_as_a_person_does(seconds: float, exact: str, rough: str) -> None:
    """An estimate is rounded to what it is worth."""
    assert units.duration(seconds) == exact and units.duration(seconds, rough=True) == rough

"""What lesson A breaks, where its claims do not prove it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from course_lib.experiments import specimens


def test_errors_of_make_are_heard_in_their_own_cell(capfd: pytest.CaptureFixture[str]) -> None:
    """Both streams of a child are heard, also when the block ends by an error; what is started later is not."""
    heard: list[str] = []
    child = "import sys; print('make: *** one'); print('make: *** two', file=sys.stderr); print('chatter')"
    with pytest.raises(SystemExit), specimens.overheard(heard.append):
        subprocess.run([sys.executable, "-c", child])
        raise SystemExit(1)
    assert capfd.readouterr() == ("", "")
    subprocess.run([sys.executable, "-c", child], check=True)
    assert sorted(heard) == ["make: *** one", "make: *** two"]
    assert "chatter" in capfd.readouterr().out

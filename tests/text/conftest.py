"""What several files of this room read."""

from __future__ import annotations

import pytest

from course_lib.text import corpus


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The corpus of this Python."""
    return corpus.python_library(tmp_path_factory.mktemp("corpus") / "python")

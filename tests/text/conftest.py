"""What several files of this room read."""

from __future__ import annotations

import pytest

from course_lib.text import corpus
from support import once


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The corpus of this Python."""
    return once.for_all_workers(tmp_path_factory, "corpus", lambda folder: corpus.python_library(folder / "python"))

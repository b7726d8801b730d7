"""What several files of tests read is made once, whichever worker of pytest-xdist runs them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def for_all_workers[T](factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What `make` returned when the first worker that asks called it, with a new folder.

    Args:
        name: Its name among what the workers share.
    """
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    kept = place / f"{name}.pickle"
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(make(factory.mktemp(name))))
    return pickle.loads(kept.read_bytes())

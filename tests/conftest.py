"""Shared fixtures: the stack importable, a warm engine for the whole session, and runs in a directory of their own."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from course_lib import stack

pytest_plugins = ["support.lesson_runs", "support.small_book", "support.workers"]
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on busy cores, waiting by spinning costs a fifth
sys.modules["rfc3987_syntax"] = None  # jsonschema would compile 38 grammars for URIs, which no notebook's schema has
gc.set_threshold(*stack.SELDOM)  # from the start: models are planned in workers that never prepare imports


def pytest_collection_finish() -> None:
    """Tests find the grammars where they are installed."""
    sys.modules.pop("rfc3987_syntax", None)


@pytest.fixture(scope="session", autouse=True)
def warm_engine():
    """One lease for the session: every launch of every test and notebook shares one warm fork server."""
    from course_lib.launch import forkserver

    lease = forkserver.lease()
    yield lease
    lease.close()


@pytest.fixture(scope="session")
def in_ranks(warm_engine) -> Callable[..., None]:
    """Run a function of a test module in so many real ranks, forks with everything redirected."""

    def run(function: Callable[[str], None], directory: Path, *, ranks: int = 1) -> None:
        """Call `function(directory)` in each rank; an error in one of them fails the test with the rank's words."""
        log, target = directory / "agent.log", f"{function.__module__}:{function.__name__}"
        launched = warm_engine.launch(target, str(directory), ranks=ranks, log=log, env={})
        report = launched.wait_for(500)
        launched.close()
        assert report == {"dead": {}}, f"{report}\n{log.read_text()[-4000:]}"

    return run


@pytest.fixture(scope="session")
def bridge():
    """Megatron-Bridge can be imported in this process."""
    return stack.prepare_imports()


@pytest.fixture
def runs_directory(tmp_path, monkeypatch):
    """A fresh directory for runs."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a network fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a network connection was attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

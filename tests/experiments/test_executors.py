"""Curator's stages on Ray end at their deadline and on an interrupt, and leave no process; no test here waits for Ray."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from course_lib.experiments import executors


def test_a_deadline_ends_everything_and_says_so():
    """Importing takes longer than this, so the outcome does not depend on whether Ray would have started."""
    outcome = executors.run([], "Ray Data", deadline_seconds=0.5)
    assert (outcome.status, outcome.run_seconds, outcome.alive) == ("too late", None, 0)
    assert outcome.peak_bytes > 0


def test_an_interrupt_leaves_nothing(monkeypatch):
    """The learner stops the cell: what was started is gone when the interrupt arrives."""
    started = []

    def interrupted(family, child, deadline_seconds):
        started.append(child.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(executors._Family, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executors.run([], "Ray Data")
    assert not psutil.pid_exists(started[0])


def test_a_grandchild_with_another_parent_is_found_and_ended(tmp_path):
    """Ray's helpers outlive who started them; they have the folder in their command line."""
    sleeps = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {str(tmp_path)!r}])"
    child = subprocess.Popen([sys.executable, "-c", sleeps], start_new_session=True)
    family = executors._Family(child.pid, str(tmp_path))
    assert family.watch(child, 30)
    assert family.end() == (1, 0)


def test_ray_ends_when_who_watches_it_was_killed():
    """A kernel that is killed runs no `finally`; the process between sees that it has another parent."""
    between = (
        "import subprocess, sys; from course_lib.experiments import executors; "
        "head = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(head.pid, flush=True); executors._end_with_parent(head, int(sys.argv[1]))"
    )
    watcher = (
        "import os, subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {between!r}, str(os.getpid())]); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", watcher], stdout=subprocess.PIPE, text=True) as watching:
        head = psutil.Process(int(watching.stdout.readline()))
        watching.kill()
    _, alive = psutil.wait_procs([head], 20)
    assert not alive


def test_an_unknown_executor_is_refused_before_anything_starts():
    """The message lists those that there are."""
    with pytest.raises(ValueError, match="Xenna, batch"):
        executors.run([], "Dask")

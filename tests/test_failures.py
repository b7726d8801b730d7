"""Failure drills, each done for real: the caller learns the first failing rank and its cause, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import drills
import psutil
import pytest
import small

from course_lib import failures, launch, runs

SECONDS = 15.0
"""The promise: from the failure to the caller's exception."""


@pytest.fixture
def cfg(bridge, runs_directory):
    """Four ranks' worth of a small run that would take a while."""
    return small.config(train_iters=200)


def drill(cfg: object, name: str) -> launch.RunFailed:
    """Run a drill on four ranks and hold what every failure must do."""
    with pytest.raises(launch.RunFailed) as caught:
        launch.run(cfg, ranks=4, name=name.replace("_", "-"), show=None, target=f"drills:{name}")
    failed = caught.value
    hold(failed.run, failed.outcome, str(failed))
    return failed


def hold(run: runs.Run, outcome: runs.Outcome, message: str) -> None:
    """One screen, the same words in outcome.json, no process left, and soon enough."""
    assert len(message.splitlines()) <= 24 and outcome.cause in message
    written = json.loads((run.path / "outcome.json").read_text())
    assert (written["status"], written["rank"], written["cause"]) == (outcome.status, outcome.rank, outcome.cause)
    assert no_process_left(run)
    trouble = run.metrics.time.max() if len(run.metrics) else run.launch["started"]
    assert outcome.finished - trouble < SECONDS


def no_process_left(run: runs.Run) -> bool:
    """Every pid that a rank ever wrote is gone, after a moment for the kernel."""
    pids = [entry["pid"] for entry in run.ranks().values()]
    end = time.monotonic() + 5
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return bool(pids)


def test_a_rank_that_raises_is_named(cfg):
    """Three ranks lose their peer, one had a reason; the reason is reported, and the next launch works."""
    failed = drill(cfg, "raises")
    assert failed.outcome.rank == drills.FAILING_RANK and failed.outcome.exception == "ValueError"
    assert "a loss of minus seven is impossible" in str(failed)
    assert "rank_3.log" in str(failed) and "minus seven" in failed.run.log(3)
    cfg.train.train_iters = 1
    assert launch.run(cfg, ranks=4, name="next", show=None).outcome.status == "succeeded"


def test_a_rank_that_leaves_is_named(cfg):
    """A rank that ends with exit code 0 is no failure to the launcher; nobody waits for it forever."""
    failed = drill(cfg, "leaves")
    assert (failed.outcome.rank, failed.outcome.cause) == (3, "rank 3 exited with code 0")


def test_a_killed_rank_is_named(cfg):
    """A rank that dies without a word is found by its exit code, before its peers' complaints."""
    failed = drill(cfg, "is_killed")
    assert (failed.outcome.rank, failed.outcome.exception) == (drills.FAILING_RANK, "SIGKILL")
    assert "out-of-memory" in failed.outcome.hint and "while training" in failed.outcome.cause


def test_a_rank_without_memory_is_named(cfg):
    """A refused allocation is told as one, with the knobs that help."""
    failed = drill(cfg, "runs_out_of_memory")
    assert failed.outcome.rank == drills.FAILING_RANK
    assert "Out of memory" in failed.outcome.hint and "micro_batch_size" in failed.outcome.hint


def interrupt_when(run_name: str, stage: str) -> threading.Thread:
    """Send this process what Ctrl-C and JupyterLab's stop button send, once the run has reached a stage."""

    def watch() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            path = runs.directory() / run_name
            if (path / "config.yaml").exists() and runs.Run(path).stage() == stage and len(runs.Run(path).ranks()) == 4:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def listens_to_ctrl_c():
    """Python's own answer to an interrupt, as a kernel has it: a shell's background jobs are born ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_an_interrupted_cell_leaves_nothing_behind(cfg):
    """The learner's interrupt ends the ranks, is no error of the run, and the next cell works."""
    watcher = interrupt_when("interrupted", "training")
    with pytest.raises(KeyboardInterrupt) as caught:
        launch.run(cfg, ranks=4, name="interrupted", show=None, target="drills:never_ends")
    watcher.join()
    run = runs.read("interrupted")
    assert isinstance(caught.value, launch.RunInterrupted) and "4 ranks are gone" in str(caught.value)
    assert run.outcome.status == "interrupted"
    assert no_process_left(run)
    cfg.train.train_iters = 1
    assert launch.run(cfg, ranks=4, name="after", show=None).outcome.status == "succeeded"


def written_config(cfg: object, directory: Path) -> Path:
    """A configuration as a file, as a learner might edit it."""
    directory.mkdir(parents=True, exist_ok=True)
    cfg.to_yaml(str(directory / "config.yaml"))
    return directory / "config.yaml"


def in_another_process(code: str, **environment: str) -> subprocess.Popen:
    """Run Python code as another notebook would."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
    )


LAUNCH = "import sys; from course_lib import launch; r = launch.run({path!r}, ranks=2, name='same', show=None); print(r.name)"


def test_two_notebooks_that_launch_at_once_do_not_meet(cfg, tmp_path):
    """Same name, same moment: two directories, two ports, two good runs."""
    cfg.train.train_iters = 2
    path = written_config(cfg, tmp_path / "mine")
    both = [in_another_process(LAUNCH.format(path=str(path))) for _ in range(2)]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(told)
    names = sorted(text.split()[-1] for text in told)
    assert names == ["same", "same-2"]
    one, two = (runs.read(name) for name in names)
    assert runs.difference(one, two) == 0 and len(one.metrics) == 2


def test_a_taken_port_does_not_matter(cfg, monkeypatch):
    """The environment names a port that is in use; a launch asks the kernel for a free one instead."""
    cfg.train.train_iters = 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert launch.run(cfg, ranks=2, name="port", show=None).outcome.status == "succeeded"


def test_a_full_disk_is_told_as_one(cfg, tmp_path):
    """On a file system without space the caller still gets rank, cause and fix, and outcome.json is whole."""
    path = written_config(cfg, tmp_path / "mine")
    folder = tmp_path / "small-disk"
    folder.mkdir()
    code = f"""
import os, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", {str(folder)!r}], check=True)
from course_lib import launch, warm
try:
    launch.run({str(path)!r}, ranks=2, name="full", show=None, target="drills:fills_the_disk")
except launch.RunFailed as failed:
    print("CAUSE", failed.outcome.rank, failed.outcome.exception, failed.outcome.hint)
    print("FILE", open(failed.run.path / "outcome.json").read())
"""
    text = in_a_mount_namespace(code, COURSE_RUNS=str(folder), TMPDIR=str(tmp_path))
    assert "CAUSE 1 OSError The disk is full" in text, text
    assert json.loads(text.split("FILE", 1)[1])["hint"].startswith("The disk is full")


def in_a_mount_namespace(code: str, **environment: str) -> str:
    """Run Python code where mounts are private, with a warm server of its own (TMPDIR decides which)."""
    process = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=Path(__file__).parent,
    )
    return process.stdout + process.stderr


def test_outcome_is_written_on_a_disk_that_is_full(tmp_path, monkeypatch):
    """The reserve gives way to outcome.json; without any space the caller still gets the outcome as a value."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / ".reserve").write_bytes(b"0" * 1000)
    runs.write_json(tmp_path / "ranks" / "0.json", {"rank": 0, "pid": 1, "stage": "done", "time": 1.0})
    write = runs.write_json

    def on_a_full_disk(path, content):
        if (tmp_path / ".reserve").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(runs, "write_json", on_a_full_disk)
    assert failures.settle(tmp_path).status == "succeeded"
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == "succeeded"


def test_a_small_shared_memory_is_enough_or_named(cfg, tmp_path):
    """With 4 KiB of /dev/shm a run either works or says that shared memory is too small; it never hangs."""
    cfg.train.train_iters = 1
    path = written_config(cfg, tmp_path / "mine")
    code = f"""
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", "/dev/shm"], check=True)
open("/dev/shm/filler", "wb").write(b"0" * 4096)
from course_lib import launch
try:
    print("STATUS", launch.run({str(path)!r}, ranks=2, name="shm", show=None).outcome.status)
except launch.RunFailed as failed:
    print("HINT", failed.outcome.hint)
"""
    text = in_a_mount_namespace(code, COURSE_RUNS=str(tmp_path / "runs"), TMPDIR=str(tmp_path))
    assert "STATUS succeeded" in text or "HINT Shared memory is too small" in text, text


def test_a_broken_file_is_refused_at_the_door(cfg, tmp_path):
    """A file that is no YAML never reaches a rank."""
    path = written_config(cfg, tmp_path / "mine")
    path.write_text(path.read_text().replace("model:", "model: ][", 1))
    with pytest.raises(launch.ConfigError, match="not valid YAML.*line"):
        launch.run(path, ranks=4, name="broken", show=None)
    path.write_text("train: {}\n")
    with pytest.raises(launch.ConfigError, match="no section model"):
        launch.run(path, ranks=4, name="broken", show=None)
    with pytest.raises(launch.ConfigError, match="does not exist"):
        launch.run(tmp_path / "nothing.yaml", ranks=4, name="broken", show=None)


def test_an_unknown_field_in_the_file_is_named(cfg, tmp_path):
    """Bridge would drop it silently in its lenient mode; here the run fails and says which field it is."""
    path = written_config(cfg, tmp_path / "mine")
    path.write_text(path.read_text().replace("  train_iters:", "  train_steps: 7\n  train_iters:", 1))
    with pytest.raises(launch.RunFailed, match="train_steps") as caught:
        launch.run(path, ranks=4, name="unknown-field", show=None)
    hold(caught.value.run, caught.value.outcome, str(caught.value))


def test_a_layout_that_cannot_be_in_the_file_is_refused(cfg, tmp_path):
    """The same refusal as for a configuration object, before any process."""
    path = written_config(cfg, tmp_path / "mine")
    path.write_text(path.read_text().replace("tensor_model_parallel_size: 2", "tensor_model_parallel_size: 3"))
    with pytest.raises(ValueError, match="TP=3"):
        launch.run(path, ranks=6, name="layout", show=None)


def test_ranks_end_when_the_client_dies(cfg, tmp_path):
    """A killed notebook kernel takes its ranks with it."""
    path = written_config(cfg, tmp_path / "mine")
    client = in_another_process(
        LAUNCH.format(path=str(path)).replace("show=None", "show=None, target='drills:never_ends'")
    )
    end = time.monotonic() + 120
    run = runs.Run(runs.directory() / "same")
    while len(run.ranks()) < 2 or run.stage() != "training":
        assert time.monotonic() < end, client.poll()
        time.sleep(0.1)
    client.kill()
    client.wait()
    assert no_process_left(run)


def test_failures_are_told_apart():
    """A rank that raised beats ranks that lost it, even if they noticed first."""
    assert failures.lost_a_peer("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert failures.lost_a_peer("Connection reset by peer") and not failures.lost_a_peer("loss is NaN")
    for text, word in (("CUDA out of memory", "Out of memory"), ("Errno 28", "disk"), ("EADDRINUSE", "port")):
        assert word in failures.hint_for(text)
    assert failures.hint_for("something nobody has seen") == ""


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_earliest_cause_wins_over_a_lost_peer(tmp_path, order):
    """Whatever the order of arrival, the outcome is the rank with a reason of its own."""
    (tmp_path / "ranks").mkdir()
    errors = [RuntimeError("Connection reset by peer"), ValueError("the reason")]
    for rank in order:
        failures.record(tmp_path, rank, errors[rank])
    outcome = failures.settle(tmp_path)
    assert (outcome.rank, outcome.exception, outcome.status) == (1, "ValueError", "failed")
    shutil.rmtree(tmp_path / "ranks")
    assert failures.settle(tmp_path) == outcome, "the first verdict stands"

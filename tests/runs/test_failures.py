"""Failure drills, each done for real: the caller learns the first failing rank and its cause, and nothing is left."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from course_lib import launch, runs
from course_lib.common.project import PROJECT
from course_lib.experiments import hello
from course_lib.launch import supervise
from course_lib.ranks import server, train
from course_lib.runs import failures
from support import drills, small

SECONDS = 15.0
"""The promise: from the failure to the caller's exception."""


@pytest.fixture
def cfg(bridge, runs_directory):
    """Four ranks' worth of a small run that would take a while."""
    return small.config(train_iters=200)


def drill(cfg: object, name: str) -> launch.RunFailed:
    """Run a drill on four ranks and hold what every failure must do."""
    with pytest.raises(launch.RunFailed) as caught:
        launch.run(cfg, ranks=4, name=name.replace("_", "-"), show=None, target=f"support.drills:{name}")
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
        launch.run(cfg, ranks=4, name="interrupted", show=None, target="support.drills:never_ends")
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


def in_another_process(work: Callable[..., object], *arguments: object, **options: object) -> BaseProcess:
    """Do some work as another notebook would: this process's fork, for whom the stack is imported already."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, kwargs=options)
    process.start()
    return process


def test_two_notebooks_that_launch_at_once_do_not_meet(cfg, tmp_path):
    """Same name, same moment: two directories, two ports, two good runs."""
    cfg.train.train_iters = 2
    path = written_config(cfg, tmp_path / "mine")
    both = [in_another_process(launch.run, path, ranks=2, name="same", show=None) for _ in range(2)]
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    one, two = (runs.read(name) for name in ("same", "same-2"))
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


@pytest.fixture(scope="module")
def hemmed_in(bridge, tmp_path_factory) -> str:
    """What three runs said where mounts are private: with a full /dev/shm of 4 KiB, on a disk of 256 KiB, without a launcher.

    They share a warm server of their own, which starts within the small /dev/shm: TMPDIR decides which, if it is short.
    """
    place = tmp_path_factory.mktemp("small")
    short, full = written_config(small.config(train_iters=1), place / "one"), place / "disk"
    long = written_config(small.config(train_iters=200), place / "many")
    full.mkdir()

    def say(*words: object) -> None:
        with open(place / "said", "a") as said:
            print(*words, file=said)

    def notebook(temporary: str) -> None:
        private_mounts()
        os.environ |= {"TMPDIR": temporary, "COURSE_RUNS": str(place / "runs")}
        tempfile.tempdir = None
        mount("size=4k", Path("/dev/shm"))
        Path("/dev/shm/filler").write_bytes(b"0" * 4096)
        try:
            say("STATUS", launch.run(short, ranks=2, name="shm", show=None).outcome.status)
        except launch.RunFailed as failed:
            say("HINT", failed.outcome.hint)
        subprocess.run(["umount", "/dev/shm"], check=True)
        mount("size=256k", full)
        os.environ["COURSE_RUNS"] = str(full)
        try:
            launch.run(long, ranks=2, name="full", show=None, target="support.drills:fills_the_disk")
        except launch.RunFailed as failed:
            say("CAUSE", failed.outcome.rank, failed.outcome.exception, failed.outcome.hint)
            say("FILE", (failed.run.path / "outcome.json").read_text())
        os.environ["COURSE_RUNS"] = str(place / "runs")
        try:
            a_launcher_is_killed(1, "the launcher was killed: the fork server, the parent of all ranks, is")
            say("FORK SERVER is told")
        except BaseException:
            say(traceback.format_exc())

    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as temporary:
        process = in_another_process(notebook, temporary)
        process.join(800)
    assert process.exitcode == 0
    return (place / "said").read_text()


def private_mounts() -> None:
    """Give this process mounts that nobody else sees, and the right to mount: what `unshare -rm` does."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
    for file, words in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", file).write_text(words)


def mount(options: str, place: Path) -> None:
    """A file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)


def test_a_full_disk_is_told_as_one(hemmed_in):
    """On a file system without space the caller still gets rank, cause and fix, and outcome.json is whole."""
    assert "CAUSE 1 OSError The disk is full" in hemmed_in, hemmed_in
    told = hemmed_in.split("FILE", 1)[1].lstrip()
    assert json.JSONDecoder().raw_decode(told)[0]["hint"].startswith("The disk is full")


def test_a_small_shared_memory_is_enough_or_named(hemmed_in):
    """With 4 KiB of /dev/shm a run either works or says that shared memory is too small; it never hangs."""
    assert "STATUS succeeded" in hemmed_in or "HINT Shared memory is too small" in hemmed_in, hemmed_in


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
    """Bridge would drop it silently in its lenient mode; here no rank starts, and it is said which field it is."""
    path = written_config(cfg, tmp_path / "mine")
    path.write_text(path.read_text().replace("  train_iters:", "  train_steps: 7\n  train_iters:", 1))
    with pytest.raises(launch.ConfigError, match="does not fit Bridge's ConfigContainer: .*train_steps"):
        launch.run(path, ranks=4, name="unknown-field", show=None)
    assert not list(runs.directory().glob("*"))


def test_a_layout_that_cannot_be_in_the_file_is_refused(cfg, tmp_path):
    """The same refusal as for a configuration object, before any process."""
    path = written_config(cfg, tmp_path / "mine")
    path.write_text(path.read_text().replace("tensor_model_parallel_size: 2", "tensor_model_parallel_size: 3"))
    with pytest.raises(ValueError, match="TP=3"):
        launch.run(path, ranks=6, name="layout", show=None)


def test_ranks_end_when_the_client_dies(cfg, tmp_path):
    """A killed notebook kernel takes its ranks with it."""
    path = written_config(cfg, tmp_path / "mine")
    options = {"ranks": 2, "name": "same", "show": None, "target": "support.drills:never_ends"}
    client = in_another_process(launch.run, path, **options)
    end = time.monotonic() + 120
    run = runs.Run(runs.directory() / "same")
    while len(run.ranks()) < 2 or run.stage() != "training":
        assert time.monotonic() < end and client.is_alive()
        time.sleep(0.1)
    client.kill()
    client.join()
    assert no_process_left(run)


@pytest.mark.parametrize(("victim", "end"), [*enumerate(drills.ENDS, start=2)])
def test_the_rank_that_began_it_is_named_although_nobody_watched(bridge, runs_directory, victim, end):
    """One of eight ranks ends and seven notice while the agent is stopped; the one is named, with its own cause."""
    outcome = drills.unseen(small.config(), end, victim, blind=2 - victim % 2)
    assert (outcome.rank, outcome.exception) == (victim, drills.ENDS[end][1]), outcome
    assert drills.ENDS[end][2] in outcome.cause and not outcome.provisional


def a_launcher_is_killed(victim: int, cause: str) -> None:
    """Agent (0) or fork server (1) are killed: the outcome says so, names no rank and a way on; the next launch works."""
    watchers: list[psutil.Process] = []

    def kill(run: runs.Run) -> None:
        if run.stage() == "training" and not watchers:
            watchers.extend(map(psutil.Process, drills.watchers(run)))
            watchers[victim].kill()

    with pytest.raises(launch.RunFailed, match=cause) as caught:
        launch.run(small.config(), ranks=4, name="watched", show=None, target="support.drills:exchanges", watch=kill)
    assert caught.value.outcome.rank is None and "Launch again" in caught.value.outcome.hint
    assert no_process_left(caught.value.run)
    assert len(hello.ranks(1)) == 1, "a launch afterwards works, and with it the server buries its fork server"
    assert psutil.wait_procs(watchers[: victim + 1], timeout=30)[1] == [], "neither the agent nor what was killed"


def test_a_killed_agent_is_no_rank_s_fault(bridge, runs_directory):
    """An agent is the run's own, so that of the server that all share is killed."""
    a_launcher_is_killed(0, "the launcher was killed by SIGKILL")


def test_a_killed_fork_server_is_no_rank_s_fault(hemmed_in):
    """Nobody else's ranks come from the one that is killed: a lesson that runs beside this would lose its own."""
    assert "FORK SERVER is told" in hemmed_in, hemmed_in


def test_a_rank_that_has_returned_wakes_its_agent(monkeypatch):
    """It lives on until torch has read what it returned: an agent that waited for its end would wait in vain."""
    monkeypatch.setattr(server, "LOOK_SECONDS", 600.0)
    lives, answers = os.pipe()[0], multiprocessing.SimpleQueue()
    answers.put(None)
    context = SimpleNamespace(_pc=SimpleNamespace(processes=[], sentinels={lives: 0}))
    context._ret_vals, context._return_values = {0: answers}, {}
    began = time.monotonic()
    assert server._Exits().look(lambda _: "torch looks", context) == "torch looks"
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("victim", ["client", "torchrun"])
def test_a_rank_under_torchrun_ends_with_who_started_it(tmp_path, victim):
    """Whoever is killed, the notebook's kernel or torchrun, no rank trains on, and the run does not look alive."""
    (tmp_path / "logs").mkdir()
    about = {"ranks": 1, "device": "cpu", "target": "support.drills:sleeps"}
    about["imports"] = train.AUTOMODEL  # torch alone: who sleeps needs no Megatron
    runs.write_json(tmp_path / "launch.json", about)
    code = "import sys, time; from pathlib import Path; from course_lib import runs; from course_lib.launch import torchrun\n"
    code += "torchrun.start(runs.Run(Path(sys.argv[1])), 1); time.sleep(600)"
    client = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT / "tests")
    run, end = runs.Run(tmp_path), time.monotonic() + 120
    while run.stage() != "training":
        assert time.monotonic() < end and client.poll() is None, (tmp_path / "logs" / "launcher.log").read_text()
        time.sleep(0.05)
    rank = psutil.Process(run.ranks()[0]["pid"])
    torchrun = rank.parent()
    assert rank.environ()["TORCHELASTIC_ERROR_FILE"] == "", "no folder of torchrun's stays in the temporary directory"
    os.kill(client.pid if victim == "client" else torchrun.pid, signal.SIGKILL)
    assert no_process_left(run)
    assert run.outcome.status == "interrupted" and "the program that started the run is gone" in run.outcome.cause
    client.kill()
    client.wait()
    psutil.wait_procs([torchrun], timeout=30)
    assert not torchrun.is_running()


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33333"


def ended(path: Path, *, world: int = 4, **errors: BaseException) -> runs.Run:
    """A run directory whose ranks are gone; those of `errors` (`r0=...`) had raised before."""
    (path / "ranks").mkdir(parents=True)
    runs.write_json(path / "launch.json", {"ranks": world})
    gone = subprocess.Popen(["true"])
    gone.wait()
    for rank in range(world):
        entry = {"rank": rank, "pid": gone.pid, "stage": "training", "time": time.time()}
        runs.write_json(path / "ranks" / f"{rank}.json", entry)
    for rank, error in errors.items():
        failures.record(path, int(rank[1:]), error)
        file = path / "ranks" / f"{rank[1:]}.json"  # this process recorded it, and is none of the ranks
        runs.write_json(file, json.loads(file.read_text()) | {"pid": gone.pid})
    return runs.Run(path)


def test_a_rank_whose_end_nobody_saw_is_not_blamed(tmp_path):
    """Four ranks are gone and nobody knows how: none is named, and none is said to have exited with code 0."""
    run = ended(tmp_path)
    assert failures.left(run) == dict.fromkeys(range(4))
    outcome = failures.settle(tmp_path, dead=failures.left(run))
    assert outcome.rank is None and outcome.cause.startswith("ranks 0, 1, 2, 3 are gone without a word")


STORE = "Timed out after 601 seconds waiting for clients. 3/4 clients joined."
LOST = {f"r{rank}": RuntimeError(GLOO) for rank in (0, 1, 3)}
VERDICTS = [
    ({f"r{rank}": RuntimeError(STORE) for rank in (0, 1, 3)}, {2: -9}, 2, "was killed by SIGKILL"),
    ({**LOST, "r2": RuntimeError(GLOO)}, {0: 1, 1: 1, 2: -9, 3: 1}, 0, "raised RuntimeError"),
    (LOST, {0: 1, 1: 1, 2: 0, 3: 1}, 2, "exited with code 0"),
    (LOST, {0: 1, 1: 1, 2: None, 3: 1}, 2, "was lost while training, and nobody saw how it ended"),
    ({**LOST, "r1": ValueError("the reason")}, {0: 1, 1: 1, 2: -15, 3: 1}, 1, "raised ValueError: the reason"),
    ({**LOST, "r1": ValueError("what a library makes of a lost peer")}, {1: 1, 2: -9}, 2, "was killed by SIGKILL"),
    ({**LOST, "r1": ValueError("the reason")}, {1: 1, 2: -6}, 1, "raised ValueError"),
    ({"r0": RuntimeError("connection closed: rank 3 is gone"), "r3": RuntimeError(GLOO)}, {1: None, 2: None}, None, "1, 2"),
    ({"r0": RuntimeError("connection closed: rank 2 is gone")}, {}, 2, "rank 0 says: connection closed"),
    ({"r0": RuntimeError("connection timeout: no word from rank 3 for 600 s")}, {}, 3, "no word from rank 3"),
    ({"r0": KeyboardInterrupt(), "r1": ValueError("the reason")}, {0: 1, 1: 1}, 1, "the reason"),
]  # fmt: skip


@pytest.mark.parametrize(("errors", "dead", "rank", "words"), VERDICTS)
def test_the_strongest_evidence_names_the_rank(tmp_path, errors, dead, rank, words):
    """Signals, reasons, exits, and what ranks say of each other; a rank that only lost another one comes last."""
    ended(tmp_path, **errors)
    outcome = failures.settle(tmp_path, dead=dead)
    assert outcome.rank == rank and words in outcome.cause


def test_interrupted_ranks_are_not_the_cause_of_a_dead_launcher(tmp_path):
    """When the fork server dies, torch interrupts its children; a rank with a reason of its own is named all the same."""
    ended(tmp_path / "one", r0=KeyboardInterrupt(), r1=RuntimeError(GLOO))
    outcome = failures.settle(tmp_path / "one", dead={}, launcher="the launcher was killed")
    assert (outcome.rank, outcome.cause) == (None, "the launcher was killed") and "Launch again" in outcome.hint
    ended(tmp_path / "two", r0=KeyboardInterrupt(), r1=ValueError("the reason"))
    assert failures.settle(tmp_path / "two", dead={}, launcher="the launcher was killed").rank == 1


def test_a_client_that_did_not_look_is_told_what_the_launcher_saw(bridge, runs_directory):
    """The ranks are gone for long when the client looks again: that is no time of silence, and the agent knows the code."""
    ended(runs_directory / "late", **LOST)
    patience = supervise._Patience()
    patience._looked -= 2 * supervise.PATIENCE_SECONDS
    assert not patience.ends(runs.Run(runs_directory / "late"))
    patience._gone_since -= 2 * supervise.PATIENCE_SECONDS
    assert patience.ends(runs.Run(runs_directory / "late"))
    reports = iter([{"dead": {"2": 1}, "error": "the launcher was ended by SIGTERM"}])
    gone = SimpleNamespace(ends=lambda run: True)
    fake = SimpleNamespace(wait=lambda _: None, close=lambda: None)
    fake.stop = lambda: setattr(fake, "wait", lambda _: next(reports))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(launch.RunFailed, match="rank 2 exited with code 1"):
        patch.setattr(supervise, "_Patience", lambda: gone)
        supervise.watch(
            runs.Run(runs_directory / "late"), ranks=4, start=lambda *_: fake, view=lambda: None, watch=None
        )


def test_torchruns_report_gives_the_exit_codes(tmp_path):
    """Those of ranks that torchrun ended itself do not count."""
    ended(tmp_path, r0=LOST["r0"])
    report = "W1126 api.py:1] Sending process 11 closing signal SIGTERM\n" + "".join(
        f"[{i}]:\n  time      : now\n  rank      : {i} (local_rank: {i})\n  exitcode  : {code} (pid: {pid})\n"
        for i, (code, pid) in enumerate([(1, 10), (-9, 11), (-9, 12)])
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "launcher.log").write_text(report)
    assert failures.settle(tmp_path).cause.startswith("rank 2 was killed by SIGKILL")


def test_who_sent_sigkill_is_said_as_far_as_it_is_known(tmp_path, monkeypatch):
    """The kernel's log names the process, or the control group counts one, or it is only likely."""
    for name, known, counted, words in (
        ("a", True, False, ", by the kernel for want of memory"),
        ("b", False, True, ", most likely by the kernel"),
        ("c", False, False, ", perhaps by the kernel"),
    ):
        run = ended(tmp_path / name, world=1)
        pids = {run.ranks()[0]["pid"]} if known else set()
        monkeypatch.setattr(failures, "_killed_for_memory", lambda since, pids=pids: pids)
        outcome = failures.settle(run.path, dead={0: -9}, oom_killed=counted)
        assert words in outcome.cause and "fewer ranks" in outcome.hint


@pytest.mark.parametrize(("seconds", "found"), [(-60, set()), (60, {4242})])
def test_the_kernels_log_counts_from_the_runs_start(tmp_path, monkeypatch, seconds, found):
    """A process that was killed for memory before the run began explains nothing of it."""
    log, asked = tmp_path / "kmsg", os.open
    microseconds = int((time.monotonic() + seconds) * 1e6)
    log.write_text(f"3,900,{microseconds},-;Out of memory: Killed process 4242 (python) total-vm:1kB\n")
    monkeypatch.setattr(failures.os, "open", lambda path, flags: asked(log if path == "/dev/kmsg" else path, flags))
    assert failures._killed_for_memory(time.time()) == found


def test_a_save_that_failed_is_told_by_the_rank_that_could_not_write(tmp_path):
    """Core's exception loses the reason, which stands in a log; without one the exception itself is told."""
    lost, full = "CheckpointException", "Local worker 0 encountered an error: [Errno 28] No space left on device"
    for name, said, words in (("a", full, "rank 0 could not write its part"), ("b", "", f"rank 0 raised {lost}")):
        run = ended(tmp_path / name, world=1, r0=type(lost, (RuntimeError,), {})("ranks:[0]"))
        (run.path / "logs").mkdir()
        (run.path / "logs" / "rank_0.log").write_text(said)
        assert failures.settle(run.path, dead={}).cause.startswith(words)


def test_a_provisional_verdict_gives_way_and_another_stands(tmp_path):
    """What a rank wrote is replaced by whoever knows more; the launcher's word is the last."""
    ended(tmp_path, **LOST)
    assert failures.settle(tmp_path, provisional=True).rank == 2, "the one that is gone without a word"
    final = failures.settle(tmp_path, dead={3: -9, 2: 0})
    assert (final.rank, failures.settle(tmp_path), failures.settle(tmp_path, provisional=True)) == (2, final, final)
    failures.abandon(tmp_path)
    assert runs.Run(tmp_path).outcome == final


def test_a_bare_assert_shows_what_it_asserts(tmp_path):
    """An exception without words is told by its place and its statement."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "weights.py").write_text(
        "def check(w):\n    assert all(\n        x > 0 for x in w\n    )\ncheck([-1, 2])\n"
    )
    with pytest.raises(AssertionError) as caught:
        runpy.run_path(str(tmp_path / "weights.py"))
    failures.record(tmp_path, 0, caught.value)
    cause = failures.settle(tmp_path).cause
    assert cause == f"rank 0 raised AssertionError: {tmp_path}/weights.py:2: assert all( x > 0 for x in w )"


def raised(line: str, *files: str) -> str:
    """A traceback through these files that ends in a line `Type: message`."""
    frames = "".join(f'  File "/site-packages/{file}", line 1, in f\n    f()\n' for file in files)
    return f"Traceback (most recent call last):\n{frames}{line}\n"


MAILBOX = next(PROJECT.rglob("course_lib/**/mailbox.py")).relative_to(PROJECT).as_posix()
PEERS = [
    (GLOO, True),
    ("RuntimeError: Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:1] timed out", True),
    ("RuntimeError: [enforce fail at gloo/transport/tcp/pair.cc:442] op.preamble.length <= op.nbytes. 8 vs 4", False),
    ("connection closed: rank 3 is gone", True),
    ("torch.distributed.DistStoreError: wait timeout after 1000ms, keys: /x", True),
    ("torch.distributed.DistNetworkError: failed to listen. code: -98, name: EADDRINUSE, message: address already in use", False),
    (raised("BrokenPipeError: [Errno 32] Broken pipe", "torch/distributed/distributed_c10d.py"), True),
    (raised("BrokenPipeError: [Errno 32] Broken pipe", MAILBOX), True),
    (raised("BrokenPipeError: [Errno 32] Broken pipe", "wandb/sdk/interface/sock.py"), False),
    ("ConnectionRefusedError: [Errno 111] Connection refused", False),
    ("urllib.error.URLError: <urlopen error [Errno 111] Connection refused>", False),
    ("OSError: read error", False),
    ("ValueError: could not restore the shard: I/O operation on closed file", False),
    ("loss is NaN", False),
    (raised("RuntimeError: " + GLOO) + "\nDuring handling of the above exception, another exception occurred:\n\n"
     + raised("KeyError: 'state'"), True),
    (raised("KeyError: 'state'") + "\nDuring handling of the above exception, another exception occurred:\n\n"
     + raised("RuntimeError: " + GLOO), False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "lost"), PEERS)
def test_a_lost_peer_is_told_by_type_and_origin(text, lost):
    """gloo's, NCCL's, the store's and the mailboxes' own words, and connections of torch; not those of other libraries."""
    assert failures.lost_a_peer(text) is lost


CORE, BRIDGE = "/megatron/core/optimizer/optimizer.py", "/megatron/bridge/training/checkpointing.py"
HINTS = [
    ("Shared memory", raised("OSError: [Errno 28] No space left on device", "multiprocessing/synchronize.py"),
     raised("FileNotFoundError: [Errno 2] No such file or directory", "multiprocessing/synchronize.py")),
    ("Shared memory", "RuntimeError: unable to write to file </torch_1_2>: No space left on device (28)",
     "RuntimeError: unable to write to file <notes>: read only"),
    ("Shared memory", "torch.distributed.DistBackendError: Error while creating shared memory segment /dev/shm/nccl-x (size 9)",
     "ValueError: put it into /dev/shm/nccl"),
    ("The disk is full", "OSError: [Errno 28] No space left on device: 'x'", "ValueError: my note says Errno 28"),
    ("Out of memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "KeyError: 'out of memory'"),
    ("Out of memory", "OSError: [Errno 12] Cannot allocate memory", "ValueError: [Errno 12]"),
    ("Out of memory", "RuntimeError: [enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you",
     "RuntimeError: not enough memory of the past"),
    ("Out of memory", "torch.AcceleratorError: CUDA error: out of memory", "ValueError: CUDA error: out of memory"),
    ("Another program took the port", "torch.distributed.DistNetworkError: listen failed. port: 1, name: EADDRINUSE",
     raised("OSError: [Errno 98] Address already in use", "http/server.py")),
    ("The tokenizer was asked", raised("OSError: We couldn't connect to 'https://huggingface.co'", "/core/tokenizers/hf.py"),
     raised("OSError: 'mine' is not a folder", "/core/tokenizers/hf.py")),
    ("The Hub was asked", "huggingface_hub.errors.GatedRepoError: 401", "requests.HTTPError: 401 Client Error"),
    ("The Hub was asked", raised("OSError: We couldn't connect to 'https://huggingface.co'", "/transformers/utils/hub.py"),
     raised("OSError: tracker is in offline mode", "/wandb/run.py")),
    ("dist_ckpt_optim_fully_reshardable", raised("RuntimeError: (TP, PP) mismatch after resume ((1, 1) vs (2, 1))", BRIDGE),
     raised("RuntimeError: (TP, PP) mismatch after resume", "mine.py")),
    ("parameter groups", raised("KeyError: (None, 0.0005, 0.0001, False, True)", CORE), raised("KeyError: (1, True)", "a.py")),
    ("parameter groups", "ValueError: Could not find parameter group with key (None, 0.0005)", "ValueError: no parameter group"),
    ("schedule of cfg", "AssertionError: OptimizerParamScheduler: class input value 24 and checkpointvalue 16 for x do not match",
     "ValueError: OptimizerParamScheduler: class input value"),
    ("is not a number", raised("RuntimeError: Unexpected result nan (message='found NaN in local grad norm for bucket #0')",
                               "/megatron/core/rerun_state_machine.py"),
     raised("RuntimeError: found NaN in local grad norm", "mine.py")),
    ("run_config.yaml", "RuntimeError: Legacy checkpoint missing 'args' field in state_dict", "KeyError: 'args'"),
    ("of another model", "RuntimeError: Error(s) in loading state_dict for GPTModel:\n\tMissing key(s): x",
     "RuntimeError: a loop met a global shape mismatch"),
    ("beyond the model's embedding", raised("IndexError: index out of range in self", "core/tensor_parallel/layers.py"),
     raised("IndexError: index out of range in self", "mine.py")),
    ("A field name in config.yaml", "ConfigError: x does not fit Bridge's ConfigContainer: Unexpected config keys",
     "TypeError: f() got an unexpected keyword argument 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "text", "near_miss"), HINTS)
def test_a_hint_is_tied_to_an_error_and_not_to_a_word(hint, text, near_miss):
    """Each row of the table: an error that it is for, and one that only has its words."""
    assert hint in failures.hint_for(text), text
    assert failures.hint_for(near_miss) == "", near_miss


def test_every_hint_has_its_examples():
    """A hint without a positive and a negative example cannot be added."""
    fitting = [
        row for row in failures._HINTS if any(row.fits(e) for _, text, _ in HINTS for e in failures._exceptions(text))
    ]
    assert len(fitting) == len(failures._HINTS)

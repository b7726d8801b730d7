"""The same Curator stages on Ray, in a process of their own that cannot outlive its deadline, for lesson 18.

`run` starts `python -m course_lib.experiments.executors FOLDER`, watches it, and ends by its id whatever it left behind.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from course_lib.text import curation

if TYPE_CHECKING:
    from nemo_curator.stages.base import ProcessingStage

__all__ = ["EXECUTORS", "IN_PROCESS", "Outcome", "run"]

IN_PROCESS = "none, in one process"
"""No executor and no Ray: `curation.step`, in a process like those of the others."""
EXECUTORS = (IN_PROCESS, "Ray Data", "Ray actor pool", "Xenna, batch", "Xenna, streaming")
CORES = 2
OBJECT_STORE_BYTES = 200 * 2**20
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
PATIENCE_SECONDS = 5.0
"""How long a process that was asked to end may take."""
LISTEN = "dashboard-agent-listen-port"
PREFIX = "lesson18-"
LAST_WORDS = 400
"""Characters of an error that are kept."""


@dataclass(frozen=True)
class Outcome:
    """What became of stages on Ray.

    Attributes:
        status: `"succeeded"`, `"failed"`, or `"too late"` where the deadline ended it.
        why: The last words of an error, else empty.
        start_seconds: From nothing to a Ray that answers; None if it never did, and so on.
        run_seconds: `Pipeline.run`, which ends Ray too.
        processor_seconds: Of all its processes, imports and Ray's own among them, as they were last seen, twice a second.
        peak_bytes: Most memory that all its processes had at one time, shared pages counted once.
        left: Processes that were still there after it and had to be ended.
        alive: Processes that could not be ended.
    """

    executor: str
    status: str
    why: str
    start_seconds: float | None
    run_seconds: float | None
    processor_seconds: float
    peak_bytes: int
    left: int
    alive: int


def run(stages: Sequence[ProcessingStage], executor: str, *, deadline_seconds: float = 60.0) -> Outcome:
    """Run stages by one of Curator's executors on a Ray of its own; nothing of it is left when this returns or is interrupted.

    Args:
        stages: What `Pipeline` takes.
        executor: One of `EXECUTORS`.
        deadline_seconds: After so long everything is ended and the outcome is `"too late"`.

    Raises:
        ValueError: If there is no such executor.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r}: there are {', '.join(EXECUTORS)}")
    import cloudpickle

    with tempfile.TemporaryDirectory(prefix=PREFIX, dir="/tmp") as folder:  # its sockets' paths hold 107 bytes
        job = Path(folder, "job")
        job.write_bytes(cloudpickle.dumps((list(stages), executor)))
        found = Path(folder, "found.json")
        with Path(folder, "log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(job)],
                env=os.environ | ENVIRONMENT | {"RAY_TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            family = _Family(child.pid, folder)
            try:
                late = not family.watch(child, deadline_seconds)
            finally:
                left, alive = family.end()
                child.wait()
        known = json.loads(found.read_text()) if found.exists() else {}
        status = "too late" if late else "succeeded" if child.returncode == 0 else "failed"
        why = known.pop("why", "") or ("" if status == "succeeded" else _last_words(Path(folder, "log")))
        blank = {"start_seconds": None, "run_seconds": None}
        used = {"processor_seconds": round(family.processor_seconds, 1), "peak_bytes": family.peak_bytes}
        return Outcome(executor, status, why, **(blank | known | used), left=left, alive=alive)


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-LAST_WORDS:] if lines else ""


class _Family:
    """A process and everything that came of it, also what was given to another parent meanwhile."""

    def __init__(self, pid: int, folder: str) -> None:
        self._head, self._folder = psutil.Process(pid), folder
        self._seen = {self._head}
        self._seconds: dict[psutil.Process, float] = {}
        self.peak_bytes = 0

    @property
    def processor_seconds(self) -> float:
        """What all its processes had used when each was last seen."""
        return sum(self._seconds.values())

    def watch(self, child: subprocess.Popen, deadline_seconds: float) -> bool:
        """Wait for its end and count memory and processor time; False if the deadline came first."""
        until = time.monotonic() + deadline_seconds
        while time.monotonic() < until:
            living = self._living()
            self._seconds |= {one: _processor_seconds(one) or self._seconds.get(one, 0.0) for one in living}
            self.peak_bytes = max(self.peak_bytes, sum(map(_memory_bytes, living)))
            with suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
                return True
        return False

    def end(self) -> tuple[int, int]:
        """End what is left, politely first; returns how many others than the head there were, and how many there still are."""
        living = self._living()
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, stubborn = psutil.wait_procs(living, PATIENCE_SECONDS)
        stubborn = {*stubborn, *self._living()}
        for process in stubborn:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(stubborn, PATIENCE_SECONDS)
        return len(set(living) - {self._head}), len(self._living())

    def _living(self) -> list[psutil.Process]:
        for process in list(self._seen):
            with suppress(psutil.NoSuchProcess):
                self._seen.update(process.children(recursive=True))
        self._seen |= {one for one in psutil.process_iter() if self._folder in " ".join(_command(one))}
        return [one for one in self._seen if _runs(one)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _memory_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _processor_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _executor(name: str) -> Any:
    if name.startswith("Xenna"):
        from nemo_curator.backends.xenna import XennaExecutor

        return XennaExecutor({"execution_mode": name.removeprefix("Xenna, "), "logging_interval": 5})
    if name == "Ray Data":
        from nemo_curator.backends.ray_data import RayDataExecutor

        return RayDataExecutor()
    from nemo_curator.backends.ray_actor_pool import RayActorPoolExecutor

    return RayActorPoolExecutor(show_progress=False)


def _work(job: Path) -> None:
    """In the child: run the stages by what they are to be run by, and write down what is known even of a failure."""
    stages, name = pickle.loads(job.read_bytes())
    found: dict[str, Any] = {}
    try:
        with nullcontext() if name == IN_PROCESS else _ray(job.parent, found, dashboard=name == "Xenna, batch"):
            begin = time.perf_counter()
            _step(stages, name)
            found["run_seconds"] = round(time.perf_counter() - begin, 1)
    except Exception as error:
        found["why"] = str(error)[-LAST_WORDS:]
        raise
    finally:
        job.with_name("found.json").write_text(json.dumps(found))


def _step(stages: Sequence[ProcessingStage], name: str) -> None:
    if name == IN_PROCESS:
        curation.step(stages)
        return
    from nemo_curator.pipeline import Pipeline

    Pipeline(name="lesson", stages=stages).run(_executor(name))


@contextmanager
def _ray(folder: Path, found: dict[str, Any], *, dashboard: bool) -> Iterator[None]:
    """A Ray that answers, ended afterwards, and with whoever started this process."""
    begin = time.perf_counter()
    head = _start_head(folder, dashboard=dashboard)
    threading.Thread(target=_end_with_parent, args=(head, os.getppid()), daemon=True).start()
    try:
        _connect(head)
        found["start_seconds"] = round(time.perf_counter() - begin, 1)
        yield
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(PATIENCE_SECONDS)


def _start_head(folder: Path, *, dashboard: bool) -> subprocess.Popen:
    """Ray's head with no more helpers than these stages need: each is a Python that imports for seconds.

    Its ports are chosen here: else it waits 15 s for a slow helper to choose them, and ends itself.

    Args:
        dashboard: Whether to start the dashboard's server too, which Xenna's batch mode asks for its actors.

    Source: ray 2.60.0, `scripts/scripts.py`, and raylet `NodeManager::WaitForDashboardAgentPorts`.
    """
    options = ["port", "dashboard-port", LISTEN, "dashboard-agent-grpc-port"]
    options += ["runtime-env-agent-port", "metrics-export-port", "ray-client-server-port"]
    ports = _free_ports(len(options))
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{ports[0]}"
    # the command stands beside this Python, whose folder may not be on PATH
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--{option}={port}" for option, port in zip(options, ports, strict=True)]
    command += [f"--num-cpus={CORES}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--temp-dir={folder}", f"--include-dashboard={dashboard}", "--include-log-monitor=false"]
    command += ["--no-monitor"]  # which is the autoscaler's
    head = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    listen = ports[options.index(LISTEN)]
    threading.Thread(target=_announce, args=(head, folder, listen), daemon=True).start()
    return head


def _announce(head: subprocess.Popen, folder: Path, port: int) -> None:
    """Write down the one chosen port that `ray start` tells the helper, and not the raylet that waits for it."""
    while head.poll() is None:
        with suppress(psutil.Error, StopIteration):
            words = (word for one in psutil.Process(head.pid).children(recursive=True) for word in one.cmdline())
            node = next(word for word in words if word.startswith("--node-id=")).removeprefix("--node-id=")
            name = f"{LISTEN.replace('-', '_')}_{node}"
            (folder / "session_latest" / name).write_text(str(port))
            return
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _connect(head: subprocess.Popen) -> None:
    """Wait until Ray answers and has its cores; whoever started this process has the deadline.

    `ray.init` is not asked before somebody listens: it then waits for half a minute, even for a Ray that has ended.
    """
    import ray

    host, port = os.environ["RAY_ADDRESS"].split(":")
    while True:
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended with exit code {head.returncode} before it answered")
        with suppress(ConnectionError, RuntimeError, ValueError):
            socket.create_connection((host, int(port)), timeout=1.0).close()
            ray.init(log_to_driver=False)
            if ray.cluster_resources().get("CPU", 0) >= CORES:
                return
            ray.shutdown()
        time.sleep(0.5)


def _end_with_parent(head: subprocess.Popen, parent: int) -> None:
    """Where the process that watches this one was killed, nobody else would end Ray."""
    while os.getppid() == parent:
        time.sleep(1.0)
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(PATIENCE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))

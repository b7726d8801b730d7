"""Start a run by torchrun: the command, the environment, the process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from course_lib import runs, stack
from course_lib.common.project import PROJECT
from course_lib.machine import readings
from course_lib.ranks import train
from course_lib.runs import failures

__all__ = ["Started", "command", "kill", "settings", "start", "start_process"]


ONE_NODE = ("--standalone", "--local-addr", "localhost")
"""How the ranks of one node meet.  torchrun alone would ask for the host's name, which need not resolve in a container."""


def command(run: runs.Run | Path, *, ranks: int = stack.LESSON_RANKS, meet: Sequence[str] = ONE_NODE) -> list[str]:
    """The command that starts the same run by hand, here or on a GPU node.

    Args:
        run: A prepared run, or its directory.
        ranks: Ranks of this node.
        meet: How the nodes find each other; by default there is one.

    Example:
        >>> " ".join(command(Path("runs/smoke"), ranks=8)[6:])
        '--nproc-per-node 8 -m course_lib.ranks.train runs/smoke/config.yaml'
    """
    path = run.path if isinstance(run, runs.Run) else Path(run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "course_lib.ranks.train", str(path / "config.yaml")]


def settings(run: runs.Run) -> dict[str, str]:
    """The environment variables that a rank needs and a fresh shell does not have; none of them is a secret.

    Args:
        run: A prepared run; its device decides.
    """
    found = {"PYTHONPATH": os.pathsep.join(dict.fromkeys((str(PROJECT), *_own_places())))}
    if run.launch["device"] == "cpu":
        found |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return found | train.confirmation(run.launch)


def _own_places() -> list[str]:
    """Folders from which this process imports beside its installation: a target may stand in one of them."""
    installation = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [Path(entry).absolute() for entry in sys.path]
    return [str(f) for f in folders if f.is_dir() and not any(f.is_relative_to(place) for place in installation)]


def start_process(run: runs.Run, words: list[str]) -> subprocess.Popen:
    """Start a launcher's command in a session of its own; what it writes goes to the run's `logs/launcher.log`.

    All of it happens on this machine, so gloo, which Bridge uses beside NCCL, takes the loopback where the host's name
    does not resolve.
    """
    unwanted = {"PYTHONDONTWRITEBYTECODE"}
    if run.launch["device"] == "cuda":
        unwanted.add("TORCHDYNAMO_DISABLE")  # prepare_imports() sets it in a kernel; GPU ranks train with the compiler
    environment = {k: v for k, v in os.environ.items() if k not in unwanted} | settings(run)
    if readings.gloo(environment=environment).status != "ok":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment["COURSE_STARTER_PID"] = str(os.getpid())
    with open(run.path / "logs" / "launcher.log", "a") as log:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def start(run: runs.Run, ranks: int) -> Started:
    """Start the run on one node, and return at once."""
    return Started(start_process(run, command(run, ranks=ranks)))


class Started:
    """A torchrun process, with the same three methods as a warm launch."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def wait(self, seconds: float) -> dict | None:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        # How the ranks ended, torchrun writes into its log.
        return (
            {} if code >= 0 else {"error": f"the launcher was killed: torchrun ended by {failures.signal_name(code)}"}
        )

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def close(self) -> None:
        kill(self._process)


def kill(launcher: subprocess.Popen) -> None:
    """End a torchrun that is still there, with its ranks, which have sessions of their own."""
    import psutil

    if launcher.poll() is None:
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        for process in (launcher, *ranks):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                process.kill()
        launcher.wait()

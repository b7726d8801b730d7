"""Start a run by torchrun: the command, the environment, the process."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from course_lib import runs, stack
from course_lib.common.project import PROJECT
from course_lib.ranks import train
from course_lib.runs import failures, foreign_code

ONE_NODE = ("--standalone", "--local-addr", "localhost")
"""How the ranks of one node meet.  torchrun alone would ask for the host's name, which need not resolve in a container."""


def command(run: runs.Run | Path, *, ranks: int = stack.LESSON_RANKS, meet: Sequence[str] = ONE_NODE) -> list[str]:
    """The command that starts the same run by hand, here or on a GPU node.

    Args:
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
        # as many as a warm launch gives a rank: the last digits depend on it
        threads = str(run.launch.get("threads") or 1)
        found |= {"OMP_NUM_THREADS": threads, "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return found | train.confirmation(run.launch) | foreign_code.permission()


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
    try:
        gloo_address(environment=environment)
    except OSError:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment["COURSE_STARTER_PID"] = str(os.getpid())
    environment.setdefault("PET_LOG_DIR", os.devnull)  # else torchrun leaves folders in the temporary directory
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


def gloo_address(
    *,
    environment: Mapping[str, str] = os.environ,
    hostname: str | None = None,
    talk: Callable[[str], None] | None = None,
    seconds: float = 1.0,
) -> str:
    """The address where gloo will bind: that of GLOO_SOCKET_IFNAME, else of the host's name.

    Args:
        hostname: The host's name; asked from the system if None.
        talk: Passes a byte over an address; `talk_over` if None.

    Raises:
        OSError: It cannot bind there; gloo then takes loopback, with a warning.

    Source: PyTorch torch/csrc/distributed/c10d/ProcessGroupGloo.cpp createDefaultDevice @ 2.13.0
    """
    interface = environment.get("GLOO_SOCKET_IFNAME")
    address = _address_on(interface) if interface else address_of(hostname or socket.gethostname(), seconds)
    (talk or talk_over)(address)
    return address


def talk_over(address: str) -> None:
    """Bind, connect and pass one byte over an address of this machine, as gloo's ranks will.

    Raises:
        OSError: That does not work.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        server.settimeout(1)
        with socket.create_connection(server.getsockname()[:2], timeout=1) as client:
            peer, _ = server.accept()
            with peer:
                client.sendall(b"x")
                if peer.recv(1) != b"x":
                    raise OSError(f"{address} lost a byte")


def _address_on(interfaces: str) -> str:
    """The first IPv4 address of the named interfaces; OSError if there is none."""
    import psutil

    known = psutil.net_if_addrs()
    addresses = [entry for name in interfaces.split(",") for entry in known.get(name, ())]
    for entry in addresses:
        if entry.family == socket.AF_INET:
            return entry.address
    raise OSError(f"no such interface with an IPv4 address; there are {', '.join(sorted(known))}")


def address_of(name: str, seconds: float) -> str:
    """The address that a host name resolves to; OSError if there is none, or no answer in time."""
    answers: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:
            answers.put(OSError(str(error)))

    threading.Thread(target=ask, daemon=True).start()  # a look-up cannot be given a time limit
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(answer, OSError):
        raise answer
    return answer

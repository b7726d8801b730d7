"""A warm launcher: ranks start in a fraction of a second because somebody imported the stack before.

Who is who, all of them ordinary processes of the learner:

    notebook kernel, pytest, ...      clients; each holds one connection, its lease
      └─ server                       one per user and course version; imports nothing heavy; ends with its last lease
           └─ fork server             Python's own (multiprocessing.forkserver); imported the stack once
                ├─ agent              one per launch: torch.distributed.launcher's elastic_launch
                └─ ranks 0..N-1       forks of the fork server, asked for by the agent

Every link notices when the next one up goes away, so nothing outlives the learner: a client that dies drops its lease,
the server stops that client's agents, an agent stops its ranks, a rank whose agent is gone ends itself.  This module is
the client; `warm_server` is the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path

from course_lib.common.project import LIBRARY, PROJECT, untested_allowed
from course_lib.ranks.server import WarmError
from course_lib.ranks.train import AUTOMODEL, MEGATRON

START_SECONDS = 60.0
"""How long a server may take to listen: it imports little, but this machine may be busy."""


SOCKET_PATH_BYTES = 107
"""How long the path of a socket may be; a temporary directory of a batch system is sometimes longer.

Source: Linux `unix(7)`, `sun_path`
"""


PRELOADS = {MEGATRON: "course_lib.ranks.preload", AUTOMODEL: "course_lib.ranks.preload_automodel"}
"""What a fork server imports for its ranks: one process cannot hold both, since AutoModel takes the stand-ins of the one for
Transformer Engine itself."""


RANK_ROOMS = ("common", "stack", "runs", "planning/layout", "ranks")
"""Rooms of which a rank imports modules: when one of them changes, a running server is out of date and a new one starts."""


def rank_code(course_lib: Path = LIBRARY) -> list[Path]:
    """The files of this project that a rank executes, in a fixed order."""
    return sorted(file for room in RANK_ROOMS for file in (course_lib / room).rglob("*.py"))


class Server:
    """A connection to the server; while it is open, the server lives."""

    def __init__(self, path: Path, connection: Connection) -> None:
        self.path = path
        self._connection = connection

    def launch(
        self, target: str, argument: str, *, ranks: int, log: Path, env: dict[str, str], prepare: str | None = None
    ) -> Launch:
        """Start `target(argument)` in so many ranks, without waiting for them.

        Args:
            target: A function as `module:name`, importable, taking one string.
            prepare: A function that is called once with the string, before the ranks start; what it returns is each
                rank's second argument.  If it raises, that is `None`, and the ranks meet the error themselves.
        """
        request = {
            "target": target,
            "prepare": prepare,
            "argument": argument,
            "ranks": ranks,
            "log": str(log),
            "env": env,
            "cwd": os.getcwd(),
            "path": [os.path.abspath(entry) for entry in sys.path],
        }
        job = _try(self.path)
        if job is None:
            raise WarmError(f"the warm launcher is gone; see {self.path.with_suffix('.log')}, then run the cell again")
        job.send(request)
        return Launch(job)

    def survive_exec(self) -> None:
        """Let the lease live on in the program that replaces this one by `exec`; its own children do not get it."""
        os.set_inheritable(self._connection.fileno(), True)

    def close(self) -> None:
        """End the lease."""
        self._connection.close()


class Launch:
    """One launch under way.  Its connection is its life: closing it stops the agent and its ranks."""

    def __init__(self, job: Connection) -> None:
        self._job = job

    def wait(self, seconds: float) -> dict | None:
        """What the agent reported at its end, or `None` if it still runs after so many seconds."""
        try:
            return self._job.recv() if self._job.poll(max(seconds, 0.0)) else None
        except (OSError, EOFError):
            return {"error": "the launcher was killed: its server, which all notebooks share, is gone"}

    def wait_for(self, seconds: float) -> dict:
        """Wait for the end, at most so many seconds.

        Raises:
            TimeoutError: If the launch still runs; it goes on until `stop()` or `close()`.
        """
        end = time.monotonic() + seconds
        while (report := self.wait(end - time.monotonic())) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"the launch still ran after {seconds:.0f} s")
        return report

    def stop(self) -> None:
        """Ask for the end of all ranks; `wait()` says when they are gone."""
        with contextlib.suppress(OSError):
            self._job.send("stop")

    def close(self) -> None:
        """Let go; what still runs is stopped."""
        self._job.close()


def address(imports: str = MEGATRON) -> Path:
    """The server's socket: one per user, Python environment, kind of ranks and state of the code that they run."""
    marks = [sys.prefix, str(untested_allowed()), imports]
    marks += [f"{p}:{p.stat().st_mtime_ns}:{p.stat().st_size}" for p in rank_code()]
    key = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
    home = Path(tempfile.gettempdir()) / f"course-{os.getuid()}"
    longest = home / "pymp-12345678" / "listener-12345678"  # what Python's fork server makes there, in the server
    if len(os.fsencode(longest)) > SOCKET_PATH_BYTES:
        home = Path("/tmp") / home.name
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise WarmError(f"{home} belongs to another user; remove it or set TMPDIR to a directory of your own")
    return home / f"{key}.socket"


@functools.lru_cache(maxsize=2)
def _lease_of(process: int, path: Path, imports: str) -> Server:
    return _connect(path, imports)


def lease(imports: str = MEGATRON) -> Server:
    """This process's lease: the first call starts the server if there is none, and returns at once.

    The server imports the stack in the background; a launch waits for that.

    Args:
        imports: What its ranks are imported with, a key of `PRELOADS`.

    Raises:
        WarmError: If the server does not come up; its log is named.
    """
    path = address(imports)
    found = _lease_of(os.getpid(), path, imports)
    if _alive(path):
        return found
    _lease_of.cache_clear()  # the server was killed; that of other imports is asked for again
    return _lease_of(os.getpid(), path, imports)


def _alive(path: Path) -> bool:
    connection = _try(path)
    if connection is not None:
        connection.close()
    return connection is not None


def _connect(path: Path, imports: str) -> Server:
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two notebooks that start at once share one server
        connection = _try(path)
        if connection is None:
            server = _start_server(path, PRELOADS[imports])
            end = time.monotonic() + START_SECONDS
            while (connection := _try(path)) is None:
                if server.poll() is not None or time.monotonic() > end:
                    raise WarmError(f"the warm launcher did not start; see {path.with_suffix('.log')}")
                time.sleep(0.02)
    connection.send(None)  # no request: a lease
    return Server(path, connection)


def _try(path: Path) -> Connection | None:
    with contextlib.suppress(OSError):
        return Client(str(path), "AF_UNIX")
    return None


def _start_server(path: Path, preload: str) -> subprocess.Popen:
    path.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits for another must not keep the core it waits for
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(PROJECT), os.environ.get("PYTHONPATH")) if p)
    with open(path.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            # -c, not -m: the children of a fork server re-import a main module that has a name
            [
                sys.executable,
                "-c",
                "import sys; from course_lib.ranks import server; server.serve(*sys.argv[1:])",
                str(path),
                preload,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd="/",
            start_new_session=True,  # the learner's Ctrl-C is not for the server
        )

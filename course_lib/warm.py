"""A warm launcher: ranks start in a fraction of a second because somebody imported the stack before.

Who is who, all of them ordinary processes of the learner:

    notebook kernel, pytest, ...      clients; each holds one connection, its lease
      └─ server                       one per user and course version; imports nothing heavy; ends with its last lease
           └─ fork server             Python's own (multiprocessing.forkserver); imported the stack once
                ├─ agent              one per launch: torch.distributed.launcher's elastic_launch
                └─ ranks 0..N-1       forks of the fork server, asked for by the agent

Every link notices when the next one up goes away, so nothing outlives the learner: a client that dies drops its lease,
the server stops that client's agents, an agent stops its ranks, a rank whose agent is gone ends itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Launched", "Lease", "WarmError", "call", "lease"]

LINGER_SECONDS = 20.0
"""How long the server waits for a new lease after the last one ended: a restarted kernel finds it warm."""


class WarmError(RuntimeError):
    """The warm launcher could not be reached or started."""


RANK_CODE = (
    "cpu/*.py",
    *(
        f"{name}.py"
        for name in "devices failures imports layout* memory_meter preload runs stack train units warm".split()
    ),
)
"""Files whose change makes a running server out of date: a new one is started then."""

# ---------------------------------------------------------------------------------------------------------------- client


class Lease:
    """A connection to the server; while it is open, the server lives."""

    def __init__(self, path: Path, connection: socket.socket) -> None:
        self.path = path
        self._connection = connection

    def launch(
        self, target: str, argument: str, *, ranks: int, log: Path, env: dict[str, str], prepare: str | None = None
    ) -> Launched:
        """Start `target(argument)` in so many ranks, without waiting for them.

        Args:
            target: A function as `module:name`, importable, taking one string.
            argument: The string.
            ranks: Number of ranks on this machine.
            log: File for what the agent writes.
            env: Environment variables to set in the ranks.
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
        job.sendall((json.dumps(request) + "\n").encode())
        return Launched(job)

    def keep_when_replaced(self) -> None:
        """Let the lease live on in the program that replaces this one by `exec`; its own children do not get it."""
        self._connection.set_inheritable(True)

    def close(self) -> None:
        """End the lease."""
        self._connection.close()


class Launched:
    """One launch under way.  Its connection is its life: closing it stops the agent and its ranks."""

    def __init__(self, job: socket.socket) -> None:
        self._job = job
        self._text = b""

    def wait(self, seconds: float) -> dict | None:
        """What the agent reported at its end, or `None` if it still runs after so many seconds."""
        self._job.settimeout(max(seconds, 1e-3))
        try:
            part = self._job.recv(65536)
        except (TimeoutError, BlockingIOError):
            return None
        except OSError:
            part = b""
        self._text += part
        if part and not self._text.endswith(b"\n"):
            return None
        try:
            return json.loads(self._text)
        except ValueError:
            return {"error": "the warm launcher went away"}

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
            self._job.sendall(b"stop\n")

    def close(self) -> None:
        """Let go; what still runs is stopped."""
        self._job.close()


def address() -> Path:
    """The server's socket: one per user, Python environment and state of the code that ranks run."""
    here = Path(__file__).parent
    sources = sorted(p for pattern in RANK_CODE for p in here.glob(pattern))
    marks = [sys.prefix, os.environ.get("COURSE_ALLOW_UNTESTED", "")]
    marks += [f"{p}:{p.stat().st_mtime_ns}:{p.stat().st_size}" for p in sources]
    key = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
    home = Path(tempfile.gettempdir()) / f"course-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise WarmError(f"{home} belongs to another user; remove it or set TMPDIR to a directory of your own")
    return home / f"{key}.socket"


@functools.lru_cache(maxsize=1)
def _lease_of(process: int, path: Path) -> Lease:
    return _connect(path)


def lease() -> Lease:
    """This process's lease: the first call starts the server if there is none, and returns at once.

    The server imports the stack in the background; a launch waits for that.

    Raises:
        WarmError: If the server does not come up; its log is named.
    """
    path = address()
    found = _lease_of(os.getpid(), path)
    if _alive(path):
        return found
    _lease_of.cache_clear()  # the server was killed
    return _lease_of(os.getpid(), path)


def call(target: str, argument: str, *, ranks: int, log: Path, threads: int = 1, limit_seconds: float = 300.0) -> dict:
    """Run `target(argument)` in so many ranks and wait for their end.

    Args:
        target: A function as `module:name`, taking one string.
        argument: The string.
        ranks: Number of ranks.
        log: File for what the agent and the ranks write.
        threads: Threads of each rank's matrix products.
        limit_seconds: Stop the ranks after so long.

    Returns:
        The agent's report; a caller judges the result by what the target left behind.

    Raises:
        TimeoutError: If the ranks still ran at the limit; they are stopped.
    """
    launched = lease().launch(target, argument, ranks=ranks, log=log, env={"OMP_NUM_THREADS": str(threads)})
    try:
        return launched.wait_for(limit_seconds)
    finally:
        launched.close()


def _alive(path: Path) -> bool:
    connection = _try(path)
    if connection is not None:
        connection.close()
    return connection is not None


def _connect(path: Path) -> Lease:
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two notebooks that start at once share one server
        connection = _try(path)
        if connection is None:
            _start_server(path)
            end = time.monotonic() + 15
            while (connection := _try(path)) is None:
                if time.monotonic() > end:
                    raise WarmError(f"the warm launcher did not start within 15 s; see {path.with_suffix('.log')}")
                time.sleep(0.02)
    connection.sendall(b'{"lease": true}\n')
    return Lease(path, connection)


def _try(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
        return connection
    except OSError:
        connection.close()
        return None


def _start_server(path: Path) -> None:
    path.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    with open(path.with_suffix(".log"), "w") as log:
        subprocess.Popen(
            # -c, not -m: the children of a fork server re-import a main module that has a name
            [sys.executable, "-c", "import sys; from course_lib import warm; warm.serve(sys.argv[1])", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd="/",
            start_new_session=True,  # the learner's Ctrl-C is not for the server
        )


# ---------------------------------------------------------------------------------------------------------------- server


def serve(path: str) -> None:
    """The server's main loop; returns when the last lease has ended and nobody came back."""
    import multiprocessing
    from multiprocessing import forkserver

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(64)
    listener.settimeout(1.0)
    multiprocessing.set_forkserver_preload(["course_lib.preload"])
    forkserver.ensure_running()  # imports begin now, in the fork server; this process stays light
    open_connections: set[socket.socket] = set()
    idle_since = time.monotonic()
    try:
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                idle_since = time.monotonic() if open_connections else idle_since
                if time.monotonic() - idle_since > LINGER_SECONDS:
                    return
                continue
            open_connections.add(connection)
            threading.Thread(target=_serve_one, args=(connection, open_connections.discard), daemon=True).start()
    finally:
        Path(path).unlink(missing_ok=True)


def _serve_one(connection: socket.socket, finished: Callable[[socket.socket], None]) -> None:
    """Serve one connection: a lease lasts until its end; a request becomes an agent that the connection controls."""
    try:
        with connection, connection.makefile("r", encoding="utf-8") as lines:
            request = json.loads(lines.readline() or "{}")
            if "target" not in request:
                lines.readline()  # a lease: returns when the client goes away
                return
            connection.sendall((json.dumps(_supervise(request, connection, lines)) + "\n").encode())
    except (OSError, ValueError):
        pass
    finally:
        finished(connection)


def _supervise(request: dict, connection: socket.socket, lines: object) -> dict:
    """Start an agent and wait for its end, or for the client's word or disappearance."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    agent = context.Process(target=_agent, args=(request, writer), daemon=False)
    agent.start()
    writer.close()
    ended = threading.Event()

    def watch_client() -> None:
        lines.readline()  # "stop", or the end of the connection
        if not ended.is_set() and agent.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGTERM)

    threading.Thread(target=watch_client, daemon=True).start()
    try:
        report = reader.recv()
    except EOFError:
        report = {"error": "the launch's agent process died"}
    agent.join(timeout=10)
    if agent.is_alive():
        agent.kill()
        agent.join()
    ended.set()
    return report


# ----------------------------------------------------------------------------------------------------- agent and ranks


def _agent(request: dict, writer: object) -> None:
    """One launch: torch's elastic launcher on top of the fork server that this process came from."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _end_with_parent()
    _use_the_fork_server_of_my_parent()
    _do_not_stagger_the_only_node()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    sys.path.extend(entry for entry in request["path"] if entry not in sys.path)
    if request["prepare"]:
        with contextlib.suppress(Exception):  # the ranks will meet the error, and say which rank they are
            request["prepared"] = _function(request["prepare"])(request["argument"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request["ranks"],
        run_id=f"course-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port each time
        local_addr="localhost",
        start_method="forkserver",
        max_restarts=0,
        monitor_interval=0.02,
    )
    report: dict = {"dead": {}}
    try:
        elastic_launch(config, rank_process)(request)
    except ChildFailedError as failed:
        report["dead"] = {rank: failure.exitcode for rank, failure in failed.failures.items()}
    except SignalException:
        report["stopped"] = True
    except BaseException as error:  # whatever it is, the client must hear of it
        import traceback

        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        report["error"] = f"the launcher failed: {type(error).__name__}: {error} (in {place.filename}, {place.name})"
    writer.send(report)
    writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and taking the imported stack apart would take longer than a step


def _function(name: str) -> Callable:
    """The function of `module:name`."""
    import importlib

    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _use_the_fork_server_of_my_parent() -> None:
    """Let this process ask for forks of the process that it was forked from.

    Python would start another, cold fork server: it knows the address of the old one, but checks that the server is its
    own child, which it is not.
    """
    from multiprocessing import forkserver

    if not forkserver._forkserver._forkserver_address:
        raise WarmError("this Python's multiprocessing.forkserver keeps its address elsewhere; use launcher='torchrun'")
    forkserver._forkserver.ensure_running = lambda: None


def _do_not_stagger_the_only_node() -> None:
    """Leave out the random wait, up to 0.3 s, that keeps many nodes from asking the rendezvous at once."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    delay = dynamic_rendezvous._delay
    dynamic_rendezvous._delay = lambda seconds: None if isinstance(seconds, tuple) else delay(seconds)


def rank_process(request: dict) -> None:
    """What a rank does first: a session of its own, the client's environment, then the target."""
    import gc

    from course_lib.cpu import cores

    os.setsid()
    cores.share(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    _end_with_parent()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path.extend(entry for entry in request["path"] if entry not in sys.path)
    gc.freeze()
    arguments = (request["argument"], request.get("prepared")) if request["prepare"] else (request["argument"],)
    _function(request["target"])(*arguments)


def _end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that happened."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()

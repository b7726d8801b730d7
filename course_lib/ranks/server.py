"""The warm launcher's other side: the server, the agent of one launch, and what a forked rank does first.

Who is who stands in `course_lib.launch.forkserver`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.runs import failures
from course_lib.stack import patches
from course_lib.stack.patches import Patches

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, RunProcsResult

LINGER_SECONDS = 20.0
"""How long the server waits for a new lease after the last one ended: a restarted kernel finds it warm."""

LOOK_SECONDS = 1.0
"""How long an agent sleeps at most; a rank that has returned or ended wakes it."""

TORCH_PATIENCE_SECONDS = 25.0
"""A rank that does not end on SIGTERM gets SIGKILL from torch; a bit less than its 30 s."""


class WarmError(RuntimeError):
    """The warm launcher could not be reached or started."""


def serve(path: str, preload: str) -> None:
    """The server's main loop; returns when the last lease has ended and nobody came back.

    Args:
        preload: The module that the fork server imports.
    """
    import multiprocessing
    import tempfile
    from multiprocessing import forkserver

    tempfile.tempdir = str(Path(path).parent)  # short enough for the fork server's socket, too
    served: set[Connection] = set()
    with (
        contextlib.suppress(FileNotFoundError),
        Listener(path, "AF_UNIX", backlog=64) as listener,
    ):  # it may be unlinked
        os.chmod(path, 0o600)
        multiprocessing.set_forkserver_preload([preload])
        forkserver.ensure_running()  # imports begin now, in the fork server; this process stays light
        accepting = threading.Thread(target=_accept, args=(listener, served), daemon=True)
        accepting.start()
        idle_since = time.monotonic()
        while accepting.is_alive() and time.monotonic() - idle_since < LINGER_SECONDS:
            time.sleep(1.0)
            idle_since = time.monotonic() if served else idle_since


def _accept(listener: Listener, served: set[Connection]) -> None:
    while True:
        connection = listener.accept()
        served.add(connection)
        threading.Thread(target=_serve_one, args=(connection, served), daemon=True).start()


def _serve_one(connection: Connection, served: set[Connection]) -> None:
    """Serve one connection: a lease lasts until its end; a request becomes an agent that the connection controls."""
    with contextlib.suppress(OSError, EOFError), connection:
        request = connection.recv()
        connection.send(_supervise(request, connection)) if request else connection.recv()
    served.discard(connection)


def _supervise(request: dict, client: Connection) -> dict:
    """Start an agent and wait for its end, which the client's word or disappearance brings."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    agent = context.Process(target=_agent, args=(request, writer), daemon=False)
    agent.start()
    writer.close()
    report, abandoned, talking = None, False, [reader, client]
    while reader not in wait(talking):
        talking.remove(client)
        try:
            client.recv()
        except (OSError, EOFError):
            abandoned = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent.pid, signal.SIGTERM)
    with contextlib.suppress(EOFError):
        report = reader.recv()
    agent.join(timeout=10)
    if agent.is_alive():
        agent.kill()
        agent.join()
    if abandoned:
        failures.abandon(Path(request["argument"]))
    if report is None:
        by = f" by {failures.signal_name(agent.exitcode)}" if agent.exitcode < 0 else ""
        report = {"error": f"the launcher was killed{by}: its agent, which watches the ranks of this run, is gone"}
    return report


def _agent(request: dict, writer: object) -> None:
    """One launch: torch's elastic launcher on top of the fork server that this process came from."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from course_lib.ranks.cpu import host

    host.end_with_parent()
    exits = _Exits()
    patches.apply(_changes_to_the_launcher(exits))
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    sys.path.extend(entry for entry in request["path"] if entry not in sys.path)
    os.environ.update(request["env"])
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
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else each launch leaves folders in the temporary directory
    )
    report: dict = {"dead": {}}
    fork_server = os.getppid()
    try:
        elastic_launch(config, rank_process)(request)
    except ChildFailedError:
        report["dead"] = exits.codes()
        if os.getppid() != fork_server:  # whose children the ranks are: it alone could have told how they ended
            report = {"error": "the launcher was killed: the fork server, the parent of all ranks, is gone"}
    except SignalException as asked:
        report = {"dead": exits.seen, "error": f"the launcher was ended by {asked.sigval.name}"}
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


class _Exits:
    """How the ranks ended: what this process saw before it ended others, and what it cannot have done to them.

    torch's context looks at its processes in turn and calls the first dead one the cause; when a busy machine let
    several die between two looks, that is the one with the lowest number.  It also takes exit code 0 for success, and
    waits forever for a rank that left without an error.

    Source: torch/multiprocessing/spawn.py, torch/distributed/elastic/multiprocessing/api.py @ 2.13.0
    """

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self._processes: list = []
        self._ending_since = float("inf")

    def look(self, poll: Callable, context: MultiprocessContext, /) -> RunProcsResult | None:
        """Wait until a rank has returned or ended, and note who has ended before torch's own look ends the others.

        A rank that has returned lives on until all others have, too, and torch has read what each returned.
        """
        from torch.distributed.elastic.multiprocessing.api import RunProcsResult
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

        self._processes, returned = context._pc.processes, context._return_values
        unread = [queue._reader for rank, queue in context._ret_vals.items() if rank not in returned]
        wait([*context._pc.sentinels, *unread], LOOK_SECONDS)
        if not wait(context._pc.sentinels, 0):
            return poll(context)
        self.seen |= {rank: p.exitcode for rank, p in enumerate(self._processes) if p.exitcode is not None}
        self._ending_since = time.monotonic()
        left = [rank for rank, code in self.seen.items() if code == 0 and rank not in returned]
        left = [rank for rank in left if context._ret_vals[rank].empty()]
        if not left or any(self.seen.values()):
            return poll(context)
        context.close()
        failure = ProcessFailure(left[0], self._processes[left[0]].pid, 0, context.error_files[left[0]])
        return RunProcsResult(failures={left[0]: failure}, stdouts=context.stdouts, stderrs=context.stderrs)

    def codes(self) -> dict[int, int]:
        """Exit codes by rank, negative for a signal, without those that this process caused."""
        mine = {-signal.SIGTERM}
        if time.monotonic() - self._ending_since > TORCH_PATIENCE_SECONDS:
            mine.add(-signal.SIGKILL)
        later = {rank: p.exitcode for rank, p in enumerate(self._processes) if p.exitcode is not None}
        return {rank: code for rank, code in later.items() if code not in mine} | self.seen


def _function(name: str) -> Callable:
    """The function of `module:name`."""
    import importlib

    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _changes_to_the_launcher(exits: _Exits) -> Patches:
    """How an agent changes Python's fork server and torch's elastic launcher."""
    from multiprocessing import forkserver

    if not forkserver._forkserver._forkserver_address:
        raise WarmError("this Python's multiprocessing.forkserver keeps its address elsewhere; use launcher='torchrun'")
    mine, elastic = Patches(), "torch.distributed.elastic"
    mine.replaces(f"{elastic}.multiprocessing.api.MultiprocessContext._poll", why="how the ranks ended")(exits.look)

    @mine.replaces(
        "multiprocessing.forkserver._forkserver.ensure_running",
        why="this process asks the one that it was forked from; Python starts another, as that is not its own child",
    )
    def ensure_running(_: Callable) -> None:
        """Nothing: the fork server runs."""

    @mine.replaces(
        f"{elastic}.rendezvous.dynamic_rendezvous._delay",
        why="a random wait, up to 0.3 s, keeps many nodes from asking the rendezvous at once, and there is one",
    )
    def delay(original: Callable, seconds: float | tuple[float, float]) -> None:
        """No wait of random length."""
        if not isinstance(seconds, tuple):
            original(seconds)

    @mine.replaces(
        f"{elastic}.rendezvous.dynamic_rendezvous.get_method_name",
        why="it reads the sources of all callers, to name an event that nobody records",
    )
    def get_method_name(_: Callable) -> str:
        """No name."""
        return ""

    return mine


def rank_process(request: dict) -> None:
    """What a rank does first: a session of its own, the client's environment, then the target."""
    import gc
    import multiprocessing

    from course_lib.ranks.cpu import host

    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # its own processes are its forks, as under torchrun
    host.share(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    host.end_with_parent()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path.extend(entry for entry in request["path"] if entry not in sys.path)
    gc.freeze()
    arguments = (request["argument"], request.get("prepared")) if request["prepare"] else (request["argument"],)
    _function(request["target"])(*arguments)

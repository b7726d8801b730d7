"""What ranks do in the failure drills; each function is a launch target.

The drill of the right culprit makes certain what a busy machine makes likely: whoever watches the ranks does not look
while one of eight ends and the others notice.  `PYTHONPATH=tests .venv/bin/python -m support.drills 20` does it 20 times
for each way to end, with another victim each time, and exits with 1 if a wrong rank is named.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from course_lib import launch, runs
from course_lib.ranks import train
from course_lib.runs import writer

FAILING_RANK = 3


class _AtStep:
    """Does something at the end of one step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_train_step_end(self, context: object) -> None:
        if context.state.train_state.step + 1 == self.step:  # Bridge counts the step after this event
            self.action()


def _train(
    run_directory: str, cfg: object, step: int, action: Callable[[], object], *, rank: int = FAILING_RANK
) -> None:
    """Train, and let one rank do something at the end of a step."""
    mine = int(os.environ["RANK"]) == rank
    train.rank_main(run_directory, cfg, callbacks=[_AtStep(step, action)] if mine else [])


class _Seeds:
    """Begins the GPU's random stream anew when the training begins."""

    def on_train_start(self, context: object) -> None:
        import torch

        torch.cuda.manual_seed(7)


def seeds_its_stream(run_directory: str, cfg: object = None) -> None:
    """Train from one random state in every layout: before the first step, fused functions are warmed up with random numbers,
    as many as a rank's share is wide.

    Source: megatron-bridge training/initialize.py @ 0.6.2 `_warmup_jit_function`
    """
    train.rank_main(run_directory, cfg, callbacks=[_Seeds()])


def own_layer_spec(config: object) -> object:
    """A learner's own layers, here the ones that CPU ranks have anyway; it says that it was asked."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    print("own layers")
    return get_gpt_layer_local_spec(normalization=config.normalization)


def raises(run_directory: str, cfg: object = None) -> None:
    """Rank 3 raises in its second step."""

    def fail() -> None:
        raise ValueError("a loss of minus seven is impossible")

    _train(run_directory, cfg, 2, fail)


def is_killed(run_directory: str, cfg: object = None) -> None:
    """Rank 3 is killed in its second step, as the kernel's out-of-memory killer would do it."""
    _train(run_directory, cfg, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def runs_out_of_memory(run_directory: str, cfg: object = None) -> None:
    """Rank 3 may not have more memory than it has now, and asks for four GiB."""

    _train(run_directory, cfg, 2, _fill_memory)


def _fill_memory() -> None:
    import resource

    import torch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    torch.ones(2**30)


def never_ends(run_directory: str, cfg: object = None) -> None:
    """Rank 3 sleeps in its second step, and its peers wait for it."""
    _train(run_directory, cfg, 2, lambda: time.sleep(600))


def writes_what_it_would_train_with(run_directory: str, cfg: object = None) -> None:
    """Rank 0 writes the configuration that Bridge's pretrain() receives, and nobody trains."""
    from megatron.bridge.training import pretrain as module

    def pretrain(cfg: object, *_: object, **__: object) -> None:
        if os.environ["RANK"] == "0":
            cfg.to_yaml(str(Path(run_directory) / "used.yaml"))

    module.pretrain = pretrain
    train.rank_main(run_directory, cfg)


def reaches_pretrain(run_directory: str, cfg: object = None) -> None:
    """A GPU rank that says what it finds where Bridge's pretrain() would begin, on a machine without a GPU."""
    import sys

    import torch
    from megatron.bridge.training import initialize
    from megatron.bridge.training import pretrain as module

    def reached(*_: object, **__: object) -> None:
        print("cpu:", [name for name in sys.modules if name.startswith("course_lib.ranks.cpu")])
        print("redirected:", hasattr(torch.cuda.is_available, "__wrapped__"), torch.empty.__class__.__name__)
        print("helpers:", initialize.compile_helpers())  # upstream's own would call make, and end the rank
        print("compiler:", torch.compile.__module__, os.environ.get("TORCHDYNAMO_DISABLE") or None)

    writer.meter = lambda device: None
    module.pretrain = reached
    train.rank_main(run_directory, cfg)


def fills_the_disk(run_directory: str, cfg: object = None) -> None:
    """Rank 1 fills what is left of the run's file system in its second step; whoever writes next meets it."""

    def fill() -> None:
        time.sleep(0.5)  # the other rank has written its line of this step by now
        with open(Path(run_directory) / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"0" * 1024)

    _train(run_directory, cfg, 2, fill, rank=1)


def leaves(run_directory: str, cfg: object = None) -> None:
    """Rank 3 ends without an error before it met the others, as a library that calls exit() would do it."""
    path = Path(run_directory)
    writer.stage(path, int(os.environ["RANK"]), "building the model")
    if int(os.environ["RANK"]) == FAILING_RANK:
        os._exit(0)


def is_killed_mid_step(run_directory: str, cfg: object = None) -> None:
    """Rank 1 is killed in its third step, one step after a save."""
    _train(run_directory, cfg, 3, lambda: os.kill(os.getpid(), signal.SIGKILL), rank=1)


def is_killed_mid_save(run_directory: str, cfg: object = None) -> None:
    """Rank 1 is killed when it has written its shard of step 4, before anybody writes the index."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data_multithread

    def killed(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)
        if os.environ["RANK"] == "1" and (Path(run_directory) / "checkpoints" / "iter_0000004").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(killed)
    train.rank_main(run_directory, cfg)


def _raise() -> None:
    raise ValueError("a loss of minus seven is impossible")


ENDS: dict[str, tuple[Callable[[], object], str | None, str]] = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL", "was killed by SIGKILL while training"),
    "exits with 0": (lambda: os._exit(0), None, "exited with code 0"),
    "exits with 1": (lambda: os._exit(1), None, "exited with code 1"),
    "raises": (_raise, "ValueError", "minus seven"),
    "out of memory": (_fill_memory, "RuntimeError", "can't allocate memory"),
}
"""Way to end: what the rank does, the outcome's exception, and words of its cause."""


def exchanges(run_directory: str, cfg: object = None) -> None:
    """Ranks of one group add numbers for ever; the one for which there is a file with a way to end takes it."""
    import torch
    import torch.distributed as dist

    path, rank = Path(run_directory), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    writer.stage(path, rank, "training")
    while True:
        dist.all_reduce(torch.ones(8))
        time.sleep(0.02)
        if (path / f"end_{rank}").exists():
            ENDS[(path / f"end_{rank}").read_text()][0]()


def corrupts_its_gradient(run_directory: str, cfg: object = None) -> None:
    """The last rank changes its gradient after the data-parallel reduction of its second step."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    prepare, calls = FP32Optimizer.prepare_grads, itertools.count(1)

    def prepare_grads(optimizer: FP32Optimizer) -> bool:
        found = prepare(optimizer)
        if next(calls) == 2:
            optimizer.get_parameters()[0].grad[0] += 1
        return found

    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        FP32Optimizer.prepare_grads = prepare_grads
    train.rank_main(run_directory, cfg)


def sleeps(run_directory: str, cfg: object = None) -> None:
    """A rank that does nothing for long."""
    writer.stage(Path(run_directory), int(os.environ["RANK"]), "training")
    time.sleep(600)


def watchers(run: runs.Run) -> tuple[int, int]:
    """The agent of a run, and the fork server, whose children the agent and the ranks are."""
    import psutil

    fork_server = psutil.Process(run.ranks()[0]["pid"]).parent()
    log = str(run.path / "logs" / "launcher.log")
    for child in fork_server.children():
        with contextlib.suppress(OSError):  # it ended
            if os.readlink(f"/proc/{child.pid}/fd/1") == log:
                return child.pid, fork_server.pid
    raise ProcessLookupError(f"run {run.name} has no agent")


@contextlib.contextmanager
def stopped(pids: tuple[int, ...]) -> Iterator[None]:
    """Processes that see nothing for a while, as on a machine that has no core for them."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)


def unseen(cfg: object, end: str, victim: int, *, ranks: int = 8, blind: int = 1) -> runs.Outcome:
    """Launch `exchanges`, let one rank end and all others notice while nobody watches, and return the outcome.

    Args:
        cfg: Any configuration for so many ranks; nobody trains.
        end: One of `ENDS`.
        victim: The rank that ends.
        ranks: Number of ranks.
        blind: 1 stops the agent, 2 the fork server as well, so that the agent gets all exit codes at once.
    """

    def watch(run: runs.Run) -> None:
        pids = [entry["pid"] for entry in run.ranks().values()]
        if run.stage() != "training" or (run.path / f"end_{victim}").exists():
            return
        with stopped(watchers(run)[:blind]):
            half = run.path / "half"
            half.write_text(end)
            half.rename(run.path / f"end_{victim}")
            limit = time.monotonic() + 60
            while not all(map(over, pids)) and time.monotonic() < limit:
                time.sleep(0.02)

    try:
        launch.run(cfg, ranks=ranks, name="unseen", show=None, target="support.drills:exchanges", watch=watch)
    except launch.RunFailed as failed:
        return failed.outcome
    raise AssertionError("the run did not fail")


def over(pid: int) -> bool:
    """True if a process is gone, or waits for its parent only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def main(times: int) -> int:
    """Every way to end so many times on 8 ranks; returns how often a wrong rank or cause was named."""
    import tempfile

    from course_lib import stack
    from support import small

    stack.prepare_imports()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COURSE_RUNS"] = folder
        for end, turn in itertools.product(ENDS, range(times)):
            outcome = unseen(small.config(), end, turn % 8, blind=1 + turn // 8 % 2)
            right = (outcome.rank, outcome.exception) == (turn % 8, ENDS[end][1]) and ENDS[end][2] in outcome.cause
            wrong += not right
            print(
                f"{time.process_time():.1f} s, {end}, rank {turn % 8}: {'right' if right else 'WRONG'}: {outcome.cause}",
                flush=True,
            )
    print(f"{times * len(ENDS) - wrong} of {times * len(ENDS)} right")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)))

"""What ranks do in the failure drills; each function is a launch target."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from course_lib import train

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

    def fill() -> None:
        import resource

        import torch

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        torch.ones(2**30)

    _train(run_directory, cfg, 2, fill)


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

    from course_lib import memory_meter

    def reached(*_: object, **__: object) -> None:
        print("cpu:", [name for name in sys.modules if name.startswith("course_lib.cpu")])
        print("redirected:", hasattr(torch.cuda.is_available, "__wrapped__"), torch.empty.__class__.__name__)
        print("helpers:", initialize.compile_helpers())  # upstream's own would call make, and end the rank
        print("compiler:", torch.compile.__module__, os.environ.get("TORCHDYNAMO_DISABLE") or None)

    memory_meter.meter = lambda device: None
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
    train.stage(path, int(os.environ["RANK"]), "building the model")
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

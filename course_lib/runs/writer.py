"""What a trainer leaves in a run directory, whichever trainer it is: Bridge or AutoModel in a rank, TRL in a plain process.

    with writer.recording("dpo", config=arguments.to_dict(), train_iters=40) as mine:
        for step in range(1, 41):
            mine.begin_step()
            ...
            mine.end_step(step)
            mine.metrics(step, loss=loss, tokens=tokens)

Whoever reads it (`runs.Run`, the live view, `reading/health`) sees a run like any other.  Nothing here imports torch unless
the memory of a GPU is asked for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from course_lib import runs, stack
from course_lib.common import files
from course_lib.common.project import PROJECT
from course_lib.runs import failures

MEMORY_KINDS = {
    "cuda": "allocated by torch on the GPU",
    "cpu": "anonymous memory of the process since it started",
}


class View(Protocol):
    """What shows a run while it goes on, such as `figures.live.view()`."""

    def update(self, run: runs.Run) -> None: ...

    def close(self, run: runs.Run) -> None: ...


@contextmanager
def recording(
    name: str,
    *,
    config: Mapping[str, Any],
    train_iters: int,
    device: str = "cpu",
    loss_unit: str = "nats/token",
    view: View | None = None,
    **about: Any,
) -> Iterator[Writer]:
    """A run of this process: its directory, its one writer, and its last word however the block ends.

    Args:
        config: The trainer's configuration as data, for `config.yaml`.
        device: Whose memory is read, `"cpu"` or `"cuda"`.
        view: Shows the run, such as `live.view(train_iters, name=name)`.
        about: Further facts for `launch.json`, such as `seed`, or `ranks` where those of a `launch.call` write: each with
            a `Writer` of its own for the path of this one.

    Raises:
        ConfigError: If the configuration holds an access token, or what is no data; nothing is left on disk then.
    """
    here = {"pid": os.getpid(), "host": os.uname().nodename, "launcher": "this process", "ranks": 1}
    run = create(name, config=config, device=device, train_iters=train_iters, loss_unit=loss_unit, **here | about)
    mine = Writer(run.path, device=device, view=view)
    try:
        mine.stage(runs.STAGES[0])
        yield mine
        mine.stage("done")
        runs.write_outcome(run.path, runs.Outcome("succeeded", warnings=run.warnings))
    except KeyboardInterrupt:
        runs.write_outcome(run.path, runs.Outcome("interrupted", cause="stopped by the learner"))
        raise
    except BaseException as error:
        if isinstance(of_its_ranks := getattr(error, "outcome", None), runs.Outcome):
            runs.write_outcome(run.path, of_its_ranks)
        else:
            failures.record(run.path, 0, error)
            failures.settle(run.path, dead={})
        raise
    finally:
        if view is not None:
            view.close(run.reload())


def create(name: str, *, config: Mapping[str, Any], **about: Any) -> runs.Run:
    """A new run directory with the two files that stand before the first step.

    Args:
        about: Facts for `launch.json`, as `launch_record` takes them.
    """
    from course_lib.runs import config_file

    path = runs.create(name)
    with runs.removed_on_error(path):
        config_file.write_data(config, path)
        runs.write_json(path / "launch.json", launch_record(path, **about))
    return runs.Run(path)


def launch_record(path: Path, *, ranks: int, device: str, train_iters: int, **about: Any) -> dict[str, Any]:
    """What `launch.json` says of every run, and what else is known of this one."""
    return {
        "name": path.name,
        "ranks": ranks,
        "device": device,
        "project": os.fspath(PROJECT),
        "versions": stack.versions(),
        "started": time.time(),
        "train_iters": train_iters,
        "memory_kind": MEMORY_KINDS[device],
    } | about


def stage(path: Path, rank: int, name: str) -> None:
    """Say in `ranks/N.json` what a rank is doing now: one of `runs.STAGES`, or a stage of one's own."""
    entry = {"rank": rank, "pid": os.getpid(), "stage": name, "time": time.time()}
    runs.write_json(path / "ranks" / f"{rank}.json", entry)


class Writer:
    """What one rank writes, `rank` of `world`; the last one holds the loss, so it writes the run's own rows.

    Every rank has its lines in `memory.jsonl` and `steps.jsonl`, which `runs.Agreement` compares.
    """

    def __init__(self, path: Path, *, rank: int = 0, world: int = 1, device: str, view: View | None = None) -> None:
        self.path, self.rank, self.leads = path, rank, rank == world - 1
        self._meter, self._view = meter(device), view
        self._began = self._seconds = 0.0
        self._steps = 0

    def stage(self, name: str) -> None:
        """As the function `stage`."""
        stage(self.path, self.rank, name)

    def begin(self, step: int = 0) -> None:
        """Training starts, after so many steps of a run before this one."""
        self.stage("training")
        self._memory(step)

    def begin_step(self) -> None:
        """The clock of a step starts."""
        self._began = time.perf_counter()

    def end_step(self, step: int) -> None:
        """The clock stops, and the step's memory is read; on a GPU that is still at work, wait for it before."""
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self._memory(step)

    def metrics(
        self,
        step: int,
        *,
        loss: float | None,
        grad_norm: float | None = None,
        learning_rate: float | None = None,
        tokens: int | None = None,
        skipped: bool = False,
        **others: float | None,
    ) -> None:
        """The numbers of the steps that ended since the last call; called by every rank, with what it knows.

        Args:
            tokens: Of all ranks and all these steps, without padding; `None` if nobody counted.  The row has time and
                tokens of one step: their averages if there were several.
            others: Columns of the trainer's own, such as `rewards_margins`.
        """
        steps, seconds = max(1, self._steps), self._seconds
        self._steps, self._seconds = 0, 0.0
        common = {"step": step, "loss": loss, "grad_norm": grad_norm, "skipped": skipped}
        self._append("steps", {"rank": self.rank} | common)
        if not self.leads:
            return
        row = common | {"time": time.time(), "learning_rate": learning_rate, "elapsed_ms": seconds / steps * 1e3}
        row["tokens"] = None if tokens is None else tokens / steps if tokens % steps else tokens // steps
        row["tokens_per_second"] = tokens / seconds if tokens is not None and seconds else None
        if clash := sorted(set(others) & set(runs.COLUMNS["metrics"])):
            raise ValueError(f"metrics() got {', '.join(clash)} as a column of the trainer's own, and every run has it")
        self._append("metrics", row | others)
        if self._view is not None:
            self._view.update(runs.Run(self.path))

    def validation(self, step: int, *, loss: float | None, **others: float | None) -> None:
        """The numbers of an evaluation after a step."""
        if self.leads:
            self._append("validation", {"step": step, "time": time.time(), "loss": loss} | others)

    def _memory(self, step: int) -> None:
        now_bytes, peak_bytes = self._meter.read()
        row = {"rank": self.rank, "step": step, "time": time.time(), "memory_bytes": now_bytes}
        self._append("memory", row | {"peak_memory_bytes": peak_bytes})
        self._meter.begin_step()

    def _append(self, table: str, row: dict[str, Any]) -> None:
        files.append_lines(self.path / f"{table}.jsonl", [json.dumps(row)])


# ------------------------------------------------------------------------------------------------------------- memory


class Meter(Protocol):
    """Reads the memory of this process."""

    def begin_step(self) -> None:
        """Forget the peak so far."""

    def read(self) -> tuple[int, int]:
        """Memory now, and its peak since `begin_step()`, in bytes."""


def meter(device: str) -> Meter:
    """The meter for `"cpu"` or `"cuda"`; what the process holds at this moment counts as nothing on a CPU."""
    return _GpuMeter() if device == "cuda" else _CpuMeter()


class _GpuMeter:
    def begin_step(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int, int]:
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


class _CpuMeter:
    """Anonymous memory, from `/proc/self/status` in a third of a millisecond; imported libraries, which forks share, not."""

    def __init__(self) -> None:
        self._at_start = _status()["RssAnon"]

    def begin_step(self) -> None:
        with suppress(OSError):  # a hardened kernel: the peak is then that of the whole run so far
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory

    def read(self) -> tuple[int, int]:
        now = _status()
        memory = max(0, now["RssAnon"] - self._at_start)
        return memory, memory + max(0, now["VmHWM"] - now["VmRSS"])


def _status() -> dict[str, int]:
    wanted = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS", "RssAnon"):
                wanted[name] = int(value.split()[0]) * 1024
    return wanted

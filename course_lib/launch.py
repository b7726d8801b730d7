"""Start a run on N ranks and wait for it: forked CPU ranks here, `torchrun` with NCCL where there are enough GPUs."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib import checkpoints, configuration, failures, runs, stack, torchrun, warm
from course_lib.configuration import FieldError
from course_lib.runs import ConfigError
from course_lib.torchrun import command, settings, start_process

if TYPE_CHECKING:
    import pandas as pd
    from megatron.bridge.training.config import ConfigContainer

    from course_lib import live
    from course_lib.layout import Layout

__all__ = [
    "ConfigError",
    "FieldError",
    "RunFailed",
    "RunInterrupted",
    "command",
    "differences",
    "prepare",
    "run",
    "settings",
    "start_process",
    "warm_up",
]

PATIENCE_SECONDS = 6.0
"""How long a rank may be gone before a launch that says nothing about it is stopped."""

TRAIN = "course_lib.train:rank_main"
"""What a warm rank executes: Bridge's own loop."""

RESERVE_BYTES = 16 * 1024
"""Space kept free in a run directory, so that a full disk cannot keep `outcome.json` from being written."""


class RunFailed(RuntimeError):
    """A run failed; the message names the first failing rank and its cause, `outcome` and `run` have the rest."""

    def __init__(self, run: runs.Run, outcome: runs.Outcome) -> None:
        super().__init__(failures.describe(run, outcome))
        self.run, self.outcome = run, outcome


class RunInterrupted(KeyboardInterrupt):
    """The learner stopped the cell; all ranks are gone."""


def warm_up() -> None:
    """Let the stack be imported in the background, so that the first `run()` need not wait for it."""
    if stack.device(1) == "cpu":
        warm.lease()


def differences(cfg: ConfigContainer) -> pd.DataFrame:
    """What this machine changes in a configuration for CPU ranks: `field, on GPU, on CPU, why`."""
    from course_lib import devices

    return devices.table(cfg)


def run(
    cfg: ConfigContainer | Path | str,
    *,
    ranks: int = 8,
    name: str = "run",
    save: bool = False,
    load: runs.Run | Path | None = None,
    show: str | None = "live",
    launcher: str | None = None,
    target: str = TRAIN,
    record: bool = False,
    watch: Callable[[runs.Run], object] | None = None,
) -> runs.Run:
    """Train on so many ranks and return what happened.

    The configuration is written to `runs/NAME/config.yaml`, which is the only thing that travels to the ranks; `cfg`
    itself stays as it is.

    Args:
        cfg: Bridge's configuration, or a `config.yaml` that it wrote.
        ranks: Number of ranks; the world size.
        name: Name of the run's directory; a number is added if it exists.
        save: Keep checkpoints in the run's own directory.  Bridge's recipes save to, and silently resume from, one
            default directory; a run of this course does neither unless asked, from a file as well.
        load: A run, or a checkpoint directory, to start from: weights, optimizer, step and place in the data.
        show: `"live"` for a view of loss, memory and throughput while it trains, `None` for silence.
        launcher: `"warm"` or `"torchrun"`; `None` takes what fits the device.
        target: What each warm rank executes, as `module:function` of the run directory.
        record: Write every collective and every forward and backward pass to the run directory, for `Run.collectives`
            and `Run.timeline`.
        watch: Called with the run some ten times a second while it trains.

    Returns:
        The finished run.

    Raises:
        LayoutError: If the model, batch and ranks do not fit together; nothing was started.
        FieldError: If `cfg` carries an attribute that is no field of Bridge's, such as `cfg.train.save_interval`.
        ConfigError: If a file is no YAML or holds an access token, or a rank finds that it does not fit Bridge.
        NoCheckpoint: If there is nothing to load where `load` points; Bridge would start from random weights.
        RunFailed: If a rank failed; names the first one and its cause.
        RunInterrupted: If the learner interrupted; no rank is left.
    """
    if launcher not in (None, "warm", "torchrun"):
        raise ValueError(f"launcher={launcher!r}: use 'warm' or 'torchrun', or prepare() the run and start it yourself")
    run_ = prepare(cfg, ranks=ranks, name=name, save=save, load=load, launcher=launcher, record=record)
    (run_.path / ".reserve").write_bytes(b"\0" * RESERVE_BYTES)
    warm_start = functools.partial(_start_warm, target=target)
    start = warm_start if run_.launch["launcher"] == "warm" else torchrun.start
    return _start_and_wait(run_, ranks, start, _view(show, run_.launch["train_iters"], run_.path), watch)


def prepare(
    cfg: ConfigContainer | Path | str,
    *,
    ranks: int = 8,
    name: str = "run",
    save: bool = False,
    load: runs.Run | Path | None = None,
    launcher: str | None = None,
    record: bool = False,
) -> runs.Run:
    """Write the run directory and start nothing: for a scheduler, another launcher, or your own hands.

    Args:
        cfg: As in `run()`, like the other arguments.
        ranks: Number of ranks that somebody will start.
        name: Name of the run's directory.
        save: Keep checkpoints in the run's own directory.
        load: A run, or a checkpoint directory, to start from.
        launcher: Who will start it, for the record; any name.
        record: Ask the ranks to write their collectives and passes.

    Returns:
        The run, with `config.yaml` and `launch.json`; its outcome is `None` until ranks have run.

    Raises:
        ConfigError: If `config.yaml` would hold an access token; nothing is left on disk then.
        LayoutError: As `run()`, like `FieldError` and `NoCheckpoint`.
    """
    from course_lib import layout

    device = stack.device(ranks)
    source = checkpoints.require(load) if load else None
    if isinstance(cfg, (str, Path)):
        content = configuration.read_file(Path(cfg))
        plan = layout.require(content, ranks)
    else:
        configuration.refuse_unknown_fields(cfg)
        plan = layout.require(configuration.as_the_ranks_see_it(cfg, device), ranks)
    path = runs.create(name)
    places = {
        "save": str(path / "checkpoints") if save else None,
        "load": str(source) if source else None,
    }
    try:
        if isinstance(cfg, (str, Path)):
            configuration.write_content(content, path, places)
        else:
            configuration.write_config(cfg, path, places)
            content = runs.Run(path).config
    except ConfigError:
        shutil.rmtree(path)
        raise
    launcher = launcher or ("torchrun" if device == "cuda" else "warm")
    runs.write_json(path / "launch.json", _about(content, path, ranks, device, launcher, plan, record))
    return runs.Run(path)


def _about(content: dict, path: Path, ranks: int, device: str, launcher: str, plan: Layout, record: bool) -> dict:
    return {
        "name": path.name,
        "ranks": ranks,
        "device": device,
        "launcher": launcher,
        "record": record,
        "command": " ".join(command(path, ranks=ranks)),
        "layout": {
            "tensor_model_parallel_size": plan.tensor_model_parallel_size,
            "pipeline_model_parallel_size": plan.pipeline_model_parallel_size,
            "context_parallel_size": plan.context_parallel_size,
            "expert_model_parallel_size": plan.expert_model_parallel_size,
            "data_parallel_size": plan.data_parallel_size,
        },
        "versions": stack.versions(),
        "seed": (content.get("rng") or {}).get("seed"),
        "started": time.time(),
        "train_iters": content["train"]["train_iters"],
        "global_batch_size": content["train"]["global_batch_size"],
        "seq_length": content["model"]["seq_length"],
        "memory_kind": "allocated by torch on the GPU"
        if device == "cuda"
        else "anonymous memory of the process since it started",
    }


def _view(show: str | None, train_iters: int, path: Path) -> live.View | None:
    if show is None:
        return None
    if show != "live":
        raise ValueError(f"show={show!r}: use 'live' or None")
    from course_lib import live

    return live.view(train_iters, name=path.name)


def _start_and_wait(
    run: runs.Run, ranks: int, start: Callable, view: live.View | None, watch: Callable | None
) -> runs.Run:
    """Start the ranks, show what they do, and turn their end into a value or an exception."""
    report: dict | None = None
    try:
        launched = start(run, ranks)
        try:
            patience = _Patience()
            while (report := launched.wait(0.1)) is None:
                if view is not None:
                    view.update(run.again())
                if watch is not None:
                    watch(run.again())
                if patience.ends(run):
                    report = {"dead": failures.left(run)}
                    launched.stop()
                    _wait_for_the_end(launched, run)
                    break
        except KeyboardInterrupt:
            launched.stop()
            _wait_for_the_end(launched, run)
            outcome = runs.Outcome("interrupted", cause="stopped by the learner")
            runs.write_outcome(run.path, outcome)
            raise RunInterrupted(f"run {run.name!r} was stopped; all {ranks} ranks are gone") from None
        finally:
            launched.close()
        outcome = _outcome_of(run, report)
    finally:
        (run.path / ".reserve").unlink(missing_ok=True)
        if view is not None:
            view.close(run.again())
    if outcome.status != "succeeded":
        raise RunFailed(run.again(), outcome)
    return run.again()


class _Patience:
    """Ends when a rank has been gone for some seconds and the launcher, who should know first, has said nothing."""

    def __init__(self) -> None:
        self._looked = self._complete = time.monotonic()

    def ends(self, run: runs.Run) -> bool:
        now = time.monotonic()
        if now - self._looked >= 1.0:
            self._looked = now
            if not failures.left(run):
                self._complete = now
        return now - self._complete > PATIENCE_SECONDS


def _outcome_of(run: runs.Run, report: dict) -> runs.Outcome:
    if report.get("error"):
        outcome = runs.Outcome("failed", cause=report["error"][:500], hint=failures.hint_for(report["error"]))
        with contextlib.suppress(OSError):
            if run.outcome is None:
                runs.write_outcome(run.path, outcome)
        return run.outcome or outcome
    return failures.settle(run.path, dead={int(rank): code for rank, code in report.get("dead", {}).items()})


def _wait_for_the_end(launched: object, run: runs.Run, *, limit_seconds: float = 10.0) -> None:
    """Wait until a stopped launch is over; ranks that are still there at the limit are killed by their pids."""
    end = time.monotonic() + limit_seconds
    while launched.wait(0.1) is None and time.monotonic() < end:
        pass
    for entry in run.ranks().values():
        with contextlib.suppress(ProcessLookupError):
            if _is_rank(entry["pid"]):
                os.kill(entry["pid"], signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    """True if the pid still belongs to a Python process of this user, and not to somebody who got the number later."""
    try:
        return (
            Path(f"/proc/{pid}").stat().st_uid == os.getuid() and b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except OSError:
        return False


def _start_warm(run: runs.Run, ranks: int, *, target: str) -> warm.Launched:
    threads = os.environ.get("COURSE_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return warm.lease().launch(
        target,
        str(run.path),
        ranks=ranks,
        log=run.path / "logs" / "launcher.log",
        env=environment,
        prepare="course_lib.train:prepare" if target == TRAIN else None,
    )

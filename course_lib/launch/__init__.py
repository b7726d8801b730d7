"""Start ranks and wait for them: forked CPU ranks here, `torchrun` with NCCL where there are enough GPUs.

`run` trains, `prepare` writes down a run for somebody else to start, `call` lets ranks do anything else.  Nothing but
these three decides on which device ranks work.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import runs, stack
from course_lib.common.config import ConfigError, changed
from course_lib.common.project import variable
from course_lib.launch import forkserver, supervise, torchrun
from course_lib.launch.supervise import RunFailed, RunInterrupted
from course_lib.launch.torchrun import command, settings, start_process
from course_lib.ranks import routing, train
from course_lib.runs import checkpoints, config_file, field_values, finalize, foreign_code, writer
from course_lib.runs.field_values import FieldError
from course_lib.stack import devices
from course_lib.text import microscope, tokenizers

if TYPE_CHECKING:
    import pandas as pd
    from megatron.bridge.training.config import ConfigContainer

    from course_lib.figures import live
    from course_lib.planning.layout import Layout

__all__ = [
    "ConfigError",
    "FieldError",
    "RunFailed",
    "RunInterrupted",
    "call",
    "command",
    "differences",
    "prepare",
    "run",
    "settings",
    "start_process",
    "warm_up",
]


def warm_up(ranks: int = stack.LESSON_RANKS, *, imports: str = train.MEGATRON) -> forkserver.Server | None:
    """Let the stack be imported in the background, so that the first launch of CPU ranks need not wait for it.

    Args:
        ranks: Number of ranks that will be launched; if they will have GPUs, nothing is imported.
        imports: As in `call`.

    Returns:
        This process's lease of the fork server, which lives as long as the process; `None` where GPUs do the work.
    """
    return forkserver.lease(imports) if stack.device(ranks) == "cpu" else None


def differences(cfg: ConfigContainer, *, ranks: int = stack.LESSON_RANKS) -> pd.DataFrame:
    """What ranks on this machine change in a configuration: `field, in cfg, in the ranks, why`.

    Args:
        cfg: Bridge's configuration; it is not changed.
    """
    return devices.table(cfg, stack.device(ranks))


def run(
    cfg: ConfigContainer | Path | str,
    *,
    ranks: int = stack.LESSON_RANKS,
    name: str = "run",
    save: bool = False,
    load: runs.Run | Path | None = None,
    show: str | None = "live",
    launcher: str | None = None,
    target: str = train.TARGET,
    record: bool | str = False,
    watch: Callable[[runs.Run], object] | None = None,
) -> runs.Run:
    """Train on so many ranks and return what happened.

    The configuration is written to `runs/NAME/config.yaml`, which is the only thing that travels to the ranks; `cfg`
    itself stays as it is.

    Args:
        cfg: Bridge's configuration, or a `config.yaml` that it wrote.
        name: Name of the run's directory; a number is added if it exists.
        save: Keep checkpoints in the run's own directory.  Bridge's recipes save to, and silently resume from, one
            default directory; a run of this course does neither unless asked, from a file as well.
        load: A run, or a checkpoint directory, to start from: weights, optimizer, step and place in the data.
        show: `"live"` for a view of loss, memory and throughput while it trains, `None` for silence.
        launcher: `"warm"` or `"torchrun"`; `None` takes what fits the device.  GPU ranks are started by torchrun.
        target: What each rank executes, as `module:function`, called with the run directory and the configuration
            (see `train.rank_main`); the module must be importable where the ranks run.  What it returns is read by
            `Run.answers()`.
        record: Write every collective and every forward and backward pass to the run directory, for `Run.collectives`
            and `Run.timeline`, and how many tokens chose each expert, for `Run.router`; `"router"` writes the last alone.
        watch: Called with the run some ten times a second while it trains.

    Raises:
        LayoutError: If the model, batch and ranks do not fit together; nothing was started.
        FieldError: If `cfg` carries an attribute that is no field of Bridge's, such as `cfg.train.save_interval`, or a
            value that a field cannot have, such as 0 steps.
        NoTokenizer: If the tokenizer is not on this machine; ranks do not ask the Hub.
        ConfigError: If a file is no YAML, holds an access token or does not fit Bridge; if the ranks cannot train the model,
            with the reason and what would run instead; or if Bridge's own checks refuse it, with what they accept.
        NoCheckpoint: If there is nothing to load where `load` points; Bridge would start from random weights.
        WrongCheckpoint: If it is torn, of another model, or would run code on being read; nothing was started.
        ForeignFile: If data is cut, of another tokenizer, or newer than the index that Megatron keeps for it.
        RunFailed: If a rank failed; names the first one and its cause.
        RunInterrupted: If the learner interrupted; no rank is left.

    Warns:
        UserWarning: If a checkpoint comes from the other device, whose random states do not fit this one's.
    """
    if launcher not in (None, "warm", "torchrun"):
        raise ValueError(f"launcher={launcher!r}: use 'warm' or 'torchrun', or prepare() the run and start it yourself")
    if show not in (None, "live"):
        raise ValueError(f"show={show!r}: use 'live' or None")
    devices.refuse_what_is_missing(stack.device(ranks))  # before there are ranks: they start in this environment
    run_ = prepare(cfg, ranks=ranks, name=name, save=save, load=load, launcher=launcher, target=target, record=record)
    view = functools.partial(_view, show, run_.launch["train_iters"], run_.path)
    return supervise.watch(run_, ranks=ranks, start=_starter(run_), view=view, watch=watch)


def call(
    job: str,
    argument: Any = None,
    *,
    ranks: int = stack.LESSON_RANKS,
    device: str | None = None,
    threads: int | None = None,
    imports: str = train.MEGATRON,
    limit_seconds: float = 300.0,
    watch: Callable[[], object] | None = None,
) -> list[Any]:
    """Let every rank do something else than train, and return what each of them answered.

    Args:
        job: What each rank calls, as `module:function`.  Ranks that want to talk call `train.meet()` first.
        argument: Its one argument, of JSON's kinds.
        device: `"cpu"` or `"cuda"` if the caller knows better than `stack.device(ranks)`.
        threads: Threads of each CPU rank's matrix products; by default the ranks share the cores.
        imports: `"automodel"` for ranks that import NeMo AutoModel and no Megatron.
        watch: Called some ten times a second while they work.

    Returns:
        One answer a rank, in their order, of JSON's kinds.

    Raises:
        ValueError: If `job` is no name of a function, or `ranks` no number of at least 1.
        RunFailed: If a rank failed; names the first one and its cause, and the directory of its log is kept.
        RunInterrupted: If the learner interrupted; no rank is left.
        TimeoutError: If the ranks still worked at the limit; they are stopped.
    """
    _refuse_no_function(job)
    if imports not in forkserver.PRELOADS:
        raise ValueError(f"imports={imports!r}: use {' or '.join(map(repr, forkserver.PRELOADS))}")
    device = device or stack.device(ranks)
    run_ = runs.Run(Path(tempfile.mkdtemp(prefix=f"course-{job.rpartition(':')[2]}-")))
    for part in ("logs", "ranks"):
        (run_.path / part).mkdir()
    about = {"name": run_.name, "ranks": ranks, "device": device, "launcher": _launcher_for(device)}
    about |= {"target": job, "argument": argument, "threads": threads, "imports": imports, "started": time.time()}
    runs.write_json(run_.path / "launch.json", about)
    end = time.monotonic() + limit_seconds

    def look(_: runs.Run) -> None:
        if watch is not None:
            watch()
        if time.monotonic() > end:
            raise TimeoutError(
                f"{job} on {ranks} ranks still worked after {limit_seconds:.0f} s; its ranks are stopped"
            )

    try:
        supervise.watch(run_, ranks=ranks, start=_starter(run_), view=lambda: None, watch=look)
    except RunFailed:
        raise
    except BaseException:
        shutil.rmtree(run_.path)
        raise
    answers = run_.answers()
    shutil.rmtree(run_.path)
    return answers


def _refuse_no_function(target: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        raise ValueError(f"{target!r} names no function: give it as 'module:function', such as {train.TARGET!r}")


def _launcher_for(device: str) -> str:
    return "torchrun" if device == "cuda" else "warm"


def _starter(run: runs.Run) -> Callable[[runs.Run, int], forkserver.Launch | torchrun.Started]:
    return _start_warm if run.launch["launcher"] == "warm" else torchrun.start


def prepare(
    cfg: ConfigContainer | Path | str,
    *,
    ranks: int = stack.LESSON_RANKS,
    name: str = "run",
    save: bool = False,
    load: runs.Run | Path | None = None,
    launcher: str | None = None,
    target: str = train.TARGET,
    record: bool | str = False,
    device: str | None = None,
) -> runs.Run:
    """Write the run directory and start nothing: for a scheduler, another launcher, or your own hands.

    Args:
        cfg: As in `run()`, like the other arguments.
        device: Where its ranks will be, `"cuda"` for a node with GPUs that the run is carried to; by default as here.

    Returns:
        The run, with `config.yaml` and `launch.json`; its outcome is `None` until ranks have run.

    Raises:
        ConfigError: If `config.yaml` would hold an access token; nothing is left on disk then.
        LayoutError: As `run()`, like `FieldError`, `NoTokenizer` and `NoCheckpoint`.
    """
    from course_lib.planning import layout
    from course_lib.stack import devices

    _refuse_no_function(target)
    device = device or stack.device(ranks)
    if device not in writer.MEMORY_KINDS:
        raise ValueError(f"device={device!r}: use {' or '.join(map(repr, sorted(writer.MEMORY_KINDS)))}")
    if record not in (True, False, routing.ONLY):
        raise ValueError(f"record={record!r}: use True, False or {routing.ONLY!r}")
    if launcher == "warm" and device == "cuda":
        raise ValueError(
            "launcher='warm' forks ranks that work on the CPU, and these ranks have GPUs: leave launcher out, or set "
            "COURSE_DEVICE=cpu"
        )
    source = checkpoints.root(load).absolute() if load else None  # whoever starts it may stand elsewhere
    if isinstance(cfg, (str, Path)):
        stack.prepare_imports()
        content = config_file.read_file(Path(cfg))
        foreign_code.refuse(content, Path(cfg))
        devices.refuse_what_cannot_train(content, device)
        given = devices.applied(content, device)
    else:
        devices.refuse_what_cannot_train(cfg, device)
        field_values.check_fields(cfg)
        given = devices.applied(cfg, device)
    field_values.refuse_wrong_values(given)
    if record == routing.ONLY and (reason := routing.unrecorded(given, device)):
        raise ConfigError(f"record={record!r}: {reason}")
    plan = layout.require(given, ranks)
    resumed = checkpoints.refuse(given, load=source, ranks=ranks)
    if launcher in (None, "warm", "torchrun"):  # another one may start it on a machine with other files
        tokenizers.require(given)
        microscope.require(given)
    path = runs.create(name)
    places = {
        "save": str(path / "checkpoints") if save else None,
        "load": str(source) if source else None,
        **({} if save else {"async_save": False}),  # which Bridge refuses where nothing is saved
    } | _random_states(source, device)
    with runs.removed_on_error(path):
        if isinstance(cfg, (str, Path)):
            config_file.write_content(content, path, places)
            written = train.read_config(path / "config.yaml")
        else:
            config_file.write_config(cfg, path, places)
            content = runs.Run(path).config
            foreign_code.refuse(content, path / "config.yaml")
            written = changed(cfg, {f"checkpoint.{field}": place for field, place in places.items()})
        checkpoints.refuse_without_state(written)
        finalize.refuse(written, ranks=ranks, device=device)
        launcher = launcher or _launcher_for(device)
        about = _launch_record(content, path, ranks, device, launcher, target, plan, record)
        before = checkpoints.global_batch_size(resumed) if resumed else None
        runs.write_json(path / "launch.json", about | {"global_batch_size_of_the_checkpoint": before})
    return runs.Run(path)


def _random_states(source: Path | None, device: str) -> dict[str, bool]:
    """Leave out the random states of a checkpoint from the other device: a GPU's generator is another one than a CPU's.

    Source: megatron-bridge training/checkpointing.py @ 0.6.2 gives `torch.cuda.set_rng_state` what stands in the file.
    """
    if source is None:
        return {}
    launches = [runs.Run(folder).launch for folder in Path(source).absolute().parents[:2]]
    saved_on = next((launch["device"] for launch in launches if "device" in launch), device)
    if saved_on == device:
        return {}
    warnings.warn(
        f"the checkpoint was saved by {saved_on} ranks and goes on in {device} ranks: cfg.checkpoint.load_rng is set to "
        "False in this run, because the two have other random generators. Dropout, if there is any, draws other numbers",
        stacklevel=3,
    )
    return {"load_rng": False}


def _count_of(content: dict, section: str, field: str) -> int:
    try:
        return content[section][field]
    except (KeyError, TypeError):
        raise ConfigError(
            f"the configuration has no {section}.{field}: is it a file that Bridge's to_yaml wrote?"
        ) from None


def _launch_record(
    content: dict, path: Path, ranks: int, device: str, launcher: str, target: str, plan: Layout, record: bool | str
) -> dict:
    kinds = "tensor_model pipeline_model context expert_model data".split()
    return writer.launch_record(
        path,
        ranks=ranks,
        device=device,
        train_iters=_count_of(content, "train", "train_iters"),
        launcher=launcher,
        target=target,
        record=record,
        threads=_threads(ranks) if device == "cpu" else None,
        command=" ".join(command(path, ranks=ranks)),
        layout={f"{kind}_parallel_size": getattr(plan, f"{kind}_parallel_size") for kind in kinds},
        seed=(content.get("rng") or {}).get("seed"),
        global_batch_size=_count_of(content, "train", "global_batch_size"),
        seq_length=_count_of(content, "model", "seq_length"),
    )


def _view(show: str | None, train_iters: int, path: Path) -> live.View | None:
    if show is None:
        return None
    from course_lib.figures import live

    return live.view(train_iters, name=path.name)


def _running() -> int:
    """How many threads of this machine run or wait for a core, this one among them; the least of three looks."""
    looks = []
    for _ in range(3):
        looks.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]))
        time.sleep(0.005)
    return min(looks)


def _threads(ranks: int) -> int:
    """Threads of each rank: what the learner set, its share of the cores, or one while others keep every core busy.

    The threads of one operation wait for the slowest of them, and on a busy machine that is one without a core.
    """
    if chosen := variable("COURSE_THREADS"):
        return int(chosen)
    share = max(1, len(os.sched_getaffinity(0)) // ranks)
    return share if share == 1 or _has_room() else 1


@functools.cache
def _has_room() -> bool:
    """Whether this machine had a core to spare when this process first asked.

    It asks once: a sum's last digit depends on the threads that add it up, and the runs of one notebook are compared.
    """
    return _running() <= (os.cpu_count() or 1)


def _start_warm(run: runs.Run, ranks: int) -> forkserver.Launch:
    threads = str(run.launch.get("threads") or _threads(ranks))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | train.confirmation(run.launch)
    environment |= foreign_code.permission()
    return forkserver.lease(run.launch.get("imports", train.MEGATRON)).launch(
        "course_lib.ranks.train:start",
        str(run.path),
        ranks=ranks,
        log=run.path / "logs" / "launcher.log",
        env=environment,
        prepare="course_lib.ranks.train:prepare",
    )

"""What each rank executes: read `config.yaml`, call Bridge's own `pretrain()` or `finetune()`, record what happens.

The warm launcher runs `start()` in forked processes.  On a GPU node, or by hand, the same module is the entry for
torchrun, and so for NeMo Run and Slurm:

    torchrun --nproc-per-node 8 -m course_lib.ranks.train runs/NAME/config.yaml

Ranks of `launch.call`, which do something else than train, start the same way; `launch.json` says what.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import runs, stack
from course_lib.common import files, heap
from course_lib.common.config import ConfigError
from course_lib.common.project import PROJECT, untested_allowed, variable
from course_lib.runs import config_file, failures, foreign_code
from course_lib.runs.writer import Writer, stage
from course_lib.stack import patches

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

TARGET = "course_lib.ranks.train:rank_main"
"""What a rank executes unless the run says otherwise: Bridge's own loop."""

MEGATRON, AUTOMODEL = "megatron", "automodel"
"""What a rank is imported with: Bridge and the stand-ins of what is absent, or AutoModel and nothing in its way."""

GRACE_SECONDS = 0.4
"""How long a failing rank waits before it exits, so that a rank which died without a word is noticed first."""


def read_config(path: Path) -> ConfigContainer:
    """Read Bridge's configuration, strictly.

    Args:
        path: A YAML file that `ConfigContainer.to_yaml` wrote.

    Raises:
        ConfigError: If the file is missing, is no YAML, names a field that Bridge does not have, or code that Bridge does
            not write.
    """
    from megatron.bridge.training.config import ConfigContainer
    from megatron.training.config.instantiate_utils import InstantiationMode

    try:
        content = config_file.content_of(path)  # Bridge's from_yaml reads by the slow half of PyYAML
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is empty or not a mapping")
        content = _moved(content, runs.Run(path.parent).launch.get("project"))
        foreign_code.refuse(content, path)
        _let_specification_pass(content)
        return ConfigContainer.from_dict(content, mode=InstantiationMode.STRICT)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except Exception as error:
        raise ConfigError(f"{path} does not fit Bridge's ConfigContainer: {' '.join(str(error).split())}") from error


def _moved(value: Any, origin: str | None) -> Any:
    """Paths below the project that prepared a run, as paths below this one: a container or another node has it elsewhere."""
    if origin in (None, here := os.fspath(PROJECT)):
        return value
    if isinstance(value, dict):
        return {name: _moved(each, origin) for name, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, origin) for each in value]
    inside = isinstance(value, str) and value.startswith(origin + os.sep)
    return here + value.removeprefix(origin) if inside else value


def _let_specification_pass(content: dict) -> None:
    """Bridge reads no specification of layers from a module of the learner's, nor the private one that it writes itself.

    Source: megatron-bridge 0.6.2 `models/exaone/exaone_moe/exaone_moe_provider.py`, `utils/instantiate_utils.py`.
    """
    from megatron.bridge.utils import instantiate_utils

    model = content.get("model")
    for field, node in model.items() if isinstance(model, dict) else ():
        if (
            field.endswith("_spec") and isinstance(node, dict) and "_target_" in node
        ):  # foreign_code.refuse() let it pass
            instantiate_utils._ALLOWED_PRIVATE_TARGETS.add(node["_target_"])
            instantiate_utils.target_allowlist.add_exact(node["_target_"])


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send this process's standard output and error, native code's included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    kept = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for copy, original in zip(kept, (1, 2), strict=False):
            os.dup2(copy, original)
            os.close(copy)


def prepare(run_directory: str) -> ConfigContainer | None:
    """What all ranks of one machine would do alike, done once: read the configuration, if there is one."""
    path = Path(run_directory)
    return _read(path, runs.Run(path).launch["ranks"]) if (path / "config.yaml").exists() else None


def _read(path: Path, ranks: int) -> ConfigContainer:
    """A run's configuration, once what it would load has been looked through: no rank unpickles what nobody looked at."""
    from course_lib.runs import checkpoints

    cfg = read_config(path / "config.yaml")
    with contextlib.suppress(checkpoints.NoCheckpoint):  # Bridge then starts from random weights
        checkpoints.refuse(cfg, load=cfg.checkpoint.load and Path(cfg.checkpoint.load), ranks=ranks)
    return cfg


def confirmation(launch: dict) -> dict[str, str]:
    """The environment variable by which whoever starts ranks says that they may execute what `launch.json` names.

    A run directory may come from somebody else, and a name of any function in it would be code that runs.  So the file
    alone is believed only where it names a run's own kinds of training, in `course_lib`.
    """
    target = launch.get("target", TARGET)
    return {} if target.startswith("course_lib.") and "argument" not in launch else {"COURSE_TARGET": target}


def _refuse_unconfirmed(launch: dict) -> None:
    for name, target in confirmation(launch).items():
        if variable(name) != target:
            raise ConfigError(
                f"launch.json lets ranks execute {target}, and whoever started them did not say so: a run directory of "
                f"somebody else may name any code. If it is yours, set {name}={target} for the ranks; else start its "
                "config.yaml anew"
            )


def _function(name: str) -> Callable[..., object]:
    """The function that `module:function` names.

    Raises:
        ConfigError: If there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if module.startswith("course_lib.") and found.__module__ != module:
            raise AttributeError(f"{function} only came into {module} by an import")
        return found
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise ConfigError(f"target {name!r} is no `module:function` that a rank can import: {error}") from error


def start(run_directory: str, cfg: ConfigContainer | None = None) -> None:
    """Run one rank from start to end, by whatever launcher; `RANK` and `WORLD_SIZE` are in the environment.

    What it executes is the `target` of `launch.json`, on the `device` that stands there.  The target of a run is called
    with both arguments, that of a call with the call's `argument`; what it returns, of JSON's kinds, is this rank's answer
    for `Run.answers()`.

    Args:
        run_directory: A directory with `launch.json`, or with a `config.yaml` alone, which is trained.
        cfg: This rank's own copy of what `prepare()` returned; `None` reads the file.

    Raises:
        SystemExit: With code 1 after a failure, which then stands in `ranks/N.json` and `outcome.json`.
    """
    path, rank, world = Path(run_directory), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _output_to(path / "logs" / f"rank_{rank}.log"):
        try:
            stage(path, rank, runs.STAGES[1])
            launch = runs.Run(path).launch
            _refuse_unconfirmed(launch)
            _take(launch.get("device") or stack.device(world), rank, world, launch.get("imports", MEGATRON))
            target = _function(launch.get("target", TARGET))
            if "argument" in launch:
                stage(path, rank, f"calling {launch['target']}")
                answer = target(launch["argument"])
            else:
                answer = target(run_directory, cfg)
            if answer is not None or "argument" in launch:
                files.write_text(path / "ranks" / f"{rank}.answer", json.dumps(answer))
            if "argument" in launch:
                _part()
            stage(path, rank, "done")
        except BaseException as error:
            lost_a_peer = failures.record(path, rank, error)
            with contextlib.suppress(OSError):
                traceback.print_exc()
            time.sleep(2 * GRACE_SECONDS if lost_a_peer else GRACE_SECONDS)  # who has a reason of its own speaks first
            failures.settle(path, provisional=True)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(1)  # no destructor may wait for peers that are gone


def _take(device: str, rank: int, world: int, imports: str) -> None:
    """Get this process ready for the device that the launcher chose: `stack.device()` says the same from now on.

    This is the one place where a rank becomes a CPU rank.
    """
    os.environ["COURSE_DEVICE"] = device
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch's own switch: no file that a rank loads may name code
    if device == "cuda":
        if imports == MEGATRON:
            stack.prepare_imports(compiler=True)
        return
    from course_lib.ranks import cpu
    from course_lib.ranks.cpu import host

    host.share(int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    heap.keep_memory()
    cpu.activate(allow_untested=untested_allowed(), torch_alone=imports == AUTOMODEL)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def meet() -> None:
    """Let the ranks of a call meet: over NCCL, each with a GPU of its own, or over gloo."""
    import torch

    device = stack.device(int(os.environ["WORLD_SIZE"]))
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # no effect in a CPU rank
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def _part() -> None:
    """The end of `meet()`, if a call began with it: nobody leaves while others still need an answer."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def rank_main(run_directory: str, cfg: ConfigContainer | None = None, *, callbacks: Sequence[object] = ()) -> None:
    """Train in this rank.  A target that wants more calls this with what it adds, and changes nothing else:

        def rank_main(run_directory, cfg=None):
            train.rank_main(run_directory, cfg, callbacks=[Watching()])

    Args:
        run_directory: As in `start()`, like the next.
        cfg: This rank's own copy of the configuration; `None` reads the file.
        callbacks: Further listeners, called after this module's own.  Each has methods named as Bridge's events
            (`on_train_step_end(context)` and so on); it need not inherit from Bridge's `Callback`.
    """
    path, rank, world = Path(run_directory), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    launch, device = runs.Run(path).launch, stack.device(world)
    import torch
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from course_lib.planning import layout
    from course_lib.ranks import recording, routing
    from course_lib.stack import devices

    writer = Writer(path, rank=rank, world=world, device=device)
    cfg = cfg or _read(path, world)
    devices.refuse_what_is_missing(device)
    devices.apply(cfg, device)
    if device == "cuda":
        patches.apply(stack.HELPERS)
    layout.require(cfg, world)
    writer.stage(runs.STAGES[2])
    train = finetune if cfg.checkpoint.pretrained_checkpoint else pretrain
    tokens, record = recording.Tokens(), launch.get("record")
    listeners = [recording.Clock(writer), routing.RouterLosses()]
    if record and record != routing.ONLY:
        listeners.append(recording.Messages(path, rank))
    if record and not routing.unrecorded(cfg, device):
        listeners.append(routing.Routers(path, rank))
    listeners.append(recording.Metrics(writer, tokens))
    try:
        train(cfg, tokens.counting(forward_step), callbacks=[*listeners, *callbacks])
    except SystemExit as leaving:  # Bridge leaves this way when a limit of time or a signal ends a run
        if leaving.code not in (None, 0):
            raise RuntimeError(f"Bridge ended the run with exit code {leaving.code}") from None
    except Exception as error:
        if runs.Run(path).ranks()[rank]["stage"] == runs.STAGES[2] and (words := failures.built_from(error, cfg.model)):
            error.add_note(words)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Entry for torchrun: `python -m course_lib.ranks.train runs/NAME/config.yaml`; any file there names the directory."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not os.environ.get("RANK"):
        sys.exit("usage: torchrun --nproc-per-node 8 -m course_lib.ranks.train runs/NAME/config.yaml")
    config = Path(arguments[0]).resolve()
    path = config.parent
    if (ended := runs.Run(path).outcome) is not None:
        sys.exit(
            f"the run in {path} has ended already ({ended.status}), and two runs in one directory would mix: copy its "
            "config.yaml into a new directory and start that"
        )
    _refuse_device_of_another_machine(path, int(os.environ["WORLD_SIZE"]))
    _end_with_the_launcher(path)
    for part in ("logs", "ranks"):
        (path / part).mkdir(exist_ok=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start(str(path))
    if rank == 0:
        _wait_until_done(path, world)
        print(failures.settle(path).status, path, flush=True)


def _refuse_device_of_another_machine(path: Path, world: int) -> None:
    """A run that was prepared on a laptop and copied to a node would train on the node's processors without a word."""
    said = runs.Run(path).launch.get("device")
    if said == "cpu" and stack.device(world) == "cuda":
        sys.exit(
            f"{path / 'launch.json'} was written where {world} ranks had no GPUs, so they would train on the CPU here, and "
            "its config.yaml may name files of that machine: call launch.prepare on this node, or with device='cuda' where "
            "you are, and carry the whole project here; or set COURSE_DEVICE=cpu if you mean the CPU"
        )


def _end_with_the_launcher(path: Path) -> None:
    """End this rank when torchrun, or the program that started torchrun, is gone: nobody else would."""
    watched = [os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []
    if starter := variable("COURSE_STARTER_PID"):
        watched.append(int(starter))

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):  # gone before this rank began
            wait([os.pidfd_open(pid) for pid in watched])
        failures.abandon(path)
        os.kill(os.getpid(), signal.SIGKILL)

    if watched:
        threading.Thread(target=watch, daemon=True, name="end-with-the-launcher").start()


def _wait_until_done(path: Path, world: int, *, limit_seconds: float = 30.0) -> None:
    """Rank 0 speaks for all, so it waits until every rank has said that it is done."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        stages = [r["stage"] for r in runs.Run(path).ranks().values()]
        if len(stages) == world and all(s in ("done", "failed") for s in stages):
            return
        time.sleep(0.05)


if __name__ == "__main__":
    main()

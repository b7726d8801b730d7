"""A run directory: what training leaves behind, read back as one object.

The directory is the contract between training and looking.  Every file is appended in whole lines or replaced at once,
so it can be read while the run goes on.  Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from course_lib.common import files
from course_lib.common.project import RUNS, variable

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "BrokenRun",
    "NoSuchRun",
    "Outcome",
    "Run",
    "RunsUnwritable",
    "create",
    "difference",
    "directory",
    "listing",
    "read",
    "write_json",
]

_COLUMNS = {
    "metrics": "step time loss grad_norm learning_rate elapsed_ms tokens tokens_per_second skipped",
    "validation": "step time loss",
    "memory": "rank step time memory_bytes peak_memory_bytes",
    "steps": "rank step loss grad_norm skipped",
    "collectives": "rank step time phase operation group group_size dtype bytes peer module caller",
    "router": "rank step layer microbatch tokens",
    "timeline": "rank step kind microbatch chunk begin end busy_seconds",
}
COLUMNS = {table: tuple(columns.split()) for table, columns in _COLUMNS.items()}
"""The tables of a run, each a `.jsonl` of that name, and the columns that every trainer's has.

A trainer's own columns stand behind them.
"""


class NoSuchRun(FileNotFoundError):
    """There is no run of that name."""


class BrokenRun(ValueError):
    """A file of a run directory is not what was written there."""


class RunsUnwritable(OSError):
    """No run can be written to the directory of runs."""


RUNS_FIX = "set COURSE_RUNS to a folder that you may write to, or unset it for the course's own runs/"

LONGEST_NAME_BYTES = 200
"""Of a run: a file system takes 255, and a number may follow."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: `"succeeded"`, `"failed"` or `"interrupted"`.
        rank: The first rank that failed; `None` if none did, or if the run failed before there were ranks.
        exception: Name of the exception's type, `"SIGKILL"` and the like for a signal, else `None`.
        finished: Unix time, seconds.
        provisional: A rank wrote it, and whoever started the ranks may still know better.
        warnings: What the run says of itself although it may have succeeded; as `Run.warnings`.
    """

    status: str
    rank: int | None = None
    cause: str = ""
    exception: str | None = None
    tail: str = ""
    hint: str = ""
    finished: float = 0.0
    provisional: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run, read from its directory at the moment of access; a table is read once per object.

    Tables (pandas): `metrics` has one row a step (`loss` in nats per token, `elapsed_ms`, `tokens_per_second`),
    `validation` one row an evaluation, `memory` one row a rank and step (`memory_bytes`, `peak_memory_bytes`).
    """

    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @cached_property
    def config(self) -> dict:
        """`config.yaml` as nested dicts."""
        from course_lib.runs.config_file import content_of

        return content_of(self.path / "config.yaml")

    @cached_property
    def launch(self) -> dict:
        """`launch.json`: command, layout, device, versions, seed, start; empty before the launch wrote it."""
        return _read_json(self.path / "launch.json") or {}

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended, or `None` while it goes on."""
        found = _read_json(self.path / "outcome.json")
        if not found:
            return _vanished(self.launch)
        try:
            return Outcome(**found | {"warnings": tuple(found.get("warnings", ()))})
        except TypeError as error:
            raise BrokenRun(f"{self.path / 'outcome.json'} is no outcome of this course's version: {error}") from None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the numbers of this run although it may go on or succeed, in plain sentences."""
        return (self.outcome and self.outcome.warnings) or Agreement(self).look(last=True)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a step."""
        numbers = ("loss", "grad_norm", "learning_rate", "tokens_per_second")
        return self._table("metrics").astype(dict.fromkeys(numbers, float))  # also where nobody knows any

    @cached_property
    def validation(self) -> pd.DataFrame:
        """One row an evaluation."""
        return self._table("validation")

    @cached_property
    def memory(self) -> pd.DataFrame:
        """One row a rank and sample."""
        return self._table("memory")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a rank and step, with its own `loss` (none before the last pipeline stage) and `grad_norm`."""
        return self._table("steps")

    @cached_property
    def collectives(self) -> pd.DataFrame:
        """One row a rank and operation that it took part in; empty unless the run was launched with `record=True`."""
        return self._table("collectives")

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """One row a rank and forward or backward pass of a microbatch; as `collectives`."""
        return self._table("timeline")

    @cached_property
    def router(self) -> pd.DataFrame:
        """One row a rank, layer and microbatch; `tokens` lists how many chose each expert.  Empty unless recorded."""
        return self._table("router")

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        path = self.path / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for row in map(_row, lines) if row is not None]
        table = pd.DataFrame(rows)
        return table.reindex(columns=[*COLUMNS[name], *(own for own in table if own not in COLUMNS[name])])

    @property
    def loss_unit(self) -> str:
        """Unit of this run's loss; that of a preference, say, is not nats per token."""
        return self.launch.get("loss_unit", "nats/token")

    def ranks(self) -> dict[int, dict]:
        """What each rank last said of itself: `pid`, `stage`, `time`, and the failure if there was one."""
        found = {int(file.stem): _read_json(file) for file in (self.path / "ranks").glob("*.json")}
        return {rank: found[rank] for rank in sorted(found) if found[rank]}

    def answers(self) -> list[Any]:
        """What the target returned in each rank, in their order; of a run that went well there is one a rank."""
        files = sorted((self.path / "ranks").glob("*.answer"), key=lambda file: int(file.stem))
        return [_parsed(file) for file in files]

    def stage(self) -> str:
        """What the slowest rank is doing, in words."""
        stages = [r["stage"] for r in self.ranks().values()]
        if len(stages) < self.launch.get("ranks", 1):
            return STAGES[0]
        return min(stages, key=lambda s: STAGES.index(s) if s in STAGES else len(STAGES))

    def log(self, rank: int) -> str:
        """The text that a rank wrote to its standard output and error."""
        path = self.path / "logs" / f"rank_{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def reload(self) -> Run:
        """The same run, read anew."""
        return Run(self.path)


class Agreement:
    """Whether a run does what was asked for: compares what the ranks say after each step, and reads what is new.

    After the data-parallel reduction every rank that has a loss has the same one, and every rank has the same gradient
    norm: it is a sum over all parts of the model.  Where they differ, weights that must be equal are not.  A step that
    was skipped changes no weight, so with loss scaling its norm may be infinite.
    """

    TOLERANCE = 1e-5
    """Relative; in every layout tried, equal ranks differ by less than fp32's rounding."""

    NAMES: ClassVar = {"loss": "loss", "grad_norm": "gradient norm"}

    def __init__(self, run: Run) -> None:
        self._file = run.path / "steps.jsonl"
        self._world = run.launch.get("ranks", 1)
        self._read_bytes = 0
        self._steps: dict[int, dict[int, dict]] = {}
        self._found = {("configuration", text): text for text in _changed_in_silence(run)}

    def look(self, *, last: bool = False) -> tuple[str, ...]:
        """The sentences so far, each kind of fault once, with the first step that has it.

        Args:
            last: Nothing more will be written: judge steps that some ranks did not end, too.
        """
        for line in self._new_lines():
            if (row := _row(line)) is not None:
                self._steps.setdefault(row["step"], {})[row["rank"]] = row
        for step in sorted(self._steps):
            if last or len(self._steps[step]) == self._world:
                self._judge(step, self._steps.pop(step))
        return tuple(self._found.values())

    def _new_lines(self) -> list[str]:
        if not self._file.exists():
            return []
        with open(self._file, "rb") as file:
            file.seek(self._read_bytes)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(end)
        return whole.decode().splitlines()

    def _judge(self, step: int, rows: dict[int, dict]) -> None:
        for column, name in self.NAMES.items():
            values = {rank: row[column] for rank, row in rows.items() if row[column] is not None and not row["skipped"]}
            if broken := sorted(rank for rank, value in values.items() if not math.isfinite(value)):
                text = f"the {name} of step {step} is not finite on {_ranks(broken)}, and the step was not skipped: "
                self._found.setdefault((column, "finite"), text + "no weight is to be trusted from there on")
            finite = {rank: value for rank, value in values.items() if math.isfinite(value)}
            if not finite:
                continue
            usual = statistics.median_low(finite.values())
            others = {r: v for r, v in finite.items() if not math.isclose(v, usual, rel_tol=self.TOLERANCE)}
            if others:
                alone = 2 * len(others) < len(finite)  # without a majority nobody is the odd one
                values = [f"{v:.6g} on rank {r}" for r, v in sorted((others if alone else finite).items())]
                told = (f"{usual:.6g}, but " if alone else "") + ", ".join(values)
                text = f"ranks that must agree do not: the {name} of step {step} is {told}; "
                self._found.setdefault((column, "equal"), text + "their weights differ from there on")
        if len({row["skipped"] for row in rows.values()}) > 1:
            skipped = sorted(rank for rank, row in rows.items() if row["skipped"])
            text = f"{_ranks(skipped)} skipped step {step} and the others did not: their weights differ from there on"
            self._found.setdefault(("skipped", "equal"), text)


def _changed_in_silence(run: Run) -> list[str]:
    """What Bridge makes of a configuration, with a word in a rank's log or none, that its writer hardly meant."""
    if not (run.path / "config.yaml").exists():
        return []
    train, scheduler, checkpoint = (_section(run.config, name) for name in ("train", "scheduler", "checkpoint"))
    found = []
    steps, warmup = scheduler.get("lr_decay_iters") or train.get("train_iters"), scheduler.get("lr_warmup_iters")
    if steps and warmup and warmup >= steps:
        found.append(
            f"the warm-up of {warmup} steps is cut to fit a schedule of {steps}: the learning rate rises faster than asked "
            "for and then falls at once; lower cfg.scheduler.lr_warmup_iters"
        )
    ends, optimizer = scheduler.get("lr_decay_iters"), _section(run.config, "optimizer")
    falls = scheduler.get("lr_decay_style") in ("cosine", "linear") and optimizer.get("min_lr") == 0
    if falls and ends and ends < (train.get("train_iters") or 0):
        found.append(
            f"the learning rate is 0 from step {ends} on, so the other {train['train_iters'] - ends} steps change nothing; raise "
            "cfg.scheduler.lr_decay_iters, or set cfg.optimizer.min_lr above 0"
        )
    keeps_its_place = checkpoint.get("load_optim") is not False and not checkpoint.get("finetune")
    before, now = run.launch.get("global_batch_size_of_the_checkpoint"), train.get("global_batch_size")
    if keeps_its_place and before and now and before != now:
        found.append(
            f"the checkpoint was trained with a global batch of {before} and this run goes on with {now}: the schedule "
            "counts samples, so the learning rate is not the one that either run would have at this step"
        )
    return found


def _section(config: dict, name: str) -> dict:
    section = config.get(name)
    return section if isinstance(section, dict) else {}  # another trainer may mean something else by the name


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


STAGES = (
    "starting ranks",
    "reading the configuration",
    "building the model",
    "loading data",
    "training",
    "done",
    "failed",
)
"""The stages that a rank goes through, in order."""


GPU_ROUNDING = 0.05
"""How far losses and gradient norms of two equal runs on GPUs may be apart, relative: planned, not measured.

bf16 keeps 8 bits of a number, and kernels there add in another order each time, so nothing is equal in every digit.
NVIDIA's own check of a resume on 8 H100 accepts 1% of the loss and met 0.002% after 50 steps; a gradient norm of a small
model moves more.  Source: NVIDIA-NeMo/Megatron-Bridge examples/model_verification_cards/nemotron-3-nano-4b/card.yaml @ 067f987.
"""


def difference(run: Run | pd.DataFrame, other: Run | pd.DataFrame) -> float:
    """How far two runs' losses and gradient norms are apart: the largest difference, relative to `other`'s value.

    The first loss cannot see a wrong backward pass; the gradient norm can.  Only steps that both runs have count; the result
    is NaN, which is near nothing, if there are none, or if a run has no number at one of them.

    Args:
        run: A run, or a table with `step`, `loss` and `grad_norm`.
    """
    tables = (getattr(each, "metrics", each) for each in (run, other))
    one, two = (table.set_index("step")[["loss", "grad_norm"]].astype(float) for table in tables)
    common = one.index.intersection(two.index)
    return float(((one - two) / two).loc[common].abs().max(skipna=False).max(skipna=False))


def directory() -> Path:
    """The directory that holds all runs: `COURSE_RUNS`, else `runs/` beside the package.

    Always absolute: ranks do not start in the directory in which you are.
    """
    given = variable("COURSE_RUNS")
    return Path(given).expanduser().absolute() if given else RUNS


def create(name: str) -> Path:
    """Make a new, empty run directory; an existing run is never touched.

    Args:
        name: Letters, digits, `-`, `_` and `.`; the directory is `name`, or `name-2`, `name-3`... if that exists.

    Raises:
        ValueError: If the name could leave the runs directory, or is too long for a file system.
        RunsUnwritable: If no run can be written there.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"run name {name!r}: use letters, digits, '-', '_' and '.', not starting with a dot")
    if (length := len(name.encode())) > LONGEST_NAME_BYTES:
        raise ValueError(f"run name {name[:20]!r}... has {length} bytes: use at most {LONGEST_NAME_BYTES}")
    if reason := unwritable(directory()):
        raise RunsUnwritable(f"no run can be written to {reason}; {RUNS_FIX}")
    directory().mkdir(parents=True, exist_ok=True)
    for number in range(1, 100_000):
        path = directory() / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()  # atomic: two notebooks that launch the same name get two directories
        except FileExistsError:
            continue
        (path / "logs").mkdir()
        (path / "ranks").mkdir()
        return path
    raise RuntimeError(f"there are 100,000 runs named {name!r} in {directory()}; delete some")


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Take a run directory away if it cannot be filled: without its `launch.json` it would look like a run that goes on."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path)
        raise


def unwritable(folder: Path) -> str:
    """Why no run can be written to a folder, with its name; empty if one can.

    A mount may be read-only even for root, so one file is really written, and taken away again.
    """
    path = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not os.path.exists(path):
        return f"{path}: it is a link to {os.readlink(path)}, which does not exist"
    if not os.path.isdir(path):
        return f"{path}: it is a file"
    probe = path / f".course-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def read(name: str | Path) -> Run:
    """The run of that name, also while it trains.

    Args:
        name: Name of a directory under `directory()`, or an absolute path.

    Raises:
        NoSuchRun: If there is none; lists the names that exist.
    """
    path = Path(name) if Path(name).is_absolute() else directory() / name
    if not (path / "config.yaml").exists():
        raise NoSuchRun(
            f"no run {str(name)!r} in {directory()}; there are: {', '.join(r.name for r in listing()) or 'none'}"
        )
    return Run(path)


def listing() -> list[Run]:
    """All runs, the newest first."""
    times = {}
    for config in directory().glob("*/config.yaml"):
        with contextlib.suppress(FileNotFoundError):  # somebody is clearing up
            times[config.parent] = config.parent.stat().st_mtime
    return [Run(path) for path in sorted(times, key=times.__getitem__, reverse=True)]


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file at once, so that no reader ever sees half of it."""
    files.write_text(path, json.dumps(content, indent=1))


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Write `outcome.json`, the last word on a run."""
    from dataclasses import asdict, replace

    write_json(path / "outcome.json", asdict(replace(outcome, finished=outcome.finished or time.time())))


def _read_json(path: Path) -> dict | None:
    try:
        found = _parsed(path)
    except FileNotFoundError:
        return None
    if not isinstance(found, dict):
        raise _broken(path, f"it holds a {type(found).__name__} where an object is needed")
    return found


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise _broken(path, " ".join(str(error).split())) from None


def _broken(path: Path, what: str) -> BrokenRun:
    return BrokenRun(f"{path} was changed after it was written: {what}; copy the run again from where it was made")


def _vanished(launch: dict) -> Outcome | None:
    """The outcome of a run that one process trained by itself, and that can say nothing any more."""
    pid = launch.get("pid")
    if pid is None or launch["host"] != os.uname().nodename or pid == os.getpid():
        return None
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and process.create_time() < launch["started"] + 1.0:
            return None  # who got the number later began after the run did
    cause = f"the process that trained it (pid {pid}) is gone without a word"
    return Outcome("failed", 0, cause, hint="If memory ran out, `dmesg | tail` tells.", provisional=True)


def _row(line: str) -> dict | None:
    """One line of a file that grows; none if it is on its way still, or if a full disk cut it."""
    try:
        return json.loads(line)
    except ValueError:
        return None

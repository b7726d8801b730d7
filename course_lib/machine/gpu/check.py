"""What does one GPU say about this course: ordered checks, each in its own process, planned beside measured.

    python -m course_lib.machine.gpu.check --out gpu-report                  # on a node with a GPU; needs no network
    python -m course_lib.machine.gpu.check --out gpu-report --dry-cpu        # every check in tiny form on CPU ranks

A check that fails, hangs or dies costs its own result only.  Both reports are written after each event, so a node that is
taken away leaves what was known by then.  Packages are kept on disk by `course_lib.machine.gpu.bundle`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from course_lib import stack
from course_lib.common import files, units
from course_lib.common.project import environment_kept

DRY_DEVICE = "cpu (dry)"
GATE = "COURSE_GPU_GATE"
"""The environment variable that names the file which a GPU rank waits for before it touches the GPU."""

_JOBS = f"{__package__}.jobs"
_PRELOAD = f"{__package__}.preload"
BROKEN = "NO"
"""How a note of the check `imports` begins for what does not import."""

_LEFT_OUT = ("TORCHDYNAMO_DISABLE", "PYTHONDONTWRITEBYTECODE")
"""Variables of this process that would make a check another one: without its compiler, or with slow imports."""

DRY_PATIENCE = 5
"""A dry run may share two cores with others: its limits are so many times longer."""

GRACE_SECONDS = 20.0
"""How long after its limit a check may still write down what it has, before its processes are killed."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name, for `--only` and in the report.
        limit_seconds: It is ended after so long; waiting for the GPU does not count.
        least_seconds: With less than this left of the budget it is not begun.
        function: What answers it, as `module:function`, called with a `Context`.
        gpu: Whether it needs the GPU, and so waits until the check before it has left.
        packages: Modules that must be importable; else it is skipped, by their names.
    """

    name: str
    settles: str
    limit_seconds: int
    least_seconds: int
    function: str
    gpu: bool = True
    packages: tuple[str, ...] = ()


_TE = ("transformer_engine",)
_MAMBA = (*_TE, "mamba_ssm", "causal_conv1d")

CHECKS: tuple[Check, ...] = (
    Check("machine", "Which GPU, driver, versions and disk are there?", 30, 2, f"{_JOBS}:machine", gpu=False),
    Check("imports", "Does every package of a GPU rank import, and how long does it take?", 150, 20,
          f"{_JOBS}:imports", gpu=False),
    Check("rates", "How many TFLOP/s and GB/s does the bare GPU reach: what is there to be shared?", 90, 25, f"{_JOBS}:rates"),
    Check("lesson_03", "Does `launch.run` train on a GPU at all, and from the loss of fresh weights?", 180, 40,
          f"{_JOBS}:training"),
    Check("llama_1b", "1B, the recipe at 8,192 tokens: planned memory, ceiling and first loss beside measured.", 180, 60,
          f"{_JOBS}:training", packages=_TE),
    Check("resume_fp32", "Does a laptop's checkpoint go on on the GPU, with the CPU's losses?", 150, 40, f"{_JOBS}:resume"),
    Check("resume_bf16", "The same in the recipe's bf16: how far from the CPU's losses?", 150, 40, f"{_JOBS}:resume"),
    Check("layers", "Do Transformer Engine's layers compute what Megatron Core's own do?", 120, 40, f"{_JOBS}:layers",
          packages=_TE),
    Check("llama_3b_recompute", "3B with full recomputation: planned memory and ceiling beside measured.", 180, 60,
          f"{_JOBS}:training", packages=_TE),
    Check("llama_1b_recompute", "1B with full recomputation: what does it save, and what does it cost?", 150, 50,
          f"{_JOBS}:training", packages=_TE),
    Check("llama_3b", "3B without recomputation: does it fit where the plan says so?", 150, 60, f"{_JOBS}:training",
          packages=_TE),
    Check("nemotron_4b", "Nemotron 3 Nano 4B with bf16 moments: do Mamba's kernels train, and does it fit?", 200, 70,
          f"{_JOBS}:training", packages=_MAMBA),
    Check("lora_8b", "LoRA of Llama 3 8B: does it fit one GPU, as planned?", 240, 90, f"{_JOBS}:lora", packages=_TE),
    Check("llama_1b_local", "1B with Megatron Core's own layers: what does Transformer Engine bring?", 150, 50,
          f"{_JOBS}:training"),
    Check("llama_1b_fp8", "1B in FP8: how much faster, and with which losses?", 150, 60, f"{_JOBS}:training", packages=_TE),
)  # fmt: skip
"""In the order of what they are worth: a budget that ends early cuts the last ones off."""


@dataclass(frozen=True)
class Row:
    """One quantity, expected beside measured.

    Attributes:
        unit: Its unit, such as `"GiB"`.
        expected: The number that was known before; `None` if nobody said one.
        measured: The number that was met; `None` if it was not.
        source: Where the expected number comes from, such as `"memory.plan"`.
        tolerance: How far apart they may be, in the unit; `None` judges nothing.
    """

    quantity: str
    unit: str
    expected: float | None
    measured: float | None
    source: str = ""
    tolerance: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether they agree; `None` where nothing is judged, or nothing was measured."""
        if self.tolerance is None or self.expected is None or self.measured is None:
            return None
        return math.isfinite(self.measured) and abs(self.measured - self.expected) <= self.tolerance


@dataclass
class Context:
    """What a check knows, and where it writes what it finds.

    Attributes:
        dry: Tiny shapes on CPU ranks.
        laptop: What a laptop left in the bundle, a folder of `reference`; `None` without one.
        earlier: Results of the checks before, by name.
    """

    name: str
    dry: bool
    work: Path
    laptop: Path | None
    limit_seconds: float
    earlier: dict[str, dict] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def gate(self) -> Path:
        """Exists as soon as the GPU is this check's."""
        return self.work / f"{self.name}.gate"

    @property
    def file(self) -> Path:
        """Where its findings are while it works."""
        return self.work / f"{self.name}.found.json"

    def row(self, quantity: str, unit: str, expected: float | None, measured: float | None, source: str = "",
            *, tolerance: float | None = None) -> None:  # fmt: skip
        """Write down a `Row`."""
        one = Row(quantity, unit, _plain(expected), _plain(measured), source, tolerance)
        self.rows.append(asdict(one) | {"holds": one.holds})
        self._write()

    def note(self, **notes: Any) -> None:
        """Write down anything else, of JSON's kinds."""
        self.notes |= notes
        self._write()

    def _write(self) -> None:
        files.write_text(self.file, json.dumps({"rows": self.rows, "notes": self.notes}, default=str))

    def take_gpu(self) -> None:
        """Wait until the GPU is this check's.  On a GPU its ranks wait themselves, after they have imported."""
        while self.dry and not self.gate.exists():
            time.sleep(0.02)

    def seconds_left(self) -> float:
        """Until this check's limit, which stands in the gate; the whole limit while it still waits."""
        try:
            return float(self.gate.read_text()) - (time.time() - self.gate.stat().st_mtime)
        except FileNotFoundError:
            return self.limit_seconds


def _plain(value: float | None) -> float | None:
    return None if value is None else float(value)


# ------------------------------------------------------------------------------------------------ one check's process


def work_on(check: Check, context: Context, log: str, environment: dict[str, str], parent: int) -> None:
    """The process of one check: its output goes to a file, its failure into its exit code; it ends with its parent."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.setsid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.clear()
    os.environ |= environment | {GATE: "" if context.dry else str(context.gate)}
    try:
        import importlib

        module, _, function = check.function.partition(":")
        getattr(importlib.import_module(module), function)(context)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        context.note(failed=f"{type(error).__name__}: {error}"[:2000])
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(parent: int) -> None:
    """Nobody would open the gate or write the report without it; the ranks end with this process in turn."""
    with contextlib.suppress(ProcessLookupError):
        multiprocessing.connection.wait([os.pidfd_open(parent)])
    os._exit(1)


class _Begun:
    """A check that is under way."""

    def __init__(self, check: Check, context: Context, processes: Any) -> None:
        self.check, self.context = check, context
        self.log = context.work / f"{check.name}.log"
        for file in (context.gate, context.file):
            file.unlink(missing_ok=True)
        arguments = (check, context, str(self.log), dict(os.environ), os.getpid())
        self.process = processes.Process(target=work_on, args=arguments)
        self.process.start()

    def finish(self) -> dict[str, Any]:
        """Give it the GPU, wait until it ends or its time is up, leave no process, and return its result."""
        files.write_text(self.context.gate, str(self.context.limit_seconds))
        began = time.monotonic()
        self.process.join(self.context.limit_seconds + GRACE_SECONDS)
        timed_out = self.process.is_alive()
        self.kill()
        found = _read_json(self.context.file) or {"rows": [], "notes": {}}
        result = {"seconds": round(time.monotonic() - began, 1), **found}
        good = not timed_out and self.process.exitcode == 0
        if not good:
            result["log"] = _end_of(self.log)
            exit_code = self.process.exitcode
            result["reason"] = (
                f"time was up after {self.context.limit_seconds:.0f} s" if timed_out
                else found["notes"].pop("failed", f"its process ended with code {exit_code}")
            )  # fmt: skip
        outside = [row["quantity"] for row in found["rows"] if row["holds"] is False]
        if good and outside:
            result["reason"] = f"outside the stated tolerance: {', '.join(outside)}"
        return result | {
            "status": "timed out" if timed_out else "failed" if not good else "differs" if outside else "passed"
        }

    def kill(self) -> None:
        """End it, and whatever it started."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            mine = psutil.Process(self.process.pid)
            everything = [mine, *mine.children(recursive=True)]
            for one in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(everything[1:], timeout=10)
        self.process.join(10)


# ------------------------------------------------------------------------------------------------------ all of them


def run(
    out: Path,
    *,
    dry: bool = False,
    only: Sequence[str] = (),
    budget_seconds: float = math.inf,
    laptop: Path | None = None,
    work: Path | None = None,
    checks: Sequence[Check] = CHECKS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the checks one after the other, and write `report.json` and `report.txt` after each event.

    Args:
        dry: Tiny shapes on CPU ranks; such a report is refused as a measurement of a GPU.
        only: Names of checks; by default all.  What these need is taken from a report that is in `out` already.
        budget_seconds: For everything; what no longer fits is skipped, by name.
        laptop: What a laptop prepared (`reference`); without it the CPU of this machine prepares it.
        work: A folder for large files; by default a temporary one, which is removed.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: If `only` names a check that does not exist.
    """
    if unknown := sorted(set(only) - {check.name for check in checks}):
        raise ValueError(f"no check is named {', '.join(unknown)}: choose from {', '.join(c.name for c in checks)}")
    out.mkdir(parents=True, exist_ok=True)
    place = work or Path(tempfile.mkdtemp(prefix="course-gpu-check-"))
    place.mkdir(parents=True, exist_ok=True)
    queue = [check for check in checks if not only or check.name in only]
    kept = (_read_json(out / "report.json") or {}) if only else {}
    try:
        with environment_kept(_environment(place, dry=dry)):
            return _Session(
                queue, kept, out=out, place=place, dry=dry, budget=budget_seconds, laptop=laptop, say=say
            ).run()
    finally:
        if work is None:
            shutil.rmtree(place, ignore_errors=True)


class _Session:
    """One after the other, and the report after each event."""

    def __init__(
        self,
        queue: list[Check],
        kept: dict[str, Any],
        *,
        out: Path,
        place: Path,
        dry: bool,
        budget: float,
        laptop: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.queue, self.out, self.place, self.dry, self.laptop, self.say = queue, out, place, dry, laptop, say
        self.began, self.budget_seconds = time.monotonic(), budget
        self.results: dict[str, Any] = dict(kept.get("checks", {}))
        self.report: dict[str, Any] = {
            "schema": 1,
            "device": DRY_DEVICE if dry else "unknown",
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "-m", f"{__package__}.check", *sys.argv[1:]]),
            "budget_seconds": budget if math.isfinite(budget) else None,
            "machine": kept.get("machine", {}),
            "checks": self.results,
        }
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([_PRELOAD])

    def run(self) -> dict[str, Any]:
        """All of the queue; whatever is under way when this is ended from outside is ended too, and says so."""
        now = ahead = None
        try:
            now = self.begin_next()
            while now is not None:
                ahead = None if self.dry else self.begin_next()  # it imports what it needs while the other has the GPU
                self.finish(now)
                now, ahead = ahead or self.begin_next(), None
        finally:
            for one in (now, ahead):
                if one is not None and self.results[one.check.name]["status"] == "running":
                    one.kill()
                    self.results[one.check.name] |= {"status": "failed", "reason": "it was ended from outside"}
            self.write()
        return self.report

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget_seconds - (time.monotonic() - self.began)

    def write(self) -> None:
        """Both files as they are now."""
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        if not self.dry and self.results.get("machine", {}).get("notes"):
            self.report["machine"] = self.results["machine"]["notes"]
            self.report["device"] = self.report["machine"].get("gpu") or "none"
        files.write_text(self.out / "report.json", json.dumps(self.report, indent=1, default=str))
        files.write_text(self.out / "report.txt", as_text(self.report))

    def begin_next(self) -> _Begun | None:
        """The next check that can begin; those that cannot are skipped by name."""
        while self.queue:
            check = self.queue.pop(0)
            about = {"settles": check.settles, "limit_seconds": check.limit_seconds, "rows": [], "notes": {}}
            told = self.results.get("imports", {}).get("notes", {})
            if reason := why_not(check, left_seconds=self.left(), dry=self.dry, told=told):
                self.results[check.name] = about | {"status": "skipped", "reason": reason}
                self.say(f"{check.name}: skipped, {reason}")
                continue
            self.results[check.name] = about | {"status": "running"}
            limit = float(check.limit_seconds) * (DRY_PATIENCE if self.dry else 1)
            context = Context(check.name, self.dry, self.place, self.laptop, limit, dict(self.results))
            return _Begun(check, context, self.processes)
        return None

    def finish(self, one: _Begun) -> None:
        """Its turn, unless the budget has run out since it began."""
        name = one.check.name
        one.context.limit_seconds = min(one.context.limit_seconds, max(1.0, self.left() - GRACE_SECONDS))
        self.write()
        if reason := why_not(one.check, left_seconds=self.left(), dry=self.dry):
            one.kill()
            self.results[name] |= {"status": "skipped", "reason": reason}
        else:
            self.results[name] |= one.finish()
            _keep_log(one.log, self.out, name)
        self.write()
        seconds, reason = self.results[name].get("seconds", 0.0), self.results[name].get("reason")
        words = f", {_first_line(reason)}" if reason else ""
        self.say(f"{name}: {self.results[name]['status']} after {seconds:.0f} s{words}")


def why_not(
    check: Check, *, left_seconds: float, dry: bool, told: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """Why a check cannot be begun, in words; `None` if it can.

    Args:
        told: What the check `imports` noted of each package: one that is installed may still not import.
    """
    if left_seconds < check.least_seconds:
        return f"{max(0.0, left_seconds):.0f} s of the budget are left, and it needs {check.least_seconds}"
    missing = [] if dry else [name for name in check.packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed here: {', '.join(missing)}"
    broken = [name for name in check.packages if str(told.get(name, "")).startswith(BROKEN)]
    if broken:
        return f"installed, but does not import (see the check imports): {', '.join(broken)}"
    if check.gpu and not dry and stack.gpu_count() < 1:
        return "there is no GPU that this process may use (`nvidia-smi`, CUDA_VISIBLE_DEVICES)"
    return None


def _environment(place: Path, *, dry: bool) -> dict[str, str]:
    """What every process of a check finds in its environment.

    Caches go to a folder that can be written whatever HOME is, and no process asks a network.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    places = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "cache"}
    places |= {"COURSE_RUNS": "runs", "HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib", "CUDA_CACHE_PATH": "cuda"}
    places |= {"TRITON_HOME": "triton-home", "TORCH_EXTENSIONS_DIR": "extensions"}
    wanted = {name: str(place / folder) for name, folder in places.items()}
    wanted |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COURSE_DEVICE": "cpu" if dry else "cuda"}
    wanted["PYTHONWARNINGS"] = "ignore::RuntimeWarning:runpy"  # processes import this module a second time, by design
    if not dry or stack.versions() != stack.TESTED:  # a node's torch may be another; the report says which
        wanted["COURSE_ALLOW_UNTESTED"] = "1"
    return kept | wanted | ({} if dry else {"NVTE_FRAMEWORK": "pytorch", "CUDA_DEVICE_MAX_CONNECTIONS": "1"})


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _end_of(path: Path, size: int = 4000) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-size:] if path.exists() else ""


def _keep_log(log: Path, out: Path, name: str) -> None:
    """One file with everything that the checks printed: some ways home take few files."""
    text = _end_of(log, 200_000)
    with open(out / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{'=' * 30} {name}\n{text}\n")


# -------------------------------------------------------------------------------------------------------- as a text


def as_text(report: dict[str, Any]) -> str:
    """The report for people: a line a check, then its quantities, then what it noted."""
    about = f"{report['device']}, {report['date']}, {report.get('seconds', 0):.0f} s: {report['command']}"
    lines = ["DRY: tiny shapes on CPU ranks, no measurement of a GPU." if report["device"] == DRY_DEVICE else "", about]
    width = max((len(name) for name in report["checks"]), default=0)
    for name, one in report["checks"].items():
        lines.append(f"{name:<{width}}  {one['status']:<10} {_first_line(one.get('reason', ''))}".rstrip())
    for name, one in report["checks"].items():
        if one["status"] == "skipped":
            continue
        lines += ["", f"== {name} ({one['status']}, {one.get('seconds', 0):.0f} s). {one['settles']}"]
        lines += [_row_as_text(row) for row in one["rows"]]
        lines += [f"   {key}: {_short(value)}" for key, value in one["notes"].items()]
        if "log" in one:
            lines += ["   its last words:", *(f"   | {line}" for line in one["log"].splitlines()[-25:])]
    return "\n".join(lines).lstrip("\n") + "\n"


def _row_as_text(row: dict[str, Any]) -> str:
    expected = "-" if row["expected"] is None else units.format_number(row["expected"])
    measured = "-" if row["measured"] is None else units.format_number(row["measured"])
    verdict = {None: "", True: "holds", False: "DOES NOT HOLD"}[row["holds"]]
    bound = "" if row["tolerance"] is None else f"within {units.format_number(row['tolerance'])}"
    words = f"   {row['quantity']:<44} {expected:>12} expected {measured:>12} measured {row['unit']:<10}"
    return f"{words} {bound} {verdict} {f'({row["source"]})' if row['source'] else ''}".rstrip()


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


def _short(value: Any, size: int = 600) -> str:
    text = json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= size else f"{text[:size]} ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every check that began has passed, else 1."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.check", description="Check one GPU, without a network."
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of report.json and report.txt")
    parser.add_argument("--dry-cpu", action="store_true", help="every check in tiny form on CPU ranks")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help=", ".join(check.name for check in CHECKS))
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="skip, by name, what no longer fits")
    parser.add_argument("--laptop", type=Path, help="what a laptop prepared, from the bundle")
    parser.add_argument("--work", type=Path, help="a folder for large files that stays; else a temporary one")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` and schedulers leave a whole report
    try:
        report = run(given.out, dry=given.dry_cpu, only=given.only, budget_seconds=given.budget_seconds,
                     laptop=given.laptop, work=given.work)  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    print(f"report            {given.out / 'report.txt'}\n                  {given.out / 'report.json'}")
    return int(any(one["status"] not in ("passed", "skipped") for one in report["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())

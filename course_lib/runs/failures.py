"""Which rank failed first, and what to do about it.

Eight ranks that fail look like eight errors.  Seven of them only lost the eighth.  What tells them apart, the strongest
evidence first: a signal that no rank can send itself because another is gone (SIGKILL, SIGBUS, SIGSEGV, ...); an
exception that a rank raised for a reason of its own; an exit without a word; a rank that the others name as gone.  A
rank that only lost another one, or waited in vain for it, is named last.  An exit code counts if the launcher saw it
before it ended the other ranks itself; how a rank ended that nobody saw is not known, and nobody guesses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from course_lib import runs

# ------------------------------------------------------------------------------------------------ exceptions, as text


@dataclasses.dataclass(frozen=True)
class _Raised:
    """One exception of a traceback.

    Attributes:
        type: Its name, without modules; empty for a text that names none.
        files: The files on its way, the one that raised last; empty for a text without frames.
    """

    type: str
    message: str
    files: tuple[str, ...] = ()


_TRACEBACK = re.compile(r"^(?:\[rank\d+\]: ?)?Traceback \(most recent call last\):\n", re.MULTILINE)
_FRAMES = re.compile(r"(?:(?:\[rank\d+\]: ?)?(?:[ \t].*)?\n)*")
_TYPE = re.compile(r"(?:\[rank\d+\]: ?)?([A-Za-z_][\w.]*)(?:: |\n|$)")
_NEXT = re.compile(r"\n\n(?:\[rank\d+\]: ?)?(?:The above exception was|During handling of)")


def _exceptions(text: str) -> list[_Raised]:
    """The exceptions of a text, the oldest first: of a log with tracebacks, or of one line `Type: message`."""
    first, *others = _TRACEBACK.split(text)
    found = []
    for part in others or [first]:
        frames = _FRAMES.match(part)[0] if others else ""
        rest = _NEXT.split(part[len(frames) :])[0]
        head = _TYPE.match(rest)
        message = rest[head.end() :] if head else rest
        name = head[1].rpartition(".")[2] if head else ""
        found.append(_Raised(name, message.strip(), tuple(re.findall(r'File "([^"]+)"', frames))))
    return found


_LOST_PEER = re.compile(
    r"gloo/\S+\.(?:cc|h):\d+\].*(?:closed|reset|refused|broken pipe|timed out|timeout|unreachable)"
    r"|^gloo connectFullMesh failed"
    r"|^connection closed: rank \d+ is gone|^connection timeout: no word from rank \d+"
    r"|^timed out after \d+ seconds waiting for clients\. \d+/\d+ clients joined"
    r"|ranks? [\d, ]+ failed to pass monitoredBarrier"
    r"|ncclRemoteError|NCCL communicator was aborted|watchdog caught collective operation timeout"
    r"|^(?:failed to (?:recv|send), (?:got|sent) 0 bytes|wait timeout after \d+ms, keys)",
    re.IGNORECASE | re.DOTALL,
)
"""What gloo, NCCL, torch's store and this project's mailboxes say of a rank that is gone or silent.

Source: gloo/transport/tcp/pair.cc, torch/csrc/distributed/c10d/TCPStore.cpp and ProcessGroupNCCL.cpp @ torch 2.13.0
"""

_NAMED = re.compile(
    r"rank (\d+) is gone|no word from rank (\d+)|ranks? (\d+)[\d, ]* failed to pass monitored", re.IGNORECASE
)
_CONNECTION_ERRORS = {"BrokenPipeError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"}
_DISTRIBUTED = re.compile(r"torch/distributed/|course_lib/ranks/cpu/mailbox\.py")


def lost_a_peer(text: str) -> bool:
    """True if an error only says that another rank went away; the oldest exception of a chain decides.

    Example:
        >>> lost_a_peer("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234")
        True
        >>> lost_a_peer("ConnectionResetError: [Errno 104] Connection reset by peer")  # whose connection?
        False
    """
    error = _exceptions(text)[0]
    if error.type in ("DistNetworkError", "DistStoreError"):
        return "EADDRINUSE" not in error.message
    if error.type in _CONNECTION_ERRORS:
        return bool(error.files and _DISTRIBUTED.search(error.files[-1]))
    return bool(_LOST_PEER.search(error.message))


_WRITE_ERROR = re.compile(r"Local worker \d+ encountered an error: (.+)")
"""Source: megatron-core dist_checkpointing/strategies/filesystem_async.py @ 0.19.2"""


@dataclasses.dataclass(frozen=True)
class _Hint:
    """What to do about an exception that is told by its type, its words and where it comes from.

    Attributes:
        types: Names of types; any if empty.
        files: Pattern that a file of the traceback must match; any traceback, or none, if empty.
    """

    hint: str
    words: str = ""
    types: str = ""
    files: str = ""

    def fits(self, error: _Raised) -> bool:
        return (
            (not self.types or error.type in self.types.split())
            and re.search(self.words, error.message, re.IGNORECASE) is not None
            and (not self.files or any(re.search(self.files, file) for file in error.files))
        )


_SHARED_MEMORY = "Shared memory is too small: make /dev/shm larger (Docker: --shm-size=8g)."
_MEMORY = "Out of memory: use a smaller micro_batch_size or seq_length, a smaller model, or fewer ranks."
_OFFLINE = "The Hub was asked for something; build the model from data/ (course_lib.recipes.offline) instead."
_HUB_ERRORS = "GatedRepoError RepositoryNotFoundError LocalEntryNotFoundError OfflineModeIsEnabled HfHubHTTPError"
_PARAMETER_GROUPS = (
    "cfg.optimizer has another lr, min_lr or weight decay than the checkpoint, and Megatron Core finds its parameter "
    "groups by these: set them back, or start the optimizer and its schedule anew with cfg.checkpoint.load_optim = "
    "False."
)

_HINTS = (
    _Hint(
        _SHARED_MEMORY,
        r"Errno (12|13|28|38)\b",
        "OSError PermissionError",
        r"multiprocessing/(synchronize|heap|shared_memory)\.py$",
    ),
    _Hint(_SHARED_MEMORY, r"shared memory (object|file|segment).*/(torch_|dev/shm)|to file </torch_", "RuntimeError"),
    _Hint(_SHARED_MEMORY, r"shared memory segment /dev/shm/nccl", "DistBackendError"),
    _Hint(
        "The disk is full: free space, or point COURSE_RUNS at another disk.",
        r"^\[Errno (28|122)\] (No space left on device|Disk quota exceeded)",
    ),
    _Hint(_MEMORY, types="MemoryError OutOfMemoryError _ArrayMemoryError"),
    _Hint(_MEMORY, r"^\[Errno 12\]", "OSError"),
    _Hint(_MEMORY, r"DefaultCPUAllocator: (not enough memory|can't allocate memory)", "RuntimeError"),
    _Hint(_MEMORY, r"CUDA error: out of memory|CUDA out of memory", "RuntimeError AcceleratorError DistBackendError"),
    _Hint(
        "Another program took the port; launch again: each launch asks for a free one.",
        r"EADDRINUSE",
        "DistNetworkError",
    ),
    _Hint(
        "The tokenizer was asked for from the Hub: give cfg.tokenizer.tokenizer_model a folder on this machine.",
        types=f"{_HUB_ERRORS} OSError",
        words=r"gated repo|401 client|offline mode|couldn't connect to 'https://huggingface|huggingface\.co",
        files=r"tokeniz",
    ),
    _Hint(_OFFLINE, types=_HUB_ERRORS),
    _Hint(
        _OFFLINE,
        r"gated repo|offline mode|couldn't connect to 'https://huggingface",
        "OSError",
        r"/(transformers|huggingface_hub)/",
    ),
    _Hint(
        "The checkpoint was saved without cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True, so its optimizer "
        "fits no other TP or PP: save it again with that field, or load with cfg.checkpoint.load_optim = False.",
        r"\(TP, PP\) mismatch after resume",
        files=r"/megatron/",
    ),
    _Hint(_PARAMETER_GROUPS, r"^\((None|[\d.e-]+),.*(True|False)\)$", "KeyError", r"/megatron/"),
    _Hint(_PARAMETER_GROUPS, r"^Could not find parameter group with key", "ValueError"),
    _Hint(
        "The checkpoint is of another model: layers, widths and vocabulary of cfg must be those of its run_config.yaml.",
        r"^Global shape mismatch for loaded|^Error\(s\) in loading state_dict for \w+:\s+(Missing|Unexpected) key",
    ),
    _Hint(
        "A token id lies beyond the model's embedding: the data was written with another tokenizer than cfg.tokenizer.",
        r"^index out of range in self$",
        "IndexError",
        r"/tensor_parallel/layers\.py$",
    ),
    _Hint(
        "The schedule of cfg is not that of the checkpoint: cfg.scheduler.override_opt_param_scheduler = True takes the "
        "new one, use_checkpoint_opt_param_scheduler = True keeps the old one.",
        r"^OptimizerParamScheduler: class input value",
        "AssertionError",
    ),
    _Hint(
        "A loss or a gradient is not a number: lower cfg.optimizer.lr or lengthen the warm-up, look at the last batches, "
        "and in half precision at cfg.mixed_precision; lesson 08 shows the signs before it.",
        r"found (NaN|Inf) in local (grad norm|forward loss)|Unexpected result (nan|-?inf)",
        "RuntimeError",
        r"/megatron/core/rerun_state_machine\.py$",
    ),
    _Hint(
        "The checkpoint has no run_config.yaml, so Bridge takes it for one of Megatron-LM's: copy that file beside the "
        "weights from where the checkpoint was made, or save it again.",
        r"^Legacy checkpoint missing 'args' field",
        "RuntimeError",
    ),
    _Hint(
        "A field name in config.yaml is wrong, or from another version: write the file with cfg.to_yaml of the "
        "installed Bridge.",
        r"does not fit Bridge's ConfigContainer: Unexpected config keys",
        "ConfigError",
    ),
)

_SIGNAL_HINTS = {
    "SIGBUS": "A shared memory segment could not grow: make /dev/shm larger.",
    **dict.fromkeys(
        ("SIGSEGV", "SIGILL", "SIGABRT", "SIGFPE"),
        "Native code crashed: run `make doctor`, and look at the end of the rank's log.",
    ),
    "SIGTERM": "Somebody asked the rank to end: a scheduler whose time limit was reached, or a person.",
}

_LAUNCHER_HINT = (
    "Something ended the launcher and not a rank, and the ranks ended with it; if memory ran out (`dmesg | tail` tells), "
    "use a smaller model or fewer ranks. Launch again: a new launcher starts by itself."
)

_UNSEEN_HINT = (
    "Read the end of its log in logs/; if that ends in the middle, memory may have run out (`dmesg | tail` tells)."
)


def hint_for(text: str) -> str:
    """How to fix an error; empty if it is not a known one.

    An error is known by its type, its words, and where it comes from: the words alone stand in many programs.

    Args:
        text: A traceback, a log with tracebacks, or one line `Type: message`.

    Example:
        >>> hint_for("OSError: [Errno 28] No space left on device").split(":")[0]
        'The disk is full'
        >>> hint_for("TypeError: f() got an unexpected keyword argument 'x'")
        ''
    """
    errors = _exceptions(text)
    return next((row.hint for row in _HINTS for error in errors if row.fits(error)), "")


# ------------------------------------------------------------------------------------------------- what a rank says


def record(path: Path, rank: int, error: BaseException) -> bool:
    """Note a rank's exception in `ranks/N.json`; called by the rank itself.

    Returns:
        True if it only lost a peer.
    """
    text = "".join(traceback.format_exception(error))
    message = " ".join(_words(error).split()) or _place(error)
    named = _NAMED.search(message)
    entry = {
        "rank": rank,
        "pid": os.getpid(),
        "stage": "failed",
        "time": time.time(),
        "exception": type(error).__name__,
        "message": message[:2000],
        "tail": text[-3000:],
        "hint": hint_for(text)
        or next(filter(None, map(hint_for, _wrapped(error))), "")
        or " ".join(getattr(error, "__notes__", ())),
        "lost_a_peer": lost_a_peer(text),
        "lost_rank": int(next(filter(None, named.groups()))) if named else None,
    }
    _write_on_a_full_disk(path, lambda: runs.write_json(path / "ranks" / f"{rank}.json", entry))
    return entry["lost_a_peer"]


def _words(error: BaseException) -> str:
    """What an exception says; of torch's CheckpointException the causes, which stand behind a page of frames otherwise."""
    wrapped = _wrapped(error)
    return "\n".join([str(error).partition("\n")[0], *wrapped]) if wrapped else str(error)


def _wrapped(error: BaseException) -> list[str]:
    """The exceptions of the ranks that a CheckpointException collects, each as `Type: message`.

    Source: torch/distributed/checkpoint/api.py @ 2.13.0
    """
    collected = getattr(error, "failures", None)
    pairs = collected.values() if type(error).__name__ == "CheckpointException" and isinstance(collected, dict) else ()
    return [f"{type(cause).__name__}: {cause}" for cause, _ in pairs]


def built_from(error: BaseException, model: object) -> str:
    """Which fields Megatron read where it failed to build a model, for people; empty if the code names none.

    The innermost statement that reads fields counts, and those that are unset, or off their default, which is unset or 0
    first.
    """
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    names = {name for name, value in values.items() if value is None or value != defaults[name]}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        read = [name for name in re.findall(r"\bconfig\W{1,3}(\w+)", _statement(frame)) if name in names]
        if "/megatron/" in frame.filename and read:
            read = sorted(dict.fromkeys(read), key=lambda name: bool(values[name]))
            fields = ", ".join(f"cfg.model.{name}={values[name]!r}" for name in read)
            return f"Megatron was building the model, and read {fields} there: look at these fields first."
    return ""


def _statement(frame: traceback.FrameSummary) -> str:
    lines = range(frame.lineno, (frame.end_lineno or frame.lineno) + 1)
    return " ".join(linecache.getline(frame.filename, number).strip() for number in lines)


def _place(error: BaseException) -> str:
    """Where an exception without words was raised: file, line and the statement, such as a bare `assert`."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    last = frames[-1]
    return f"{last.filename.rpartition('site-packages/')[2]}:{last.lineno}: {_statement(last)}"


def _write_on_a_full_disk(path: Path, write: Callable[[], None]) -> None:
    """Write, and if there is no space, give up the few kilobytes that the launch reserved for these lines."""
    try:
        write()
    except OSError:
        (path / ".reserve").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # who asked still gets the outcome as a value
            write()


# ------------------------------------------------------------------------------------------------------- the verdict


def settle(
    path: Path,
    *,
    dead: dict[int, int | None] | None = None,
    launcher: str = "",
    oom_killed: bool = False,
    provisional: bool = False,
) -> runs.Outcome:
    """Decide how a run ended and write `outcome.json`, unless a verdict stands already that is not provisional.

    Args:
        dead: Exit codes of the ranks that ended before the launcher ended the others, by rank; negative for a signal,
            `None` if a rank is gone and nobody saw how.  By default what torchrun wrote into the launcher's log.
        oom_killed: Whether the kernel counts a process killed for want of memory during the run.
        provisional: For a rank, which speaks while others may know more: the next verdict replaces this one.
    """
    run = runs.Run(path)
    if run.outcome is not None and not run.outcome.provisional:
        return run.outcome
    outcome = _decide(run, _torchrun_saw(run) if dead is None else dead, launcher, oom_killed)
    outcome = dataclasses.replace(outcome, finished=time.time(), provisional=provisional, warnings=run.warnings)
    _write_on_a_full_disk(path, lambda: runs.write_outcome(path, outcome))
    return outcome


def abandon(path: Path) -> None:
    """Note that whoever started a run is gone, unless it ended before; nobody else will write its last word."""
    run = runs.Run(path)
    if run.launch and (run.outcome is None or run.outcome.provisional):
        outcome = runs.Outcome("interrupted", cause="the program that started the run is gone, and the ranks with it")
        _write_on_a_full_disk(path, lambda: runs.write_outcome(path, outcome))


_WEAK = {signal.SIGABRT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE}
"""Signals that end a rank also because another one is gone: NCCL's watchdog aborts, schedulers ask politely."""


def _decide(run: runs.Run, dead: dict[int, int | None], launcher: str, oom_killed: bool) -> runs.Outcome:
    ranks = run.ranks()
    world = run.launch.get("ranks", len(ranks))
    stages = {rank: r["stage"] for rank, r in ranks.items()}
    if len(ranks) == world and set(stages.values()) == {"done"} and not dead:
        return runs.Outcome("succeeded")
    failed = {rank: r for rank, r in ranks.items() if r["stage"] == "failed"}
    # The fork server's end interrupts its ranks
    causes = {r: e for r, e in failed.items() if not e["lost_a_peer"] and e["exception"] != "KeyboardInterrupt"}
    codes = {rank: code for rank, code in dead.items() if code is not None and rank not in causes}
    silent = {rank: code for rank, code in codes.items() if rank not in failed}
    missing = {rank for rank in range(world) if stages.get(rank) not in ("failed", "done")}
    accused = _accused(failed)

    def first(candidates: Iterable[int]) -> int:
        return min(accused.intersection(candidates) or candidates)

    if strong := [rank for rank, code in silent.items() if code < 0 and -code not in _WEAK]:
        rank = first(strong)
        return _killed(run, rank, silent[rank], oom_killed)
    if causes:
        named = [causes[rank] for rank in accused.intersection(causes)]
        entry = min(named or causes.values(), key=lambda r: r["time"])
        return (entry["exception"] == "CheckpointException" and _could_not_write(run)) or _raised(entry)
    if launcher:
        hint = hint_for(_launchers_words(run)) or _LAUNCHER_HINT
        return runs.Outcome("failed", cause=launcher[:500], tail=_end_of(_launchers_words(run)), hint=hint)
    if silent:
        rank = first(silent)
        if silent[rank] < 0:
            return _killed(run, rank, silent[rank], oom_killed)
        cause = f"rank {rank} exited with code {silent[rank]}"
        return runs.Outcome("failed", rank, cause, None, _end_of(run.log(rank)), hint_for(run.log(rank)))
    gone = {rank for rank in missing if rank in dead or (rank in ranks and _gone(ranks[rank]["pid"]))}
    suspects = accused & missing or gone
    if len(suspects) == 1:
        return _lost(run, suspects.pop(), failed)
    if failed and not suspects:
        return _raised(min(failed.values(), key=lambda r: r["time"]))
    if suspects:
        who = ", ".join(map(str, sorted(suspects)))
        cause = f"ranks {who} are gone without a word, and nobody saw how they ended"
        return runs.Outcome("failed", cause=cause, tail=_end_of(_launchers_words(run)), hint=_UNSEEN_HINT)
    words = _launchers_words(run)
    return runs.Outcome("failed", cause="the ranks ended without a word", tail=_end_of(words), hint=hint_for(words))


def _accused(failed: dict[int, dict]) -> set[int]:
    """The ranks that others say they lost, and that lost nobody themselves: where a chain of losses begins."""
    lost = {rank: entry.get("lost_rank") for rank, entry in failed.items() if entry["lost_a_peer"]}
    return {peer for peer in lost.values() if peer is not None and peer not in lost}


def _raised(entry: dict) -> runs.Outcome:
    cause = f"rank {entry['rank']} raised {entry['exception']}: {entry['message']}"
    hint = entry["hint"]
    if entry["lost_a_peer"]:
        hint = "It lost another rank; that rank's log ends where the trouble began."
    return runs.Outcome("failed", entry["rank"], cause[:500], entry["exception"], entry["tail"], hint)


def _lost(run: runs.Run, rank: int, failed: dict[int, dict]) -> runs.Outcome:
    """The outcome where others miss a rank that said nothing, and whose exit nobody saw."""
    stage = run.ranks().get(rank, {}).get("stage", runs.STAGES[0])
    cause = f"rank {rank} was lost while {stage}, and nobody saw how it ended"
    witness = next((r for r in failed.values() if r.get("lost_rank") == rank), None)
    if witness:
        cause += f"; rank {witness['rank']} says: {witness['message']}"
    hint = hint_for(run.log(rank)) or _UNSEEN_HINT
    return runs.Outcome("failed", rank, cause[:500], None, _end_of(run.log(rank)), hint)


def _could_not_write(run: runs.Run) -> runs.Outcome | None:
    """Megatron Core's exception of a failed save loses the reason, which stands in the log of the rank that met it."""
    for rank in sorted(run.ranks()):
        if found := _WRITE_ERROR.findall(run.log(rank)):
            cause = f"rank {rank} could not write its part of a checkpoint: {found[-1]}"
            tail, hint = _end_of(run.log(rank)), hint_for(found[-1])
            return runs.Outcome("failed", rank, cause[:500], "CheckpointException", tail, hint)
    return None


def signal_name(code: int) -> str:
    """The name of the signal behind a negative exit code, such as `"SIGKILL"` for -9."""
    known = -code in set(signal.Signals)
    return signal.Signals(-code).name if known else f"signal {-code}"  # a real-time signal has no name


def _killed(run: runs.Run, rank: int, code: int, oom_killed: bool) -> runs.Outcome:
    name = signal_name(code)
    entry = run.ranks().get(rank, {})
    cause = f"rank {rank} was killed by {name} while {entry.get('stage', runs.STAGES[0])}"
    hint = _SIGNAL_HINTS.get(name, "")
    if name == "SIGKILL":
        words, hint = _who_sent_sigkill(entry.get("pid"), run.launch.get("started", 0.0), oom_killed)
        cause += words
    return runs.Outcome("failed", rank, cause, name, _end_of(run.log(rank)), hint)


def _who_sent_sigkill(pid: int | None, started: float, oom_killed: bool) -> tuple[str, str]:
    """What to add to the cause, and what to do: the kernel's log names the rank, its count grew, or nothing is known."""
    smaller = "Use a smaller model, micro_batch_size or seq_length, or fewer ranks."
    if pid in _killed_for_memory(started):
        return ", by the kernel for want of memory", f"The kernel's out-of-memory killer ended it. {smaller}"
    if oom_killed:
        words = "The kernel's out-of-memory killer ended a process of this control group during the run."
        return ", most likely by the kernel for want of memory", f"{words} {smaller}"
    words = "Nobody in this run sends SIGKILL; the usual sender is the kernel's out-of-memory killer (`dmesg | tail` tells)."
    return ", perhaps by the kernel for want of memory", f"{words} {smaller}"


def oom_kills() -> int:
    """How many processes of this control group the kernel has killed for want of memory; 0 where it does not say.

    Source: Linux Documentation/admin-guide/cgroup-v2.rst, memory.events; cgroup-v1/memory.rst, memory.oom_control
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                name = "memory.oom_control" if controllers else "memory.events"
                counter = Path("/sys/fs/cgroup", controllers, group.lstrip("/"), name)
                if counter.exists() and (found := re.search(r"^oom_kill (\d+)$", counter.read_text(), re.MULTILINE)):
                    return int(found[1])
    return 0


def _killed_for_memory(since: float) -> set[int]:
    """The pids that the kernel's log names as killed for want of memory since a Unix time; none if it is not readable."""
    booted, found = time.time() - time.monotonic(), set()
    with contextlib.suppress(OSError):
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while record := os.read(log, 8192).decode(errors="replace"):
                about, _, text = record.partition(";")
                if (hit := re.search(r"Killed process (\d+)", text)) and booted + int(
                    about.split(",")[2]
                ) / 1e6 > since:
                    found.add(int(hit[1]))
        finally:
            os.close(log)
    return found


def left(run: runs.Run) -> dict[int, None]:
    """Ranks that are gone although they neither finished nor failed; how they ended is not known, so each has `None`.

    A library that ends a process with code 0 leaves like this; a launcher that counts failures would wait forever.
    """
    return {rank: None for rank, r in run.ranks().items() if r["stage"] not in ("failed", "done") and _gone(r["pid"])}


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


_TORCHRUN_SAW = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+) \(pid: (\d+)\)")
_TORCHRUN_ENDED = re.compile(r"Sending process (\d+) closing signal")
"""Source: torch/distributed/elastic/multiprocessing/{errors/__init__,api}.py @ 2.13.0"""


def _torchrun_saw(run: runs.Run) -> dict[int, int | None]:
    """Exit codes by rank from torchrun's report in the launcher's log, without those of ranks that it ended itself."""
    words = _launchers_words(run)
    ended = set(_TORCHRUN_ENDED.findall(words))
    return {int(rank): int(code) for rank, code, pid in _TORCHRUN_SAW.findall(words) if pid not in ended}


def _end_of(text: str) -> str:
    return "\n".join(text.splitlines()[-12:])


def _launchers_words(run: runs.Run) -> str:
    path = run.path / "logs" / "launcher.log"
    return path.read_text(errors="replace") if path.exists() else ""


def describe(run: runs.Run, outcome: runs.Outcome) -> str:
    """An outcome on one screen: the cause, the last lines, the fix, and where to read more."""
    lines = [f"run {run.name!r} {outcome.status}: {outcome.cause}"]
    if outcome.hint:
        lines.append(f"what to do: {outcome.hint}")
    tail = [line for line in outcome.tail.splitlines() if line.strip()][-8:]
    if tail:
        who = f"rank {outcome.rank}" if outcome.rank is not None else "the launcher"
        lines += [f"last lines of {who}:", *(f"  {line[:160]}" for line in tail)]
    log = f"logs/rank_{outcome.rank}.log" if outcome.rank is not None else "logs/launcher.log"
    lines.append(f"everything it wrote: {run.path / log}")
    return "\n".join(lines)

"""Which rank failed first, and what to do about it.

Eight ranks that fail look like eight errors.  Seven of them only lost the eighth.  The rules here tell them apart: a rank
that raised an error of its own beats one that was killed by a signal, because the launcher ends the others that way; a
killed one beats those that only lost a peer; and among equals the earliest wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from course_lib import runs

__all__ = ["describe", "hint_for", "left", "lost_a_peer", "record", "settle"]

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused|timeout)|broken pipe|socket (timeout|closed)|"
    r"gloo.*(timed out|timeout)|application timeout caused pair closure|read error|write error|"
    r"nccl.*(remote process|timeout)|store.*(timeout|closed)",
    re.IGNORECASE,
)

_WRITE_ERROR = re.compile(r"Local worker \d+ encountered an error: (.+)")
"""Source: megatron-core dist_checkpointing/strategies/filesystem_async.py @ 0.19.2"""

_HINTS = (
    (
        r"/dev/shm|sem_open|SemLock|multiprocessing/synchronize",
        "Shared memory is too small: make /dev/shm larger (Docker: --shm-size=8g).",
    ),
    (
        r"No space left on device|Disk quota|Errno 28",
        "The disk is full: free space, or point COURSE_RUNS at another disk.",
    ),
    (
        r"not enough memory|can't allocate memory|Cannot allocate memory|MemoryError|out of memory",
        "Out of memory: use a smaller micro_batch_size or seq_length, a smaller model, or fewer ranks.",
    ),
    (
        r"SIGKILL",
        "Nobody in this run sends SIGKILL; the usual sender is the kernel's out-of-memory killer (`dmesg | tail` tells). "
        "Use a smaller model, micro_batch_size or seq_length, or fewer ranks.",
    ),
    (r"SIGBUS", "A shared memory segment could not grow: make /dev/shm larger."),
    (r"SIGSEGV|SIGILL|SIGABRT", "Native code crashed: run `make doctor`, and look at the end of the rank's log."),
    (
        r"Address already in use|EADDRINUSE",
        "Another program took the port; launch again: each launch asks for a free one.",
    ),
    (
        r"gated repo|401 Client|offline mode|couldn't connect to 'https://huggingface",
        "The Hub was asked for something; build the model from data/ (course_lib.recipes.offline) instead.",
    ),
    (
        r"\(TP, PP\) mismatch after resume",
        "The checkpoint was saved without cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True, so its optimizer "
        "fits no other TP or PP: save it again with that field, or load with cfg.checkpoint.load_optim = False.",
    ),
    (
        r"KeyError: \(.*, (True|False)\)|Could not find parameter group with key",
        "cfg.optimizer has another lr, min_lr or weight decay than the checkpoint, and Megatron Core finds its parameter "
        "groups by these: set them back, or start the optimizer and its schedule anew with cfg.checkpoint.load_optim = "
        "False.",
    ),
    (
        r"OptimizerParamScheduler: class input value",
        "The schedule of cfg is not that of the checkpoint: cfg.scheduler.override_opt_param_scheduler = True takes the "
        "new one, use_checkpoint_opt_param_scheduler = True keeps the old one.",
    ),
    (
        r"unexpected keyword argument|extra keys|not a field",
        "A field name in config.yaml is wrong; see the list above.",
    ),
)


def lost_a_peer(message: str) -> bool:
    """True if an error only says that another rank went away.

    Example:
        >>> lost_a_peer("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234")
        True
        >>> lost_a_peer("mat1 and mat2 shapes cannot be multiplied")
        False
    """
    return bool(_LOST_PEER.search(message))


def hint_for(text: str) -> str:
    """How to fix an error, from its text; empty if it is not a known one.

    Example:
        >>> hint_for("OSError: [Errno 28] No space left on device").split(":")[0]
        'The disk is full'
    """
    return next((hint for pattern, hint in _HINTS if re.search(pattern, text, re.IGNORECASE)), "")


def record(path: Path, rank: int, error: BaseException) -> None:
    """Note a rank's exception in `ranks/N.json`; called by the rank itself.

    Args:
        path: The run directory.
        rank: Global rank.
        error: What it raised.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    entry = {
        "rank": rank,
        "pid": os.getpid(),
        "stage": "failed",
        "time": time.time(),
        "exception": type(error).__name__,
        "message": message[:2000],
        "tail": "".join(traceback.format_exception(error))[-3000:],
        "lost_a_peer": lost_a_peer(message),
    }
    _write_on_a_full_disk(path, lambda: runs.write_json(path / "ranks" / f"{rank}.json", entry))


def _write_on_a_full_disk(path: Path, write: Callable[[], None]) -> None:
    """Write, and if there is no space, give up the few kilobytes that the launch reserved for these lines."""
    try:
        write()
    except OSError:
        (path / ".reserve").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # who asked still gets the outcome as a value
            write()


def settle(path: Path, *, dead: dict[int, int] | None = None) -> runs.Outcome:
    """Decide how a run ended and write `outcome.json`, unless somebody already did.

    Args:
        path: The run directory.
        dead: Exit codes of the ranks that the launcher saw die first, by rank; negative for a signal.

    Returns:
        The outcome that stands in the file.
    """
    run = runs.Run(path)
    if run.outcome is not None:
        return run.outcome
    outcome = dataclasses.replace(_decide(run, dead or {}), finished=time.time())
    _write_on_a_full_disk(path, lambda: runs.write_outcome(path, outcome))
    return outcome


def _decide(run: runs.Run, dead: dict[int, int]) -> runs.Outcome:
    ranks = run.ranks()
    world = run.launch.get("ranks", len(ranks))
    failed = {rank: r for rank, r in ranks.items() if r["stage"] == "failed"}
    killed = {rank: code for rank, code in dead.items() if code < 0 and rank not in failed}
    causes = {rank: r for rank, r in failed.items() if not r["lost_a_peer"]}
    if len(ranks) == world and all(r["stage"] == "done" for r in ranks.values()) and not dead:
        return runs.Outcome("succeeded")
    if causes:
        first = min(causes.values(), key=lambda r: r["time"])
        return (first["exception"] == "CheckpointException" and _could_not_write(run)) or _raised(first)
    if killed:
        return _killed(run, min(killed), killed[min(killed)])
    if unexplained := [rank for rank in dead if rank not in failed]:
        rank, tail = min(unexplained), _tail(run, min(unexplained))
        return runs.Outcome("failed", rank, f"rank {rank} exited with code {dead[rank]}", None, tail, hint_for(tail))
    if gone := [rank for rank, r in ranks.items() if r["stage"] not in ("failed", "done") and _gone(r["pid"])]:
        return _killed(run, min(gone), -signal.SIGKILL)
    if failed:
        return _raised(min(failed.values(), key=lambda r: r["time"]))
    tail = _tail_of_launcher(run)
    return runs.Outcome("failed", cause="the ranks ended without a word", tail=tail, hint=hint_for(tail))


def _raised(entry: dict) -> runs.Outcome:
    cause = f"rank {entry['rank']} raised {entry['exception']}: {entry['message']}"
    hint = hint_for(f"{entry['exception']}: {entry['message']}")
    if entry["lost_a_peer"]:
        hint = "It lost another rank; that rank's log ends where the trouble began."
    return runs.Outcome("failed", entry["rank"], cause[:500], entry["exception"], entry["tail"], hint)


def _could_not_write(run: runs.Run) -> runs.Outcome | None:
    """Megatron Core's exception of a failed save loses the reason, which stands in the log of the rank that met it."""
    for rank in sorted(run.ranks()):
        if found := _WRITE_ERROR.findall(run.log(rank)):
            cause = f"rank {rank} could not write its part of a checkpoint: {found[-1]}"
            return runs.Outcome("failed", rank, cause[:500], "CheckpointException", _tail(run, rank), hint_for(cause))
    return None


def _killed(run: runs.Run, rank: int, code: int) -> runs.Outcome:
    known = -code in set(signal.Signals)
    name = signal.Signals(-code).name if known else f"signal {-code}"  # a real-time signal has no name
    stage = run.ranks().get(rank, {}).get("stage", runs.STAGES[0])
    cause = f"rank {rank} was killed by {name} while {stage}"
    return runs.Outcome("failed", rank, cause, name, _tail(run, rank), hint_for(name))


def left(run: runs.Run) -> dict[int, int]:
    """Ranks that are gone although they neither finished nor failed, each with exit code 0.

    A library that ends a process by itself leaves like this; the launcher, who counts failures, would wait forever.
    """
    return {rank: 0 for rank, r in run.ranks().items() if r["stage"] not in ("failed", "done") and _gone(r["pid"])}


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _tail(run: runs.Run, rank: int) -> str:
    return "\n".join(run.log(rank).splitlines()[-12:])


def _tail_of_launcher(run: runs.Run) -> str:
    path = run.path / "logs" / "launcher.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-12:]) if path.exists() else ""


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

"""Is this machine fit for the lessons? One function for each reading.

Each takes its reading as an argument and returns a `Finding`.
Called without arguments it reads this machine; a test hands in another reading.
"""

from __future__ import annotations

import contextlib
import locale
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from course_lib import runs, stack
from course_lib.common import project
from course_lib.common.units import GiB
from course_lib.launch.torchrun import address_of, gloo_address, talk_over
from course_lib.machine import bootstrap

OPEN_FILES = 1024  # eight ranks hold some hundred sockets and files each at their start
SHARED_MEMORY_BYTES = GiB  # Docker's default is 64 MiB, too little for NCCL and for DataLoader workers
RUNS_DISK_BYTES = GiB  # one run writes some MiB; a checkpoint of the lessons' models some hundred


def findings() -> list[Finding]:
    """Every reading of this machine."""
    folder, names = runs.directory(), stack.gpus()
    return [
        settings(),
        python(),
        glibc(),
        cores(),
        memory(),
        disk(folder),
        shared_memory(),
        gpus(names),
        *([topology(), locked_memory()] if names else []),
        open_files(),
        text_encoding(),
        bytecode(),
        hub(),
        runs_writable(folder),
        loopback(),
        gloo(),
    ]


def settings(*, environment: Mapping[str, str] = os.environ) -> Finding:
    """The variables that begin with COURSE_: each is one that the course reads, with a value that has a meaning."""
    mine = sorted(name for name in environment if name.startswith("COURSE_"))
    wrong = [words for name in mine if (words := project.refusal(name, environment[name]))]
    value = "; ".join(wrong) or (f"{', '.join(mine)} set" if mine else "none set")
    return fail_unless(not wrong, "COURSE_* variables", value, "Unset what is wrong, or set it right.")


def python(*, version: Sequence[int] = sys.version_info[:3]) -> Finding:
    """Bridge 0.6.2 requires Python >= 3.12, < 3.13."""
    fix = "Run `make setup`, then use `.venv/bin/python`: Megatron-Bridge 0.6.2 needs Python 3.12."
    return fail_unless(tuple(version[:2]) == (3, 12), "Python", ".".join(map(str, version)), fix)


def glibc(*, version: tuple[int, ...] | None = None) -> Finding:
    """PyTorch's wheels ask for glibc 2.28."""
    version = bootstrap.glibc_version() if version is None else version
    value = ".".join(map(str, version)) or "another C library"
    fix = "Use a distribution with glibc 2.28 or later, or a container of one."
    return fail_unless(version >= bootstrap.OLDEST_GLIBC, "glibc", value, fix)


def available_cores(*, cgroup: str = "/sys/fs/cgroup") -> float:
    """Cores that this process may use: its affinity, or the container's share where that is less.

    Args:
        cgroup: Root of the control group files, version 2 or 1.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # no such file; or "max", which is no limit
            text = " ".join(Path(cgroup, name).read_text(encoding="ascii") for name in files)
            quota, period = map(int, text.split())
            return min(cores, quota / period) if quota > 0 else cores
    return cores


def cores(*, count: float | None = None) -> Finding:
    """Eight ranks share the cores; below two a run takes long but works."""
    count = available_cores() if count is None else count
    fix = "Give the container two cores or more: with one, runs take twice the minutes."
    return warn_unless(count >= 2, "cores", f"{count:g}", fix)


def memory(*, total_bytes: int | None = None) -> Finding:
    """Memory of the machine, or the container's limit."""
    total_bytes = bootstrap.memory_bytes() if total_bytes is None else total_bytes
    needed = bootstrap.MINIMUM_MEMORY_BYTES
    fix = f"Give the machine or container {needed / GiB:.0f} GiB: eight ranks need it."
    return fail_unless(total_bytes >= needed, "memory", f"{total_bytes / GiB:.1f} GiB", fix)


def disk(folder: Path, *, free_bytes: int | None = None) -> Finding:
    """Room for what training leaves behind."""
    free_bytes = shutil.disk_usage(_existing(folder)).free if free_bytes is None else free_bytes
    fix = "Free 1 GiB (`make clean` removes old runs), or set COURSE_RUNS to a folder with room."
    return fail_unless(free_bytes >= RUNS_DISK_BYTES, "disk", f"{free_bytes / GiB:.1f} GiB free for {folder}", fix)


def runs_writable(folder: Path) -> Finding:
    """Training leaves its files in runs/."""
    fix = f"{runs.RUNS_FIX[0].upper()}{runs.RUNS_FIX[1:]}."
    reason = runs.unwritable(folder)
    return fail_unless(not reason, "runs folder", reason or str(folder), fix)


def _existing(folder: Path) -> Path:
    """The nearest folder that exists and may be seen."""
    return next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))


def shared_memory(*, folder: Path = Path("/dev/shm"), size_bytes: int | None = None) -> Finding:
    """NCCL and DataLoader workers pass data through /dev/shm; the lessons on a CPU do without."""
    if size_bytes is None:
        size_bytes = shutil.disk_usage(folder).total if folder.exists() else 0
    fix = "Start the container with `--shm-size=8g` (or `mount -o remount,size=8g /dev/shm`): NCCL needs it on GPUs."
    return warn_unless(size_bytes >= SHARED_MEMORY_BYTES, "shared memory", f"{size_bytes / GiB:.2f} GiB", fix)


def gpus(names: Sequence[str] | None, *, device: Callable[[int], str] = stack.device) -> Finding:
    """None needed: with fewer than eight GPUs the same eight ranks run on the CPU.

    Args:
        names: What `stack.gpus` returned.
        device: Says where so many ranks would run, "cpu" or "cuda"; ValueError if what it was told is neither.
    """
    try:
        chosen = device(stack.LESSON_RANKS)
    except ValueError as error:
        return Finding("GPUs", "fail", str(error).split(";")[0], "Run `unset COURSE_DEVICE`, or set it to cpu or cuda.")
    if names is None:
        fix = "Run `nvidia-smi` and mend the driver if this machine has GPUs; without them the lessons run on the CPU."
        return Finding("GPUs", "warn", "nvidia-smi is there and fails", fix)
    if not names:
        return Finding("GPUs", "ok", "none: the ranks run on the CPU")
    where = "eight ranks use them" if chosen == "cuda" else "eight ranks run on the CPU"
    return Finding("GPUs", "ok", f"{len(names)} x {names[0]} ({where})")


def topology(*, seconds: float = 20.0) -> Finding:
    """How the GPUs are wired: tensor parallelism wants NVLink between all of them.

    Source: the legend of `nvidia-smi topo -m`: NV# is NVLink, SYS and NODE go through the processors, PHB, PXB and PIX
    through PCIe.
    """
    command = ["nvidia-smi", "topo", "-m"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        fix = "Run `nvidia-smi topo -m` and mend the driver: without it nobody knows how the GPUs are wired."
        return Finding("GPU topology", "warn", f"`nvidia-smi topo -m` fails: {type(error).__name__}", fix)
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", told).splitlines()]
    count = sum(row[0].startswith("GPU") and row[0][3:].isdigit() for row in rows if row) - 1  # but for the header
    if count < 0 or any(len(row) < count + 1 for row in rows[1 : count + 1]):
        return Finding("GPU topology", "warn", "`nvidia-smi topo -m` gave no matrix", "Run it and read it yourself.")
    links = {f"GPU{a}-GPU{b}": rows[a + 1][b + 1] for a in range(count) for b in range(a + 1, count)}
    kinds = sorted(set(links.values()))
    slow = {pair: kind for pair, kind in links.items() if not kind.startswith("NV")}
    if not slow:
        return Finding("GPU topology", "ok", f"{', '.join(kinds)} between all pairs" if links else "one GPU")
    pair, kind = next(iter(slow.items()))
    value = f"{len(slow)} of {len(links)} pairs without NVLink, {pair} by {kind}"
    fix = "Keep tensor parallelism among GPUs that NVLink connects: see `nvidia-smi topo -m`, and choose TP by it."
    return Finding("GPU topology", "warn", value, fix)


def locked_memory(*, limit: int | None = None) -> Finding:
    """NCCL and pinned buffers lock memory; Docker's default limit is 64 KiB (or 8 MiB)."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    fix = "Start the container with `--ulimit memlock=-1`, or run `ulimit -l unlimited`."
    unlimited = limit == resource.RLIM_INFINITY
    value = "unlimited" if unlimited else f"{limit / GiB:.3f} GiB"
    return warn_unless(unlimited or limit >= SHARED_MEMORY_BYTES, "locked memory", value, fix)


def open_files(*, limit: int | None = None) -> Finding:
    """The soft limit on open files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    unlimited = limit == resource.RLIM_INFINITY
    fix = f"Run `ulimit -n {4 * OPEN_FILES}` in the shell that starts the course."
    return warn_unless(unlimited or limit >= OPEN_FILES, "open files", "unlimited" if unlimited else str(limit), fix)


def text_encoding(*, encoding: str | None = None) -> Finding:
    """Configuration and corpus files are UTF-8; some libraries open files in the locale's encoding."""
    encoding = encoding or locale.getpreferredencoding(False)
    fix = "Run `export LC_ALL=C.UTF-8` (or PYTHONUTF8=1) before the course."
    return warn_unless(encoding.lower() in ("utf-8", "utf8", "utf_8"), "text encoding", encoding, fix)


def bytecode(*, environment: Mapping[str, str] = os.environ) -> Finding:
    """Without bytecode every process compiles some 7,000 modules again."""
    if environment.get("PYTHONDONTWRITEBYTECODE"):
        fix = "Run `unset PYTHONDONTWRITEBYTECODE` (the Makefile does so for its own commands)."
        return Finding("bytecode", "warn", "PYTHONDONTWRITEBYTECODE is set: imports may take a minute longer", fix)
    return Finding("bytecode", "ok", "written at import")


def hub(*, environment: Mapping[str, str] = os.environ) -> Finding:
    """No lesson logs in to the Hugging Face Hub; a token does no harm, and is never shown."""
    token = "set, unused" if environment.get("HF_TOKEN") else "not set"
    return Finding("Hugging Face Hub", "ok", f"not needed (a token is {token})")


# ----------------------------------------------------------------------------------------------------- the network


def loopback(*, talk: Callable[[str], None] = talk_over, seconds: float = 1.0) -> Finding:
    """The ranks first meet at `localhost`; the arguments are those of `gloo`."""
    try:
        talk("127.0.0.1")
        return Finding("loopback", "ok", f"localhost is {address_of('localhost', seconds)}")
    except OSError as error:
        fix = "Bring loopback up (`ip link set lo up`) and keep the line `127.0.0.1 localhost` in /etc/hosts."
        return Finding("loopback", "fail", f"localhost does not work: {error}", fix)


def gloo(
    *,
    environment: Mapping[str, str] = os.environ,
    hostname: str | None = None,
    talk: Callable[[str], None] = talk_over,
    seconds: float = 1.0,
) -> Finding:
    """Whether gloo can bind where it will try to.

    Gloo takes the interface of GLOO_SOCKET_IFNAME; else the address of the host's name; else, with a warning, loopback.

    Args:
        hostname: The host's name; asked from the system if None.
    """
    interface, hostname = environment.get("GLOO_SOCKET_IFNAME"), hostname or socket.gethostname()
    try:
        address = gloo_address(environment=environment, hostname=hostname, talk=talk, seconds=seconds)
        return Finding("gloo", "ok", f"binds to {address} ({interface or hostname})")
    except OSError as error:
        if interface:
            fix = "Run `unset GLOO_SOCKET_IFNAME`, or set it to `lo`."
            return Finding("gloo", "fail", f"GLOO_SOCKET_IFNAME={interface}: {error}", fix)
        fix = f"Run `export GLOO_SOCKET_IFNAME=lo`, or add the line `127.0.0.1 {hostname}` to /etc/hosts."
        return Finding("gloo", "warn", f"cannot bind to the host name {hostname!r}: {error}", fix)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        status: "ok"; "warn" if every lesson still runs; "fail" if one could not.
        value: What was found, with its unit.
        fix: What to do about it; empty exactly when the status is "ok".
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") == bool(self.fix):
            raise ValueError(
                f"finding {self.name!r} is {self.status!r} with the fix {self.fix!r}: a fix belongs to a problem only"
            )


def fail_unless(holds: bool, name: str, value: str, fix: str) -> Finding:
    """A finding that stops lessons unless it holds.

    Example:
        >>> fail_unless(6 >= 8, "memory", "6 GiB", "Give it 8 GiB.").status
        'fail'
    """
    return Finding(name, "ok", value) if holds else Finding(name, "fail", value, fix)


def warn_unless(holds: bool, name: str, value: str, fix: str) -> Finding:
    """A finding that the learner should know of unless it holds.

    Example:
        >>> warn_unless(2 >= 2, "cores", "2", "Give it two cores.")
        Finding(name='cores', status='ok', value='2', fix='')
    """
    return Finding(name, "ok", value) if holds else Finding(name, "warn", value, fix)

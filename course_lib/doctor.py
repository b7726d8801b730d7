"""What can this machine run, and what is wrong with it? `course doctor`.

Each check is a function that takes its readings as arguments and returns one or more `Finding`. Whoever calls it
without arguments gets the readings of this machine; a test hands in others. No check imports torch or megatron: versions
come from the installed metadata and places from the import system, so the whole report takes about a second.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from course_lib import bootstrap

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Finding", "Lesson", "Package", "Report", "lessons_that_run", "main", "report", "table"]

GIB = bootstrap.GIB
GPUS_FOR_A_LESSON = 8
FILE_DESCRIPTORS = 1024  # eight ranks hold some hundred sockets and files each at their start
SHARED_MEMORY_BYTES = GIB  # Docker's default is 64 MiB, too little for NCCL and for DataLoader workers
RUNS_DISK_BYTES = GIB  # one run writes some MiB; a checkpoint of the lessons' models some hundred

# Distributions of NVIDIA's stack and what Python imports them as. Those that are not installed are listed too.
PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "megatron-bridge": "megatron.bridge",
    "megatron-energon": "megatron.energon",
    "nvidia-modelopt": "modelopt",
    "nemo-run": "nemo_run",
    "transformer-engine": "transformer_engine",
    "nvidia-resiliency-ext": "nvidia_resiliency_ext",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "flash-linear-attention": "fla",
    "emerging-optimizers": "emerging_optimizers",
    "nvidia-nccl-cu13": "nvidia.nccl",
}
PINNED = ("torch", "megatron-core", "megatron-bridge")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        name: What was looked at.
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


@dataclass(frozen=True)
class Package:
    """An installed distribution: `version` and `file` are None where it is absent."""

    name: str
    module: str
    version: str | None
    file: str | None


@dataclass(frozen=True)
class Lesson:
    """Whether a lesson runs live on this machine; `reason` says where it runs, or what stops it."""

    number: str
    title: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that `course doctor` knows; `stand_ins` are those of `course_lib.stack`."""

    findings: tuple[Finding, ...]
    packages: tuple[Package, ...]
    stand_ins: tuple[Any, ...]
    lessons: tuple[Lesson, ...]

    @property
    def exit_code(self) -> int:
        """1 if a lesson could not run, else 0."""
        return int(any(not lesson.runs for lesson in self.lessons) or any(f.status == "fail" for f in self.findings))


# ------------------------------------------------------------------------------------------------------ the machine


def python(*, version: Sequence[int] | None = None) -> Finding:
    """Bridge 0.6.2 requires Python >= 3.12, < 3.13."""
    version = tuple(sys.version_info[:3] if version is None else version)
    text = ".".join(map(str, version))
    if version[:2] == (3, 12):
        return Finding("Python", "ok", text)
    return Finding(
        "Python",
        "fail",
        text,
        "Run `make setup`, then use `.venv/bin/python`: Megatron-Bridge 0.6.2 needs Python 3.12.",
    )


def glibc(*, version: tuple[int, int] | None = None) -> Finding:
    """PyTorch's wheels ask for glibc 2.28."""
    version = bootstrap.glibc_version() if version is None else version
    if version is None:
        return Finding(
            "glibc", "fail", "another C library", "Use a distribution with glibc 2.28 or later, or a container of one."
        )
    text = f"{version[0]}.{version[1]}"
    if version < bootstrap.OLDEST_GLIBC:
        return Finding("glibc", "fail", text, "Use a distribution with glibc 2.28 or later, or a container of one.")
    return Finding("glibc", "ok", text)


def available_cores(*, cgroup: str = "/sys/fs/cgroup") -> float:
    """Cores that this process may use: its affinity, or the container's share where that is less.

    Args:
        cgroup: Root of the control group files, version 2 or 1.
    """
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (Path(cgroup) / "cpu.max").read_text(encoding="ascii").split()
        return min(cores, int(quota) / int(period))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            int((Path(cgroup) / f"cpu/cpu.cfs_{n}_us").read_text(encoding="ascii")) for n in ("quota", "period")
        )
        if quota > 0:
            return min(cores, quota / period)
    return cores


def cores(*, count: float | None = None) -> Finding:
    """Eight ranks share the cores; below two a run takes long but works."""
    count = available_cores() if count is None else count
    if count < 2:
        return Finding(
            "cores",
            "warn",
            f"{count:g}",
            "Give the container two cores or more: with one, runs take twice the minutes.",
        )
    return Finding("cores", "ok", f"{count:g}")


def memory(*, total_bytes: int | None = None) -> Finding:
    """Memory of the machine or of the container's limit, in GiB."""
    total_bytes = bootstrap.memory_bytes() if total_bytes is None else total_bytes
    text, needed = f"{total_bytes / GIB:.1f} GiB", bootstrap.MINIMUM_MEMORY_BYTES
    if total_bytes < needed:
        return Finding(
            "memory", "fail", text, f"Give the machine or container {needed / GIB:.0f} GiB: eight ranks need it."
        )
    return Finding("memory", "ok", text)


def disk(path: Path, *, free_bytes: int | None = None) -> Finding:
    """Room for what training leaves behind."""
    if free_bytes is None:
        import shutil

        free_bytes = shutil.disk_usage(_existing(path)).free
    text = f"{free_bytes / GIB:.1f} GiB free for {path}"
    if free_bytes < RUNS_DISK_BYTES:
        return Finding(
            "disk",
            "fail",
            text,
            "Free 1 GiB (`make clean` removes old runs), or set COURSE_RUNS to a folder with room.",
        )
    return Finding("disk", "ok", text)


def shared_memory(*, size_bytes: int | None = None, path: Path = Path("/dev/shm")) -> Finding:
    """NCCL and DataLoader workers pass data through /dev/shm; the lessons on a CPU do without."""
    if size_bytes is None:
        try:
            size_bytes = os.statvfs(path).f_blocks * os.statvfs(path).f_frsize
        except OSError:
            size_bytes = 0
    text = f"{size_bytes / GIB:.2f} GiB"
    if size_bytes < SHARED_MEMORY_BYTES:
        fix = (
            "Start the container with `--shm-size=8g` (or `mount -o remount,size=8g /dev/shm`): NCCL needs it on GPUs."
        )
        return Finding("shared memory", "warn", text, fix)
    return Finding("shared memory", "ok", text)


def installed_gpus() -> list[str] | None:
    """Names of the NVIDIA GPUs by nvidia-smi; empty if it finds none, None if there is no nvidia-smi or it fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=2)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else None


def gpus(names: Sequence[str] | None) -> Finding:
    """None needed: with fewer than eight GPUs the same eight ranks run on the CPU.

    Args:
        names: What `installed_gpus` returned.
    """
    if names is None:
        fix = "Run `nvidia-smi` and mend the driver if this machine has GPUs; without them the lessons run on the CPU."
        return Finding("GPUs", "warn", "nvidia-smi is there and fails", fix)
    if not names:
        return Finding("GPUs", "ok", "none: the ranks run on the CPU")
    where = "NCCL" if len(names) >= GPUS_FOR_A_LESSON else f"fewer than {GPUS_FOR_A_LESSON}: eight ranks run on the CPU"
    return Finding("GPUs", "ok", f"{len(names)} x {names[0]} ({where})")


def file_descriptors(*, limit: int | None = None) -> Finding:
    """The soft limit on open files."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if 0 <= limit < FILE_DESCRIPTORS:
        return Finding(
            "open files",
            "warn",
            str(limit),
            f"Run `ulimit -n {4 * FILE_DESCRIPTORS}` in the shell that starts the course.",
        )
    return Finding("open files", "ok", str(limit) if limit >= 0 else "unlimited")


def text_encoding(*, encoding: str | None = None) -> Finding:
    """Configuration and corpus files are UTF-8; some libraries open files in the locale's encoding."""
    import locale

    encoding = locale.getpreferredencoding(False) if encoding is None else encoding
    if encoding.lower().replace("-", "").replace("_", "") == "utf8":
        return Finding("text encoding", "ok", encoding)
    return Finding(
        "text encoding", "warn", encoding, "Run `export LC_ALL=C.UTF-8` (or PYTHONUTF8=1) before the course."
    )


def bytecode(*, environment: Mapping[str, str] | None = None) -> Finding:
    """Without bytecode every process compiles some 7,000 modules again."""
    environment = os.environ if environment is None else environment
    if environment.get("PYTHONDONTWRITEBYTECODE"):
        fix = "Run `unset PYTHONDONTWRITEBYTECODE` (the Makefile does so for its own commands)."
        return Finding("bytecode", "warn", "PYTHONDONTWRITEBYTECODE is set: imports may take a minute longer", fix)
    return Finding("bytecode", "ok", "written at import")


def hub(*, environment: Mapping[str, str] | None = None) -> Finding:
    """No lesson logs in to the Hugging Face Hub or reads its cache; a token does no harm."""
    environment = os.environ if environment is None else environment
    has_token = bool(environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"))
    return Finding("Hugging Face Hub", "ok", f"not needed (a token is {'set, unused' if has_token else 'not set'})")


# ----------------------------------------------------------------------------------------------------- the network


def _within(function: Callable[[], Any], seconds: float) -> Any:
    """The function's result; TimeoutError if it takes longer (a name server that does not answer)."""
    box: list[Any] = []

    def call() -> None:
        try:
            box.append((True, function()))
        except Exception as error:  # noqa: BLE001  handed to the caller below
            box.append((False, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer within {seconds:g} s")
    succeeded, value = box[0]
    if not succeeded:
        raise value
    return value


def _talk_over(address: str) -> None:
    """Bind, connect and pass one byte over an address of this machine, as gloo's ranks will."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as server, socket.socket(family) as client:
        server.settimeout(1)
        client.settimeout(1)
        server.bind((address, 0))
        server.listen(1)
        client.connect(server.getsockname()[:2])
        peer, _ = server.accept()
        with peer:
            client.sendall(b"x")
            if peer.recv(1) != b"x":
                raise OSError(f"{address} lost a byte")


def gloo(
    *,
    environment: Mapping[str, str] | None = None,
    hostname: str | None = None,
    talk: Callable[[str], None] = _talk_over,
    seconds: float = 1.0,
) -> list[Finding]:
    """Whether gloo can bind where it will try to.

    Gloo takes the interface of GLOO_SOCKET_IFNAME; else the address of the host's name; else, with a warning, loopback.
    The ranks first meet at `localhost`.

    Args:
        environment: Where GLOO_SOCKET_IFNAME is looked up.
        hostname: The host's name; asked from the system if None.
        talk: Passes a byte over an address; raises OSError if that fails.
        seconds: Longest wait for a name server.

    Source: PyTorch torch/csrc/distributed/c10d/ProcessGroupGloo.cpp createDefaultDevice @ 2.13.0
    """
    environment = os.environ if environment is None else environment
    hostname = socket.gethostname() if hostname is None else hostname
    findings = []
    try:
        talk("127.0.0.1")
        local = _within(lambda: socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM), seconds)
        findings.append(Finding("loopback", "ok", f"localhost is {local[0][4][0]}"))
    except OSError as error:  # gaierror and TimeoutError are OSErrors
        fix = (
            "Bring loopback up (`ip link set lo up`) and keep the line `127.0.0.1 localhost` in /etc/hosts: the "
            "ranks meet there."
        )
        findings.append(Finding("loopback", "fail", f"localhost does not work: {error}", fix))
    interface = environment.get("GLOO_SOCKET_IFNAME")
    if interface:
        import psutil

        known = psutil.net_if_addrs()
        addresses = [
            a.address for name in interface.split(",") for a in known.get(name, []) if a.family == socket.AF_INET
        ]
        try:
            if not addresses:
                raise OSError(f"no such interface with an IPv4 address; there are {', '.join(sorted(known))}")
            talk(addresses[0])
            return [*findings, Finding("gloo", "ok", f"binds to {addresses[0]} (GLOO_SOCKET_IFNAME={interface})")]
        except OSError as error:
            fix = "Run `unset GLOO_SOCKET_IFNAME`, or set it to `lo`."
            return [*findings, Finding("gloo", "fail", f"GLOO_SOCKET_IFNAME={interface}: {error}", fix)]
    try:
        address = _within(lambda: socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM), seconds)[0][4][0]
        talk(address)
        findings.append(Finding("gloo", "ok", f"binds to {address} ({hostname})"))
    except OSError as error:
        fix = f"Run `export GLOO_SOCKET_IFNAME=lo`, or add the line `127.0.0.1 {hostname}` to /etc/hosts."
        findings.append(Finding("gloo", "warn", f"cannot bind to the host name {hostname!r}: {error}", fix))
    return findings


# ---------------------------------------------------------------------------------------------------- the packages


def project() -> Path:
    """Root of the course."""
    return Path(__file__).resolve().parent.parent


def pins(pyproject: Path | None = None) -> dict[str, str]:
    """The versions that the course is tested against, read from pyproject.toml."""
    import re
    import tomllib

    path = pyproject or project() / "pyproject.toml"
    wanted = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    exact = (re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9.]+)", line) for line in wanted)
    return {match[1]: match[2] for match in exact if match}


def installed() -> dict[str, list[importlib.metadata.Distribution]]:
    """Every distribution on the import path by its normal name; two entries under one name shadow each other."""
    found: dict[str, list[importlib.metadata.Distribution]] = {}
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        place = str(distribution.locate_file("")) + "|" + name + "|" + distribution.version
        if name and place not in seen:  # one folder may stand on the path twice
            seen.add(place)
            found.setdefault(name, []).append(distribution)
    return found


def places(module: str) -> list[Path]:
    """Files that importing `module` could mean, first one wins; no parent package is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    if not rest:
        return [Path(spec.origin)] if spec.origin and spec.origin != "built-in" else roots
    folders = [root.joinpath(*rest) for root in roots]
    return [f / "__init__.py" if (f / "__init__.py").exists() else f for f in folders if f.is_dir()]


def packages(distributions: Mapping[str, Sequence[importlib.metadata.Distribution]]) -> tuple[Package, ...]:
    """NVIDIA's packages with version and the file each is imported from."""
    rows = []
    for name, module in PACKAGES.items():
        found = distributions.get(name)
        files = places(module) if found else []
        rows.append(Package(name, module, found[0].version if found else None, str(files[0]) if files else None))
    return tuple(rows)


def foreign_megatron(*, origin: str | None = None) -> Finding:
    """PyPI's `megatron` is another project; its `megatron/__init__.py` hides NVIDIA's namespace package."""
    if origin is None:
        spec = importlib.util.find_spec("megatron")
        if spec is None:
            return Finding("megatron namespace", "fail", "nothing to import", "Run `make setup`.")
        origin = spec.origin
    if origin is None:
        return Finding("megatron namespace", "ok", "NVIDIA's namespace package")
    fix = (
        "Run `pip uninstall -y megatron`, then `make setup`: that name on PyPI is another project, NVIDIA's "
        "is `megatron-core`."
    )
    return Finding("megatron namespace", "fail", f"hidden by {origin}", fix)


def versions(
    rows: Iterable[Package], *, pinned: Mapping[str, str], environment: Mapping[str, str], has_gpus: bool
) -> list[Finding]:
    """Whether torch, core and Bridge are those that the course is tested against.

    On a CPU the redirection refuses other versions, so a difference stops the lessons.
    On GPUs it may only change numbers.
    NVIDIA's container nemo:26.06 carries Bridge 0.5.0 and core 0.18.0.
    """
    found = {row.name: row.version for row in rows}
    container = (
        environment.get("NVIDIA_PRODUCT_NAME")
        or environment.get("NEMO_VERSION")
        or environment.get("NVIDIA_PYTORCH_VERSION")
    )
    findings = []
    for name in PINNED:
        version, wanted = found.get(name), pinned[name]
        if version is not None and version.split("+")[0] == wanted:  # 2.13.0+cpu is 2.13.0
            findings.append(Finding(f"version of {name}", "ok", version))
            continue
        value = f"{version or 'not installed'}, tested with {wanted}" + (
            f" (in NVIDIA's container: {container})" if container else ""
        )
        if container and name != "torch":  # the container's own torch, CUDA and Transformer Engine fit each other
            fix = (
                f"Run `pip install --no-deps {name}=={wanted}` in the container, which leaves its torch and "
                "Transformer Engine alone."
            )
        else:
            fix = "Run `make setup`, then use `.venv/bin/python`."
        findings.append(Finding(f"version of {name}", "warn" if version and has_gpus else "fail", value, fix))
    return findings


def helpers(*, core: Path | None = None) -> Finding:
    """Megatron's index builder must come ready built: its wheel has no Makefile, so a run cannot build it.

    Args:
        core: Folder of `megatron.core`.
    """
    if core is None:
        found = places("megatron.core")
        core = found[0].parent if found else Path("megatron-core-is-not-installed")
    wanted = f"megatron-core=={pins()['megatron-core']}"
    fix = f"Run `uv pip install --reinstall --no-deps {wanted}` for the wheel that carries it."
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader

    folder = core / "datasets"
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := folder / f"helpers_cpp{suffix}").exists()), None)
    if path is None:
        return Finding("helpers_cpp", "fail", f"missing in {folder}", fix)
    try:
        loader = ExtensionFileLoader("helpers_cpp", str(path))
        spec = importlib.util.spec_from_file_location("helpers_cpp", path, loader=loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.build_sample_idx_int32  # noqa: B018  the function that every GPTDataset calls
    except Exception as error:  # noqa: BLE001  a broken library may raise anything
        return Finding("helpers_cpp", "fail", f"{path.name} does not load: {error}", fix)
    return Finding("helpers_cpp", "ok", path.name)


def mixed_installation(
    distributions: Mapping[str, Sequence[importlib.metadata.Distribution]],
    *,
    core_places: Sequence[Path] | None = None,
    bridge_places: Sequence[Path] | None = None,
) -> Finding:
    """A source checkout beside a wheel, or Bridge from elsewhere than core: Python then mixes two versions silently."""
    core_places = places("megatron.core") if core_places is None else core_places
    bridge_places = places("megatron.bridge") if bridge_places is None else bridge_places
    problems = []
    for name, found in (("megatron.core", core_places), ("megatron.bridge", bridge_places)):
        if len(found) > 1:
            problems.append(f"{len(found)} copies of {name}: " + ", ".join(str(path.parent) for path in found))
    for name, found in (("megatron-core", core_places), ("megatron-bridge", bridge_places)):
        records = distributions.get(name, ())
        if len(records) > 1:
            problems.append(f"{name} is installed {len(records)} times: " + ", ".join(d.version for d in records))
        for record in records:
            owner = Path(str(record.locate_file(""))).resolve()
            if found and not found[0].resolve().is_relative_to(owner) and not _is_editable(record):
                problems.append(f"{name} {record.version} is installed in {owner} and imported from {found[0].parent}")
    if core_places and bridge_places and core_places[0].parents[2] != bridge_places[0].parents[2]:
        problems.append(f"core comes from {core_places[0].parents[2]}, Bridge from {bridge_places[0].parents[2]}")
    if problems:
        fix = (
            "Take source checkouts off PYTHONPATH and run `make setup`: core and Bridge must come from one "
            "installation."
        )
        return Finding("one installation", "fail", "; ".join(dict.fromkeys(problems)), fix)
    if not (core_places and bridge_places):
        return Finding(
            "one installation", "fail", "megatron.core or megatron.bridge cannot be imported", "Run `make setup`."
        )
    return Finding("one installation", "ok", str(core_places[0].parents[2]))


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    return bool(text) and bool(json.loads(text).get("dir_info", {}).get("editable"))


def torch_has_gloo(*, library: Path | None = None) -> Finding:
    """Ranks on a CPU talk over gloo, which a torch built without it lacks; read from the library.

    Not by importing it.
    """
    import mmap

    if library is None:
        found = places("torch")
        library = found[0].parent / "lib" / "libtorch_python.so" if found else Path("torch-is-not-installed")
    fix = f"Run `uv pip install --reinstall torch=={pins()['torch']}`: PyPI's build has gloo."
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # The type name of c10d::ProcessGroupGloo as C++ compilers write it.
            if content.find(b"N4c10d16ProcessGroupGlooE") >= 0:
                return Finding("gloo in torch", "ok", "built in")
    except (OSError, ValueError) as error:
        return Finding("gloo in torch", "fail", f"cannot be read: {error}", fix)
    return Finding("gloo in torch", "fail", f"{library.name} was built without gloo", fix)


def leptonai(found: Mapping[str, str]) -> Finding | None:
    """nemo-run imports every executor; leptonai 0.47 dropped what its Lepton executor imports. None without nemo-run.

    Args:
        found: Version by distribution name.
    """
    if "nemo-run" not in found or "leptonai" not in found:
        return None
    version = found["leptonai"]
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if numbers >= [0, 47]:
        return Finding(
            "leptonai", "warn", f"{version} breaks `import nemo_run`", "Run `uv pip install 'leptonai<0.47'`."
        )
    return Finding("leptonai", "ok", version)


def _existing(path: Path) -> Path:
    """The nearest folder that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def runs_writable(path: Path) -> Finding:
    """Training leaves its files in runs/; a mount may be read-only even for root, so one file is really written."""
    folder = _existing(path)
    probe = folder / f".course-doctor-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding(
            "runs folder", "fail", f"{folder}: {error.strerror}", "Set COURSE_RUNS to a folder that you may write to."
        )
    return Finding("runs folder", "ok", str(path))


def runs_directory(*, environment: Mapping[str, str] | None = None) -> Path:
    """Where runs go: COURSE_RUNS, else `runs/` in the project (as `course_lib.runs.directory`)."""
    environment = os.environ if environment is None else environment
    return Path(environment["COURSE_RUNS"]) if environment.get("COURSE_RUNS") else project() / "runs"


# ------------------------------------------------------------------------------------------------------ the report


def lessons_that_run(
    findings: Iterable[Finding], *, notebooks: Path | None = None, gpu_count: int = 0
) -> tuple[Lesson, ...]:
    """Which of the existing lessons run live on this machine.

    Lesson 00 only looks at the machine, so it runs wherever Python and Jupyter do; every other lesson trains.

    Args:
        findings: The doctor's.
        notebooks: Folder with the lessons.
        gpu_count: GPUs of this machine.
    """
    folder = notebooks or project() / "notebooks"
    failed = [finding.name for finding in findings if finding.status == "fail"]
    where = f"on {GPUS_FOR_A_LESSON} GPUs" if gpu_count >= GPUS_FOR_A_LESSON else "on the CPU"
    result = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        number, _, title = path.stem.partition("_")
        only_looks = number == "00"
        stops = [name for name in failed if name == "Python"] if only_looks else failed
        reason = "stopped by: " + ", ".join(stops) if stops else ("looks at the machine" if only_looks else where)
        result.append(Lesson(number, title.replace("_", " "), not stops, reason))
    return tuple(result)


def report() -> Report:
    """Look at this machine: every finding, package, stand-in and lesson."""
    from course_lib import stack

    distributions = installed()
    rows = packages(distributions)
    names = installed_gpus()
    runs = runs_directory()
    findings = [
        python(), glibc(), cores(), memory(), disk(runs), shared_memory(), gpus(names), file_descriptors(), text_encoding(),
        bytecode(), hub(), runs_writable(runs), *gloo(), foreign_megatron(),
        *versions(rows, pinned=pins(), environment=os.environ, has_gpus=bool(names)),
        mixed_installation(distributions), helpers(), torch_has_gloo(),
        leptonai({name: found[0].version for name, found in distributions.items()}),
    ]  # fmt: skip
    present = tuple(finding for finding in findings if finding is not None)
    lessons = lessons_that_run(present, gpu_count=len(names or ()))
    return Report(present, rows, tuple(stack.stand_ins()), lessons)


def table(report: Report) -> pd.DataFrame:
    """The findings as a frame with the columns finding, status, value and fix, problems first."""
    import pandas as pd

    order = ("fail", "warn", "ok")
    rows = [(f.name, f.status, f.value, f.fix) for f in sorted(report.findings, key=lambda f: order.index(f.status))]
    return pd.DataFrame(rows, columns=["finding", "status", "value", "fix"])


def as_json(report: Report) -> str:
    """The whole report as JSON, for scripts and bug reports."""
    content = {
        "findings": [asdict(f) for f in report.findings],
        "packages": [asdict(p) for p in report.packages],
        "stand_ins": [{"name": s.name, "reason": s.reason, "where": s.where} for s in report.stand_ins],
        "lessons": [asdict(lesson) for lesson in report.lessons],
        "exit_code": report.exit_code,
    }
    return json.dumps(content, indent=2, default=str)


def show(report: Report) -> None:
    """Print the report as tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}

    def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in columns:
            made.add_column(column, overflow="fold")
        for row in rows:
            made.add_row(*(text.replace("[", "\\[") if i != 1 or text not in colours else f"[{colours[text]}]{text}[/]"
                           for i, text in enumerate(row)))  # fmt: skip
        console.print(made)
        console.print()

    grid("This machine", ("what", "status", "found"), ((f.name, f.status, f.value) for f in report.findings))
    packages_found = [p for p in report.packages if p.version]
    prefix = sys.prefix + os.sep
    rows = ((p.name, p.version or "", (p.file or "not importable").removeprefix(prefix)) for p in packages_found)
    grid("NVIDIA's packages", ("package", "version", f"imported from (below {sys.prefix})"), rows)
    absent = ", ".join(p.name for p in report.packages if not p.version)
    if absent:
        console.print(f"Not installed, and not needed on a CPU: {absent}\n", highlight=False)
    if report.stand_ins:
        grid(
            "Stand-ins", ("for", "why", "where"), ((str(s.name), str(s.reason), str(s.where)) for s in report.stand_ins)
        )
    grid("Lessons", ("no.", "runs", "title", "how"),
         ((x.number, "yes" if x.runs else "no", x.title, x.reason) for x in report.lessons))  # fmt: skip
    problems = [f for f in report.findings if f.status != "ok"]
    for finding in problems:
        console.print(f"[{colours[finding.status]}]{finding.name}[/]: {finding.fix}", highlight=False, soft_wrap=True)
    if not problems:
        console.print("Nothing to mend.")


def main(*, json: bool = False) -> int:
    """Entry of `course doctor`; returns 1 if a lesson could not run."""
    result = report()
    if json:
        print(as_json(result))
    else:
        show(result)
    return result.exit_code

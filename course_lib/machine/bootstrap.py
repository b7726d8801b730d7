"""Set the course up on a fresh Linux machine: `python3 course_lib/machine/bootstrap.py`.

It runs before the environment exists, so it imports the standard library only and works with any Python from 3.8 on.
It stays one file, however long: started by its path, it would find a second one under another name than the tests do.
What it does, in order:

1. If `.venv` was made from today's lock file, it stops at once (a stamp file tells).
2. It checks what would otherwise fail late: Linux, glibc, memory, disk, a C++ compiler if one is needed, Python 3.12.
   A failed check is one sentence with its fix, and exit code 2.
3. It finds uv, or installs a pinned one into `.tools` without touching the system's Python.
4. `uv sync --locked`, then bytecode for what a first run imports (see `bytecode.py`).
"""

from __future__ import annotations  # "list[str]" in a signature must not break Python 3.8

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
UV_VERSION = "0.13.9"
OLDEST_UV = (0, 13)  # the lock file was written by 0.13: an older uv may call it outdated
GIB = 2**30
MINIMUM_DISK_BYTES = 12 * GIB  # 6.5 GB of packages, the same again in uv's cache while it unpacks
MINIMUM_MEMORY_BYTES = 6 * GIB
OLDEST_GLIBC = (2, 28)  # torch's wheels are manylinux_2_28
# Variables that would send the environment elsewhere, or stop bytecode.
DROPPED_VARIABLES = frozenset(
    "PYTHONDONTWRITEBYTECODE PYTHONPATH UV_COMPILE_BYTECODE UV_PROJECT_ENVIRONMENT UV_PYTHON VIRTUAL_ENV".split()
)


class SetupFailed(RuntimeError):
    """A tool that the set-up called failed; the message ends with that tool's last lines."""

    exit_code = 1


class PrerequisiteMissing(SetupFailed):
    """The machine lacks something that the course needs; the message says what, and how to mend it."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------- the machine


def memory_bytes(*, cgroup: str = "/sys/fs/cgroup") -> int:
    """Memory this process may use, in bytes: the machine's, or the container's limit where that is lower.

    Args:
        cgroup: Root of the control group files (version 2, else version 1).
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path(cgroup, name)
        text = path.read_text(encoding="ascii").strip() if path.exists() else "max"
        if text.isdigit():  # "max" means no limit
            limits.append(int(text))
    return min(limits)


def glibc_version() -> tuple[int, ...]:
    """glibc's version; empty where the C library is another one.

    Example:
        >>> glibc_version() == () or glibc_version() > (2, 0)
        True
    """
    name, version = platform.libc_ver()
    return tuple(int(number) for number in version.split(".")[:2]) if name == "glibc" else ()


def find_compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


@dataclass(frozen=True)
class Machine:
    """What the set-up reads of a machine; a test hands other readings in."""

    system: str = field(default_factory=platform.system)
    processor: str = field(default_factory=platform.machine)
    glibc: tuple[int, ...] = field(default_factory=glibc_version)
    memory_bytes: int = field(default_factory=memory_bytes)
    free_disk_bytes: int = field(default_factory=lambda: shutil.disk_usage(str(PROJECT)).free)
    compiler: str | None = field(default_factory=find_compiler)


def needs_compiler(lock_text: str, *, processor: str) -> bool:
    """Whether Megatron Core must be built here: true if the lock names no wheel of it for this processor.

    Its wheels hold `helpers_cpp` ready built. A source build compiles it, and so does a first run without it.

    Args:
        lock_text: Content of `uv.lock`.
        processor: Its name as `platform.machine()` gives it, for example "x86_64".
    """
    return not re.search(rf"/megatron_core-[^/\"]+-cp312-[^/\"]*manylinux[^/\"]*{processor}\.whl", lock_text)


def check_machine(project: Path, machine: Machine | None = None) -> None:
    """Stop with one sentence if this machine cannot run the course.

    Raises:
        PrerequisiteMissing: Not Linux, an old C library, too little memory or disk, or no compiler when one is needed.
    """
    machine = machine or Machine()
    installed = (project / ".venv/pyvenv.cfg").exists()
    builds = needs_compiler((project / "uv.lock").read_text(encoding="utf-8"), processor=machine.processor)
    library = "glibc " + ".".join(map(str, machine.glibc)) if machine.glibc else "another C library"
    requirements = (
        (
            machine.system == "Linux",
            f"This course runs on Linux and this is {machine.system}.",
            "Use a Linux machine, WSL 2 or a Linux container",
        ),
        (
            machine.glibc >= OLDEST_GLIBC,
            f"PyTorch needs glibc {OLDEST_GLIBC[0]}.{OLDEST_GLIBC[1]} and this system has {library}.",
            "Use a newer distribution (Debian 10, Ubuntu 18.10, RHEL 8 or later) or a container of one",
        ),
        (
            machine.memory_bytes >= MINIMUM_MEMORY_BYTES,
            f"Eight ranks need {MINIMUM_MEMORY_BYTES // GIB} GiB of memory and this machine or container has "
            f"{machine.memory_bytes / GIB:.1f} GiB.",
            "Raise the container's limit or use a larger machine",
        ),
        (
            installed or machine.free_disk_bytes >= MINIMUM_DISK_BYTES,
            f"The environment needs {MINIMUM_DISK_BYTES // GIB} GiB of free disk and {project} has "
            f"{machine.free_disk_bytes / GIB:.1f} GiB.",
            "Free some space or move the project to a larger disk",
        ),
        (
            machine.compiler or not builds,
            f"Megatron Core has no ready-built package for {machine.processor} and no C++ compiler was found to build "
            "it (looked for $CXX, g++, clang++, c++).",
            "Install one with `apt-get install g++` or your distribution's equivalent",
        ),
    )
    for holds, problem, fix in requirements:
        if not holds:
            raise PrerequisiteMissing(f"{problem} {fix} and run the command again.")


# -------------------------------------------------------------------------------------------------- Python 3.12, uv


def answer(*command: str) -> str:
    """What a program prints; nothing if it does not start or fails (a pyenv shim may exist and refuse)."""
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def python_folders(environment: Mapping[str, str]) -> Iterator[Path]:
    """Folders where a `python3.12` may be: pyenv's, those of PATH, conda's, uv's own."""
    home = Path(environment.get("HOME", "/"))
    yield from sorted(Path(environment.get("PYENV_ROOT", home / ".pyenv")).glob("versions/3.12*/bin"))
    yield from map(Path, filter(None, environment.get("PATH", "").split(os.pathsep)))
    for conda in ("miniforge3", "miniconda3", "anaconda3", "mambaforge", "micromamba"):
        yield home / conda / "bin"
        yield from (home / conda).glob("envs/*/bin")
    yield from home.glob(".local/share/uv/python/cpython-3.12*/bin")


def find_python(environment: Mapping[str, str] = os.environ) -> Path:
    """A Python 3.12 that really starts.

    Raises:
        PrerequisiteMissing: None was found.
    """
    if sys.version_info[:2] == (3, 12):
        return Path(sys.executable)
    for path in (folder / "python3.12" for folder in python_folders(environment)):
        if answer(str(path), "-I", "-c", "import sys; print(*sys.version_info[:2])") == "3 12":
            return path
    raise PrerequisiteMissing(
        "Python 3.12 was not found (looked in pyenv, PATH, conda and uv's own folder). Install it with `pyenv install "
        "3.12`, `uv python install 3.12`, `conda create -n py312 python=3.12` or your distribution's package and run "
        "the command again."
    )


def uv_version(path: Path) -> tuple[int, ...]:
    """Version of the uv at `path`; empty if there is none that starts."""
    found = re.match(r"uv (\d+)\.(\d+)\.(\d+)", answer(str(path), "--version"))
    return tuple(int(number) for number in found.groups()) if found else ()


def find_uv(project: Path, *, search_path: str | None = None) -> Path | None:
    """A uv that reads this project's lock file: on PATH, or the one that an earlier call put into `.tools`.

    Args:
        search_path: Folders as in PATH; the environment's PATH if None.
    """
    candidates = (shutil.which("uv", path=search_path), project / ".tools/bin/uv")
    return next((Path(path) for path in candidates if path and uv_version(Path(path)) >= OLDEST_UV), None)


def install_uv(project: Path, pythons: Sequence[Path]) -> Path:
    """Install the pinned uv into `.tools`, with the first of `pythons` that has venv or pip.

    Raises:
        SetupFailed: No Python could install it.
    """
    tools = project / ".tools"
    uv, package, output = tools / "bin/uv", f"uv=={UV_VERSION}", ""
    for python in map(str, pythons):
        in_a_venv = (
            [python, "-m", "venv", "--clear", str(tools)],
            [str(tools / "bin/python"), "-m", "pip", "install", package],
        )
        # Debian ships Python without ensurepip: then pip alone, which needs no virtual environment.
        beside_it = ([python, "-m", "pip", "install", "--upgrade", "--target", str(tools), package],)
        for commands in (in_a_venv, beside_it):
            for command in commands:
                what = (
                    "making room for uv in .tools" if "venv" in command else f"installing uv {UV_VERSION} into .tools"
                )
                failed, output = run_with_progress(command, what, project)
                if failed:
                    break
            if uv_version(uv):
                return uv
    raise SetupFailed(
        f"uv {UV_VERSION} could not be installed into .tools. Install uv yourself (`pip install --user uv`, or see "
        f"https://docs.astral.sh/uv/) and run the command again. The last attempt said:\n{output}"
    )


# ------------------------------------------------------------------------------------------------------- the set-up


def run_with_progress(command: Sequence[str], label: str, folder: Path) -> tuple[int, str]:
    """Run a quiet command in a folder; a terminal shows the elapsed seconds.

    Returns:
        Exit code, and the last lines that the command printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    start, line_end = time.monotonic(), "\r" if sys.stderr.isatty() else "\n"
    print(f"{label} ...", end=line_end, file=sys.stderr, flush=True)
    with subprocess.Popen(list(command), env=environment, cwd=str(folder), **streams) as process:
        output = None
        while output is None:
            try:
                output = process.communicate(timeout=1)[0].decode("utf-8", "replace")
            except subprocess.TimeoutExpired:
                if line_end == "\r":
                    print(f"{label}: {time.monotonic() - start:.0f} s", end="\r", file=sys.stderr, flush=True)
            except BaseException:  # Ctrl-C: do not leave a child that goes on writing into .venv
                process.kill()
                raise
    word = f"failed with exit code {process.returncode}" if process.returncode else "done"
    print(f"{label}: {word} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return process.returncode, "\n".join("    " + line for line in output.strip().splitlines()[-15:])


def fingerprint(project: Path) -> str:
    """Hash of everything that decides what is in `.venv`; of its place too, for its scripts name their folder."""
    digest = hashlib.sha256(str(project).encode())
    for name in ("uv.lock", "pyproject.toml", ".python-version", "course_lib/machine/bootstrap.py"):
        digest.update((project / name).read_bytes())
    return digest.hexdigest()


def is_current(project: Path) -> bool:
    """Whether `.venv` is the finished environment of this very lock file, at this very place."""
    stamp = project / ".venv/course-stamp"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint(project)


def set_up(project: Path = PROJECT) -> None:
    """Make `.venv` what `uv.lock` says, or do nothing if it is.

    Raises:
        PrerequisiteMissing: See `check_machine` and `find_python`.
        SetupFailed: uv failed.
    """
    if is_current(project):
        return
    check_machine(project)
    python = find_python()
    uv = find_uv(project) or install_uv(project, [Path(sys.executable), python])
    stamp = project / ".venv/course-stamp"
    if stamp.exists():
        stamp.unlink()  # an interrupted update must not look finished
    command = [str(uv), "sync", "--locked", "--quiet", "--python", str(python)]
    label = "installing the environment into .venv (about 6.5 GB, minutes the first time)"
    failed, output = run_with_progress(command, label, project)
    if failed:
        raise SetupFailed(
            "uv could not install the environment. If it names the network or a full disk, mend that and run the "
            f"command again. It said:\n{output}"
        )
    command = [".venv/bin/python", "-I", str(Path(__file__).resolve().with_name("bytecode.py"))]
    run_with_progress(command, "compiling what the first run imports", project)
    stamp.write_text(fingerprint(project), encoding="utf-8")


def main() -> int:
    """Entry of `python3 course_lib/machine/bootstrap.py`; returns the exit code."""
    try:
        set_up()
    except SetupFailed as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped. Run the command again to go on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

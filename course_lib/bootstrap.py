"""Set the course up on a fresh Linux machine: `python3 course_lib/bootstrap.py`.

It runs before the environment exists, so it imports the standard library only and works with any Python from 3.8 on.
What it does, in order:

1. If `.venv` was made from today's `uv.lock`, `pyproject.toml` and this file, it stops at once (a stamp file tells).
2. It checks what would otherwise fail late: Linux, memory, disk, Python 3.12, a C++ compiler if one is needed.
   Each failed check is one sentence with its fix, and exit code 2.
3. It finds uv, or installs a pinned one into `.tools` without touching the system's Python.
4. `uv sync --locked`, then bytecode for the modules that a first run imports.

Why bytecode here, and why not for everything. Processor seconds, since the two cores were shared; a rank's imports are
torch, `course_lib.stack.prepare_imports()` and `megatron.bridge.training.pretrain`, 3,500 modules:

- `uv sync --compile-bytecode` compiles all 25,000 files: 156 s, which took 91 s; then the imports take 10 s.
- no compile step: the imports take 27 s on one core and write their own bytecode. The notebook kernel and the
  fork server of a first run would both pay that, and so would every process of an environment that forbids writing bytecode.
- what those imports and a notebook kernel load (`COMPILED`), less what they never load (`NOT_COMPILED`), 5,800 files
  on all cores: 31 s, so about 16 s on two idle cores and 4 s on eight; then the imports take 10 s.

The last is what happens here. For one process on two cores it costs as much time as it saves; for the kernel and the
fork server, or with more cores, it is the shortest. A module that the lists miss costs milliseconds at its first import.
"""

from __future__ import (
    annotations,  # "list[str]" in a signature must not break Python 3.8
)

import concurrent.futures
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["PrerequisiteMissing", "check_machine", "compile_first_run", "find_python", "find_uv", "is_current", "main"]

PROJECT = Path(__file__).resolve().parent.parent
UV_VERSION = "0.13.9"
OLDEST_UV = (0, 13)  # the lock file was written by 0.13: an older uv may call it outdated
GIB = 2**30
MINIMUM_DISK_BYTES = 12 * GIB  # 6.5 GB of packages, the same again in uv's cache while it unpacks
MINIMUM_MEMORY_BYTES = 6 * GIB
OLDEST_GLIBC = (2, 28)  # torch's wheels are manylinux_2_28
SETUP_FAILED, PREREQUISITE_MISSING = 1, 2

# Top-level packages whose modules stand in sys.modules after `import torch`, Bridge's pretrain and a papermill kernel.
COMPILED = (  # noqa: SIM905  one line an item would hide the list
    "_pytest absl accelerate antlr4 attr charset_normalizer click cuda datasets dateutil dill fastjsonschema filelock "
    "fsspec h11 httpcore httpx huggingface_hub ipykernel IPython ipywidgets jinja2 jsonschema jupyter_client "
    "matplotlib megatron mpl_toolkits mpmath multistorageclient nbclient nbformat numpy omegaconf packaging pandas "
    "papermill PIL platformdirs pluggy psutil pyarrow pyparsing regex requests rich safetensors sympy tokenizers "
    "torch tornado tqdm traitlets transformers triton urllib3 wcmatch webdataset yaml zmq"
).split()
# Large parts of those packages that the same sys.modules does not hold.
NOT_COMPILED = frozenset(
    "IPython/terminal absl/testing accelerate/test_utils datasets/packaged_modules fsspec/implementations "  # noqa: SIM905
    "huggingface_hub/cli huggingface_hub/inference matplotlib/backends megatron/bridge/diffusion "
    "megatron/bridge/models/exaone megatron/bridge/models/gemma megatron/bridge/models/qwen_vl "
    "megatron/bridge/models/stepfun megatron/bridge/perf_recipes megatron/bridge/recipes/nemotronh "
    "megatron/bridge/recipes/qwen megatron/bridge/recipes/qwen_vl megatron/core/inference/engines "
    "megatron/core/inference/text_generation_controllers numpy/f2py numpy/polynomial pandas/plotting/_matplotlib "
    "rich/_unicode_data sympy/combinatorics sympy/parsing sympy/physics sympy/polys/benchmarks sympy/stats "
    "sympy/tensor/array/expressions sympy/vector torch/_dynamo torch/_export/serde torch/_functorch/_aot_autograd "
    "torch/_inductor torch/_numpy torch/_vendor torch/ao/ns torch/ao/quantization/fx torch/distributed/_tools "
    "torch/distributed/optim torch/distributed/pipelining torch/fx/experimental/migrate_gradual_types torch/onnx "
    "torch/testing torch/utils/benchmark torch/utils/hipify transformers/cli transformers/data transformers/models "
    "transformers/pipelines triton/experimental".split()
)
TEST_FOLDERS = frozenset({"tests", "test", "_tests", "__pycache__"})


class PrerequisiteMissing(RuntimeError):
    """The machine lacks something that the course needs; the message is one sentence and its fix."""


class SetupFailed(RuntimeError):
    """A tool that the set-up called failed; the message ends with that tool's last lines."""


# ---------------------------------------------------------------------------------------------------- the machine


def memory_bytes(*, meminfo: str = "/proc/meminfo", cgroup: str = "/sys/fs/cgroup") -> int:
    """Memory this process may use, in bytes: the machine's, or the container's limit where that is lower.

    Args:
        meminfo: File with the kernel's `MemTotal` line, in KiB.
        cgroup: Root of the control group files (version 2, else version 1).
    """
    found = re.search(r"^MemTotal:\s+(\d+) kB", Path(meminfo).read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise PrerequisiteMissing(f"{meminfo} has no MemTotal line, so the memory cannot be read: mount /proc.")
    limits = [int(found.group(1)) * 1024]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (Path(cgroup) / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" means no limit
            limits.append(int(text))
    return min(limits)


def glibc_version() -> tuple[int, int] | None:
    """glibc's version, or None where the C library is another one (musl).

    Example:
        >>> glibc_version() is None or glibc_version() > (2, 0)
        True
    """
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return None
    found = re.match(r"glibc (\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else None


def needs_compiler(lock_text: str, *, machine: str) -> bool:
    """Whether Megatron Core must be built here: true if the lock names no wheel of it for this processor.

    Its wheels hold `helpers_cpp` ready built. A source build compiles it, and so does a first run without it.

    Args:
        lock_text: Content of `uv.lock`.
        machine: Processor name as `platform.machine()` gives it, for example "x86_64".
    """
    wheels = re.findall(r"/(megatron_core-[^/\"]+\.whl)", lock_text)
    return not any("-cp312-" in wheel and "manylinux" in wheel and machine + ".whl" in wheel for wheel in wheels)


def check_machine(
    project: Path = PROJECT,
    *,
    system: str | None = None,
    machine: str | None = None,
    glibc: tuple[int, int] | None = None,
    total_memory_bytes: int | None = None,
    free_disk_bytes: int | None = None,
    compiler: Callable[[], str | None] | None = None,
) -> None:
    """Stop with one sentence if this machine cannot run the course; every reading can be handed in by a test.

    Raises:
        PrerequisiteMissing: Not Linux, an old C library, too little memory or disk, or no compiler when one is needed.
    """
    system = system or platform.system()
    machine = machine or platform.machine()
    if system != "Linux":
        raise PrerequisiteMissing(
            f"This course runs on Linux and this is {system}. Use a Linux machine, WSL 2 or a Linux container and "
            "run the "
            "command again."
        )
    glibc = glibc or glibc_version()
    if glibc is None or glibc < OLDEST_GLIBC:
        found = "another C library" if glibc is None else f"glibc {glibc[0]}.{glibc[1]}"
        raise PrerequisiteMissing(
            f"PyTorch needs glibc {OLDEST_GLIBC[0]}.{OLDEST_GLIBC[1]} and this system has {found}. Use a newer "
            "distribution "
            "(Debian 10, Ubuntu 18.10, RHEL 8 or later) or a container of one and run the command again."
        )
    if total_memory_bytes is None:
        total_memory_bytes = memory_bytes()
    if total_memory_bytes < MINIMUM_MEMORY_BYTES:
        raise PrerequisiteMissing(
            f"Eight ranks need {MINIMUM_MEMORY_BYTES / GIB:.0f} GiB of memory and this machine or container has "
            f"{total_memory_bytes / GIB:.1f} GiB. Raise the container's limit or use a larger machine and run the "
            "command again."
        )
    if not (project / ".venv" / "pyvenv.cfg").exists():
        if free_disk_bytes is None:
            free_disk_bytes = shutil.disk_usage(str(project)).free
        if free_disk_bytes < MINIMUM_DISK_BYTES:
            raise PrerequisiteMissing(
                f"The environment needs {MINIMUM_DISK_BYTES / GIB:.0f} GiB of free disk and {project} has "
                f"{free_disk_bytes / GIB:.1f} GiB. Free some space or move the project to a larger disk and run the "
                "command "
                "again."
            )
    if needs_compiler((project / "uv.lock").read_text(encoding="utf-8"), machine=machine):
        found_compiler = (compiler or find_compiler)()
        if found_compiler is None:
            raise PrerequisiteMissing(
                f"Megatron Core has no ready-built package for {machine} and no C++ compiler was found to build it "
                "(looked for "
                "$CXX, g++, clang++, c++). Install one with `apt-get install g++` or your distribution's equivalent "
                "and run "
                "the command again."
            )


def find_compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


# ----------------------------------------------------------------------------------------------------- Python 3.12


def _pythons(project: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Places where a Python 3.12 may be, best first."""
    home = Path(environment.get("HOME", "~")).expanduser()
    configuration = project / ".venv" / "pyvenv.cfg"
    if configuration.exists():  # an environment that works keeps its Python
        found = re.search(r"^home\s*=\s*(.+)$", configuration.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            yield Path(found.group(1).strip()) / "python3.12"
    if sys.version_info[:2] == (3, 12):
        yield Path(sys.executable)
    roots = [Path(environment[name]) for name in ("PYENV_ROOT",) if environment.get(name)] + [home / ".pyenv"]
    for root in roots:
        versions = (root / "versions").glob("3.12*")
        for version in sorted(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], reverse=True):
            yield version / "bin" / "python3.12"
    for folder in environment.get("PATH", "").split(os.pathsep):
        if folder:
            yield Path(folder) / "python3.12"
    condas = [
        Path(environment[name]) for name in ("CONDA_PREFIX", "CONDA_ROOT", "MAMBA_ROOT_PREFIX") if environment.get(name)
    ]
    for root in condas + [
        home / name for name in ("miniforge3", "miniconda3", "anaconda3", "mambaforge", "micromamba")
    ]:
        yield root / "bin" / "python3.12"
        for path in sorted(root.glob("envs/*/bin/python3.12")):
            yield path
    for path in sorted((home / ".local/share/uv/python").glob("cpython-3.12*/bin/python3.12"), reverse=True):
        yield path


def find_python(project: Path = PROJECT, *, environment: Mapping[str, str] | None = None) -> Path:
    """A Python 3.12 that really starts (a pyenv shim may exist and refuse).

    Raises:
        PrerequisiteMissing: None was found.
    """
    environment = os.environ if environment is None else environment
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    tried = set()
    for path in _pythons(project, environment):
        if path in tried or not path.is_file():
            continue
        tried.add(path)
        try:
            answer = subprocess.run(
                [str(path), "-I", "-c", code],
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        version, _, executable = answer.stdout.decode("utf-8", "replace").strip().partition(" ")
        if answer.returncode == 0 and version == "3.12":
            return Path(executable or path)
    raise PrerequisiteMissing(
        "Python 3.12 was not found (looked in PATH, pyenv, conda and uv's own folder). Install it with "
        "`pyenv install 3.12`, "
        "`uv python install 3.12`, `conda create -n py312 python=3.12` or your distribution's package and "
        "run the command "
        "again."
    )


# -------------------------------------------------------------------------------------------------------------- uv


def uv_version(path: Path) -> tuple[int, ...] | None:
    """Version of the uv at `path`, or None if it does not start."""
    try:
        answer = subprocess.run(
            [str(path), "--version"], check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(rb"uv (\d+)\.(\d+)\.(\d+)", answer.stdout)
    return tuple(int(number) for number in found.groups()) if found and answer.returncode == 0 else None


def find_uv(project: Path = PROJECT, *, search_path: str | None = None) -> Path | None:
    """A uv that reads this project's lock file: on PATH, or the one that an earlier call put into `.tools`.

    Args:
        project: Root of the course.
        search_path: Folders as in PATH; the environment's PATH if None.
    """
    for path in map(Path, filter(None, [shutil.which("uv", path=search_path), str(project / ".tools" / "bin" / "uv")])):
        version = uv_version(path) if path.exists() else None
        if version is not None and version >= OLDEST_UV:
            return path
    return None


def install_uv(project: Path, pythons: Sequence[Path]) -> Path:
    """Install the pinned uv into `.tools`, with the first of `pythons` that has venv or pip.

    Raises:
        SetupFailed: No Python could install it.
    """
    tools, wanted = project / ".tools", f"uv=={UV_VERSION}"
    log = ""
    for python in pythons:
        ways = (
            # Debian ships Python without ensurepip: then pip alone, which needs no virtual environment.
            (
                [
                    [str(python), "-m", "venv", "--clear", str(tools)],
                    [str(tools / "bin/python"), "-m", "pip", "install", wanted],
                ]
            ),
            ([[str(python), "-m", "pip", "install", "--upgrade", "--target", str(tools / "lib/uv"), wanted]]),
        )
        for way in ways:
            log = ""
            for command in way:
                what = f"installing uv {UV_VERSION} into .tools" if wanted in command else "preparing .tools"
                code, output = run_with_progress(command, what)
                log = output
                if code:
                    break
            else:
                binary, alone = tools / "bin" / "uv", tools / "lib/uv/bin/uv"
                if not binary.exists() and alone.exists():
                    binary.parent.mkdir(parents=True, exist_ok=True)
                    binary.symlink_to(alone)
                if uv_version(binary) is not None:
                    return binary
    raise SetupFailed(
        f"uv {UV_VERSION} could not be installed into .tools. Install uv yourself (`pip install --user uv`, or see "
        "https://docs.astral.sh/uv/) and run the command again. The last attempt said:\n" + last_lines(log)
    )


def last_lines(text: str, *, lines: int = 15) -> str:
    """The last lines of a tool's output, indented."""
    return "\n".join("    " + line for line in text.strip().splitlines()[-lines:])


# ------------------------------------------------------------------------------------------------------- the set-up


def run_with_progress(
    command: Sequence[str], label: str, *, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> tuple[int, str]:
    """Run a quiet command and show one line with the elapsed seconds.

    On a terminal the line is rewritten each second; in a log file a line appears at the start and at the end.

    Returns:
        Exit code, and everything that the command printed.
    """
    start, live = time.monotonic(), sys.stderr.isatty()
    if not live:
        print(f"{label} ...", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        cwd=None if cwd is None else str(cwd),
    )  # fmt: skip
    output = b""
    while True:
        if live:
            print(f"\r{label}: {time.monotonic() - start:.0f} s ", end="", file=sys.stderr, flush=True)
        try:
            output = process.communicate(timeout=1.0)[0]
            break
        except subprocess.TimeoutExpired:
            continue
        except BaseException:  # Ctrl-C: do not leave a child that goes on writing into .venv
            process.kill()
            process.wait()
            raise
    word = "done" if process.returncode == 0 else f"failed (exit code {process.returncode})"
    print(
        f"{chr(13) if live else ''}{label}: {word} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
    )
    return process.returncode, output.decode("utf-8", "replace")


def fingerprint(project: Path = PROJECT) -> str:
    """Hash of everything that decides what is in `.venv`."""
    digest = hashlib.sha256()
    for name in ("uv.lock", "pyproject.toml", ".python-version", "course_lib/bootstrap.py"):
        path = project / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
    return digest.hexdigest()


def is_current(project: Path = PROJECT) -> bool:
    """Whether `.venv` is the finished environment of this very lock file, at this very place."""
    stamp = project / ".venv" / "course-stamp"
    # A virtual environment cannot be moved: its scripts name their folder, hence the path in the stamp.
    wanted = fingerprint(project) + " " + str(project)
    return stamp.exists() and (project / ".venv/bin/python").exists() and stamp.read_text(encoding="utf-8") == wanted


def environment_for_uv(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The variables for uv: the caller's, less those that would send the environment elsewhere or stop bytecode."""
    dropped = {
        "PYTHONDONTWRITEBYTECODE",
        "UV_PROJECT_ENVIRONMENT",
        "UV_PYTHON",
        "UV_COMPILE_BYTECODE",
        "VIRTUAL_ENV",
        "PYTHONPATH",
    }
    return {name: value for name, value in environment.items() if name not in dropped}


def files_of_a_first_run(packages: Path) -> Iterator[Path]:
    """Python files below a site-packages folder that a first run imports, nearly (see the module's text)."""
    for name in COMPILED:
        for folder, folders, files in os.walk(str(packages / name)):
            inside = os.path.relpath(folder, str(packages))
            folders[:] = [f for f in folders if f not in TEST_FOLDERS and inside + "/" + f not in NOT_COMPILED]
            for file in files:
                if file.endswith(".py"):
                    yield Path(folder, file)


def _compile(paths: Sequence[str]) -> int:
    import compileall
    import warnings

    warnings.simplefilter("ignore", SyntaxWarning)  # other people's escape sequences
    return sum(bool(compileall.compile_file(path, quiet=2)) for path in paths)


def compile_first_run(packages: Path) -> int:
    """Compile `files_of_a_first_run` on all cores; run by `.venv`'s own Python, whose bytecode format it is.

    Returns:
        Number of files with bytecode. Files that are up to date are left alone.
    """
    paths = [str(path) for path in files_of_a_first_run(packages)]
    chunks = [paths[start : start + 40] for start in range(0, len(paths), 40)]
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return sum(pool.map(_compile, chunks))


def set_up(project: Path = PROJECT) -> None:
    """Make `.venv` what `uv.lock` says, or do nothing if it is.

    Raises:
        PrerequisiteMissing: See `check_machine` and `find_python`.
        SetupFailed: uv failed.
    """
    if is_current(project):
        return
    check_machine(project)
    python = find_python(project)
    uv = find_uv(project) or install_uv(project, [Path(sys.executable), python])
    stamp = project / ".venv" / "course-stamp"
    if stamp.exists():
        stamp.unlink()  # an interrupted update must not look finished
    command = [str(uv), "sync", "--locked", "--quiet", "--python", str(python)]
    label = "installing the environment into .venv (about 6.5 GB, minutes the first time)"
    code, output = run_with_progress(command, label, environment=environment_for_uv(os.environ), cwd=project)
    if code:
        raise SetupFailed(
            "uv could not install the environment. If it names the network or a full disk, mend that and run the "
            "command again. "
            "It said:\n" + last_lines(output)
        )
    venv_python = project / ".venv/bin/python"
    command = [str(venv_python), "-I", str(Path(__file__).resolve()), "--compile"]
    code, output = run_with_progress(
        command, "compiling what the first run imports", environment=environment_for_uv(os.environ), cwd=project
    )
    if code:
        raise SetupFailed(
            "The bytecode could not be written. Free some disk and run the command again. It said:\n"
            + last_lines(output)
        )
    stamp.write_text(fingerprint(project) + " " + str(project), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python3 course_lib/bootstrap.py`; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--compile"]:  # called by set_up with the Python of .venv
        import sysconfig

        print(compile_first_run(Path(sysconfig.get_path("purelib"))))
        return 0
    if arguments:
        print("usage: python3 course_lib/bootstrap.py (no arguments)", file=sys.stderr)
        return PREREQUISITE_MISSING
    try:
        set_up()
    except PrerequisiteMissing as error:
        print(error, file=sys.stderr)
        return PREREQUISITE_MISSING
    except SetupFailed as error:
        print(error, file=sys.stderr)
        return SETUP_FAILED
    except KeyboardInterrupt:
        print("\nStopped. Run the command again to go on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

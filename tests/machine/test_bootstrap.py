"""The set-up that runs before the environment exists."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from course_lib.common.project import PROJECT
from course_lib.machine import bootstrap, bytecode

GIB = 2**30
FITS = bootstrap.Machine(
    system="Linux",
    processor="x86_64",
    glibc=(2, 36),
    memory_bytes=8 * GIB,
    free_disk_bytes=20 * GIB,
    compiler=None,
)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what decides the environment, with no environment."""
    folder = tmp_path / "course"
    (folder / "course_lib/machine").mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "uv.lock",
        ".python-version",
        "course_lib/machine/bootstrap.py",
        "course_lib/machine/bytecode.py",
    ):
        shutil.copy(PROJECT / name, folder / name)
    return folder


def other_python() -> str:
    """A Python that is not 3.12: this one with its version changed, for machines that have no other."""
    return (
        "import sys, runpy; sys.version_info = (3, 9, 0, 'final', 0); sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )


def test_no_python_is_one_sentence_with_its_fix(project: Path, tmp_path: Path) -> None:
    """Without any Python 3.12 the set-up stops with exit code 2, one line that names the fix, and nothing installed."""
    empty = tmp_path / "empty"
    empty.mkdir()
    executable(empty / "python3.12", "exit 127\n")  # a pyenv shim without its version
    command = [sys.executable, "-c", other_python(), str(project / "course_lib/machine/bootstrap.py")]
    done = subprocess.run(
        command, env={"PATH": str(empty), "HOME": str(empty)}, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Python 3.12 was not found (looked in ")
    assert "pyenv install 3.12" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (project / ".venv").exists()
    assert not (project / ".tools").exists()


@pytest.mark.parametrize(
    ("reading", "sentence", "fix"),
    [
        ({"system": "Darwin"}, "runs on Linux and this is Darwin", "WSL 2"),
        ({"glibc": (2, 17)}, "needs glibc 2.28 and this system has glibc 2.17", "newer distribution"),
        ({"glibc": ()}, "this system has another C library", "newer distribution"),
        ({"memory_bytes": 5 * GIB}, "need 6 GiB of memory", "Raise the container's limit"),
        ({"free_disk_bytes": 11 * GIB}, "needs 12 GiB of free disk", "Free some space"),
        ({"processor": "riscv64"}, "no C++ compiler was found", "apt-get install g++"),
    ],
)
def test_each_prerequisite_stops_early(project: Path, reading: dict, sentence: str, fix: str) -> None:
    """Each missing prerequisite is one line that says what was found, what is needed and how to mend it."""
    bootstrap.check_machine(project, FITS)
    with pytest.raises(bootstrap.PrerequisiteMissing) as caught:
        bootstrap.check_machine(project, replace(FITS, **reading))
    message = str(caught.value)
    assert sentence in message
    assert fix in message
    assert message.endswith("run the command again.")
    assert "\n" not in message


def test_a_finished_environment_needs_no_free_disk(project: Path) -> None:
    """The disk is only counted while the environment must still be installed."""
    (project / ".venv").mkdir()
    (project / ".venv/pyvenv.cfg").touch()
    bootstrap.check_machine(project, replace(FITS, free_disk_bytes=0))


def test_a_compiler_is_asked_for_only_where_it_is_needed(project: Path) -> None:
    """The lock names ready-built wheels of Megatron Core for x86_64 and aarch64, so no compiler is needed there."""
    lock = (PROJECT / "uv.lock").read_text(encoding="utf-8")
    assert not bootstrap.needs_compiler(lock, processor="x86_64")
    assert not bootstrap.needs_compiler(lock, processor="aarch64")
    assert bootstrap.needs_compiler(lock, processor="riscv64")
    bootstrap.check_machine(project, replace(FITS, processor="riscv64", compiler="/usr/bin/g++"))


def test_memory_is_the_containers(tmp_path: Path) -> None:
    """A container's limit counts, not the memory of the host that it runs on."""
    (tmp_path / "memory.max").write_text(f"{64 * 2**20}\n", encoding="ascii")
    assert bootstrap.memory_bytes(cgroup=str(tmp_path)) == 64 * 2**20
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert bootstrap.memory_bytes(cgroup=str(tmp_path)) == total > GIB


def test_pyenvs_python_is_found_and_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pyenv 3.12 that really starts is taken; a broken one and another version are passed over."""
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 11, 0))
    for version, text in (("3.12.10", "exit 1\n"), ("3.12.9", 'echo "3 11"\n'), ("3.12.2", 'echo "3 12"\n')):
        executable(tmp_path / f"pyenv/versions/{version}/bin/python3.12", text)
    environment = {"PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path), "PATH": ""}
    assert bootstrap.find_python(environment) == tmp_path / "pyenv/versions/3.12.2/bin/python3.12"


def test_condas_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conda environment's Python 3.12 serves too."""
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 11, 0))
    wanted = executable(tmp_path / "miniforge3/envs/py312/bin/python3.12", 'echo "3 12"\n')
    assert bootstrap.find_python({"HOME": str(tmp_path), "PATH": ""}) == wanted


def test_an_old_uv_is_passed_over(project: Path, tmp_path: Path) -> None:
    """A uv older than the lock's writer is not used; the one in .tools is."""
    executable(tmp_path / "bin/uv", 'echo "uv 0.4.30 (x)"\n')
    assert bootstrap.find_uv(project, search_path=str(tmp_path / "bin")) is None
    tools = executable(project / ".tools/bin/uv", f'echo "uv {bootstrap.UV_VERSION}"\n')
    assert bootstrap.find_uv(project, search_path=str(tmp_path / "bin")) == tools


def test_no_uv_is_found_where_there_is_none(project: Path, tmp_path: Path) -> None:
    """A machine without uv is the usual case: the search ends with None, and the set-up installs one."""
    assert bootstrap.find_uv(project, search_path=str(tmp_path)) is None


PYTHON_WITHOUT_VENV = """
case "$*" in
  *"install --upgrade --target"*)
    mkdir -p "$6/bin"
    printf '#!/bin/sh\\necho uv 0.13.9\\n' > "$6/bin/uv"
    chmod +x "$6/bin/uv" ;;
  *) echo 'ensurepip is not available' >&2; exit 1 ;;
esac
"""


def test_uv_is_installed_without_venv(project: Path, tmp_path: Path) -> None:
    """Where Python has no ensurepip (Debian), uv comes by `pip install --target` into .tools."""
    binary = bootstrap.install_uv(project, [executable(tmp_path / "python", PYTHON_WITHOUT_VENV)])
    assert binary == project / ".tools/bin/uv"
    assert bootstrap.uv_version(binary) == (0, 13, 9)


def test_a_failed_uv_installation_says_why(project: Path, tmp_path: Path) -> None:
    """If no Python can install uv, the message holds the fix and the tool's own words."""
    python = executable(tmp_path / "python", "echo 'No module named pip' >&2; exit 1\n")
    with pytest.raises(bootstrap.SetupFailed, match=r"(?s)pip install --user uv.*No module named pip"):
        bootstrap.install_uv(project, [python])


FAKE_UV = """
if [ "$1" = --version ]; then echo "uv 0.13.9"; exit 0; fi
echo "$@" >> {log}
[ -z "$PYTHONDONTWRITEBYTECODE" ] || echo "bytecode is off" >> {log}
mkdir -p .venv/bin
touch .venv/pyvenv.cfg
printf '#!/bin/sh\\necho compiled >> {log}\\n' > .venv/bin/python
chmod +x .venv/bin/python
exit {code}
"""


@pytest.fixture
def fake_uv(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A uv that only writes down how it was called; returns the file it writes to."""
    log = tmp_path / "uv.log"
    executable(tmp_path / "bin/uv", FAKE_UV.format(log=log, code="${UV_FAILS:-0}"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(bootstrap, "check_machine", lambda project: None)
    return log


def test_the_second_call_does_nothing(project: Path, fake_uv: Path) -> None:
    """A finished environment is left alone; a changed lock, or a moved folder, is set up again."""
    bootstrap.set_up(project)
    first = fake_uv.read_text(encoding="utf-8")
    assert first.splitlines()[0].startswith("sync --locked --quiet --python ")
    assert first.splitlines()[1:] == ["compiled"]
    bootstrap.set_up(project)
    assert fake_uv.read_text(encoding="utf-8") == first
    with (project / "uv.lock").open("a", encoding="utf-8") as lock:
        lock.write("\n")
    assert not bootstrap.is_current(project)
    bootstrap.set_up(project)
    assert len(fake_uv.read_text(encoding="utf-8").splitlines()) == 4
    moved = project.rename(project.with_name("moved"))
    assert not bootstrap.is_current(moved)


def test_a_failed_installation_leaves_no_stamp(project: Path, fake_uv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If uv fails, the next call tries again instead of believing that the environment is complete."""
    monkeypatch.setenv("UV_FAILS", "1")
    with pytest.raises(bootstrap.SetupFailed, match="run the command again"):
        bootstrap.set_up(project)
    assert not bootstrap.is_current(project)


def test_only_what_a_first_run_imports_is_compiled(tmp_path: Path) -> None:
    """Bytecode is written for the listed packages, less their tests and the parts that nothing imports."""
    packages = tmp_path / "tests" / "site-packages"  # a project may lie in a folder of that name
    for name in ("torch/a.py", "torch/testing/b.py", "torch/nn/tests/c.py", "unlisted/d.py", "megatron/core/e.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("x = 1\n", encoding="utf-8")
    # In its own process, as in the set-up: pytest's threads and a forked pool do not go together.
    code = (
        "from pathlib import Path; from course_lib.machine import bytecode; "
        f"bytecode.compile_first_run(Path({str(packages)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert sorted(path.name.split(".")[0] for path in tmp_path.rglob("*.pyc")) == ["a", "e"]


def test_the_compiled_packages_exist() -> None:
    """Each name of the two lists is really there: an upstream rename must not silently cost every learner a minute."""
    import sysconfig

    packages = Path(sysconfig.get_path("purelib"))
    gone = [name for name in [*bytecode.IMPORTED, *bytecode.LARGE_AND_UNUSED] if not (packages / name).is_dir()]
    assert gone == []


def test_bootstrap_imports_the_standard_library_only() -> None:
    """It runs before anything is installed, on Python 3.8: no third-party import, no newer syntax."""
    import ast

    text = (PROJECT / "course_lib/machine/bootstrap.py").read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 8))
    names = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names | {"__future__"}

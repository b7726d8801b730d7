"""The commands: Makefile, .ci/run and `course`."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from course_lib.__main__ import _parameters, app, summary
from course_lib.common.project import PROJECT

MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "-C", str(PROJECT), *arguments]
    return subprocess.run(
        command, env=dict(os.environ) | environment, check=False, capture_output=True, text=True, timeout=60
    )


def targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE).group(1).split())


def test_help_is_the_default_and_lists_every_target() -> None:
    """`make` alone shows each command with one line of text, so none is hidden."""
    shown = make().stdout
    assert shown == make("help").stdout
    assert set(re.findall(r"^  make (\S+) +\S.*$", shown, re.MULTILINE)) == targets()
    assert {"run", "test", "lab", "book", "bench"} <= targets()


@pytest.mark.parametrize("target", ["run", "test", "lab", "book", "bench", "doctor"])
def test_each_command_sets_up_first(target: str) -> None:
    """A command works on a fresh clone: the bootstrap comes before anything of .venv."""
    lines = make("--dry-run", target).stdout.strip().splitlines()
    assert lines[0].endswith("course_lib/machine/bootstrap.py")
    assert ".venv/bin/" in lines[1]


def test_make_run_ends_with_the_next_step() -> None:
    """`make run` executes lesson 03 and says what comes next."""
    assert ".venv/bin/course lesson 03 --open-hint" in make("--dry-run", "run").stdout


def test_bytecode_is_written_below_make() -> None:
    """PYTHONDONTWRITEBYTECODE of the machine does not reach the commands, else every process compiles all again."""
    probe = 'print-it: ; @echo "[$$PYTHONDONTWRITEBYTECODE]"\n'
    command = ["make", "--no-print-directory", "-C", str(PROJECT), "-f", "Makefile", "-f", "-", "print-it"]
    environment = dict(os.environ) | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, input=probe, env=environment, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_jupyter_gets_allow_root_only_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--allow-root` is a risk, so it is given only to root, whom Jupyter would refuse otherwise."""
    from course_lib.machine import desk

    assert ".venv/bin/course lab" in make("--dry-run", "lab").stdout
    for user, expected in ((0, True), (1000, False)):
        monkeypatch.setattr(desk.os, "getuid", lambda user=user: user)
        assert ("--allow-root" in desk.command("notebooks/00_check_your_setup.ipynb")) == expected


def test_ci_runs_the_readmes_command() -> None:
    """.ci/run is the test command of the README and nothing else."""
    script = PROJECT / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test"]
    assert "\nmake test " in (PROJECT / "README.md").read_text(encoding="utf-8")


def test_help_imports_nothing_heavy() -> None:
    """`course --help` answers at once: no torch, no megatron, no pandas, no matplotlib."""
    code = (
        "import sys; from course_lib.__main__ import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'megatron', 'pandas', 'matplotlib', 'transformers', 'IPython', 'papermill'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "lesson", "lab", "ledger"):
        assert f" {command} " in done.stdout


def test_a_lesson_says_where_its_results_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command ends with the executed lesson, each figure, each run directory and the next step."""
    from course_lib.lesson import notebooks

    asked = {}

    def execute(number: str, **options: object) -> SimpleNamespace:
        asked.update(number=number, **options)
        return SimpleNamespace(
            path=tmp_path / "03.ipynb", figures=[tmp_path / "loss.png"], runs=[tmp_path / "runs/smoke"]
        )

    monkeypatch.setattr(notebooks, "execute", execute)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["lesson", "03", "-p", "steps=20", "--open-hint"])
    assert done.exit_code == 0, done.output
    assert asked == {"number": "03", "parameters": {"steps": 20}, "output_directory": None}
    for line in (
        "executed lesson   03.ipynb",
        "figure            loss.png",
        "run directory     runs/smoke",
        "make lab",
    ):
        assert line in done.output


def test_an_unknown_lesson_is_one_line() -> None:
    """A wrong number ends with exit code 1 and a message, not with a traceback."""
    done = CliRunner().invoke(app, ["lesson", "99"])
    assert done.exit_code == 1
    assert "99" in done.output
    assert "Traceback" not in done.output


def test_a_failed_lesson_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lesson that raises fails the command, so that `make run` fails."""
    from course_lib.lesson import notebooks

    def execute(number: str, **options: object) -> None:
        raise notebooks.LessonFailed("cell `train` of lesson 03: out of memory")

    monkeypatch.setattr(notebooks, "execute", execute)
    done = CliRunner().invoke(app, ["lesson", "03"])
    assert done.exit_code == 1
    assert "out of memory" in done.output


def test_parameters_are_literals_or_text() -> None:
    """NAME=VALUE on the command line gives the types of a parameters cell."""
    assert _parameters(["steps=20", "rate=1e-3", "name=smoke", "on=True"]) == {
        "steps": 20,
        "rate": 1e-3,
        "name": "smoke",
        "on": True,
    }


def test_a_bad_parameter_says_the_form() -> None:
    """A parameter without a value is refused with the form that is wanted."""
    done = CliRunner().invoke(app, ["lesson", "03", "-p", "steps"])
    assert done.exit_code == 2
    assert "NAME=VALUE" in done.output


def test_paths_outside_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result outside the current folder is shown with its whole path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert str(tmp_path / "x.ipynb") in summary(SimpleNamespace(path=tmp_path / "x.ipynb", figures=[], runs=[]))

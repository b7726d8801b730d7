"""The doctor's report: complete, quick, and honest about which lessons run."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from course_lib import stack
from course_lib.common.project import VARIABLES
from course_lib.machine import doctor, installation
from course_lib.machine.installation import Package
from course_lib.machine.readings import Finding


@pytest.fixture(scope="module")
def told() -> subprocess.CompletedProcess:
    """What `course doctor --json` said; to import three packages takes ten processor seconds, so it is asked once."""
    command = [sys.executable, "-m", "course_lib", "doctor", "--json"]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def real(told: subprocess.CompletedProcess) -> doctor.Report:
    """The report of this environment, as the command made it."""
    content = json.loads(told.stdout)
    kinds = {"findings": Finding, "packages": Package, "stand_ins": stack.StandIn, "lessons": doctor.Lesson}
    rows = {name: tuple(kind(**row) for row in content[name]) for name, kind in kinds.items()}
    return doctor.Report(**rows, variables=tuple(content["variables"]))


def test_this_environment_is_healthy(real: doctor.Report) -> None:
    """The environment of `make setup` has no finding that stops a lesson."""
    assert [finding for finding in real.findings if finding.status == "fail"] == []
    assert real.exit_code == 0
    names = [finding.name for finding in real.findings]
    assert len(names) == len(set(names))


def test_packages_name_the_file_they_come_from(real: doctor.Report) -> None:
    """Each NVIDIA package is listed with its version and an existing file of the same installation."""
    found = {package.name: package for package in real.packages}
    for name, version in stack.TESTED.items():
        assert found[name].version == version
        assert Path(found[name].file).is_file()
    assert found["transformer-engine"].version is None


def test_each_package_beside_the_engine_is_imported(real: doctor.Report) -> None:
    """The report says of NeMo Run, Curator and AutoModel that they were imported, not only that they are installed."""
    imported = {finding.name: finding for finding in real.findings if finding.name.startswith("import of ")}
    assert set(imported) == {"import of nemo-run", "import of nemo-curator", "import of nemo-automodel"}
    assert {finding.status for finding in imported.values()} == {"ok"}


def test_a_problem_always_has_a_fix() -> None:
    """A finding that is not ok says how to mend it, and one that is ok asks for nothing."""
    with pytest.raises(ValueError, match="fix"):
        Finding("memory", "fail", "1 GiB")
    with pytest.raises(ValueError, match="fix"):
        Finding("memory", "ok", "64 GiB", "buy more")


def test_the_report_is_made_without_torch_and_megatron() -> None:
    """The doctor looks before it leaps: a broken torch must not break it, and it must be quick."""
    code = (
        "import sys; from course_lib.machine import doctor; doctor.as_json(doctor.report(imports=False))\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('torch', 'megatron', 'transformers', 'pandas')]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_json_is_the_whole_report(told: subprocess.CompletedProcess) -> None:
    """`course doctor --json` gives one JSON object with everything that is found in this process, and the imports."""
    content, here = json.loads(told.stdout), doctor.report(imports=False)
    assert told.returncode == content["exit_code"] == 0
    imported = [f"import of {name}" for name in installation.IMPORTED]
    assert [row["name"] for row in content["findings"]] == [finding.name for finding in here.findings] + imported
    assert content["packages"] == [asdict(package) for package in here.packages]
    assert {"name", "module", "version", "file"} == set(content["packages"][0])
    assert {"findings", "packages", "stand_ins", "lessons", "variables", "exit_code"} == set(content)


def test_tables_show_every_finding(real: doctor.Report, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal's table and lesson 00's frame hold each finding; brackets in a value are no colours."""
    extra = Finding("odd", "warn", "a [bold] value", "mend [it]")
    shown = doctor.Report((*real.findings, extra), real.packages, real.stand_ins, real.lessons, real.variables)
    doctor.show(shown)
    printed = capsys.readouterr().out
    assert all(finding.name in printed for finding in shown.findings)
    assert "a [bold] value" in printed
    assert all(name in printed for name in VARIABLES)
    frame = doctor.table(shown)
    assert list(frame.columns) == ["finding", "status", "value", "fix"]
    assert set(frame["finding"]) == {finding.name for finding in shown.findings}
    assert frame["status"].tolist() == sorted(frame["status"], key=["fail", "warn", "ok"].index)


def test_stand_ins_come_from_the_stack(real: doctor.Report) -> None:
    """What stands in for what is asked from `course_lib.stack`, not kept a second time."""
    assert list(real.stand_ins) == stack.stand_ins()


def test_a_failure_stops_the_lessons_that_train(tmp_path: Path) -> None:
    """Only existing lessons are listed; a failure stops those that train and names itself, lesson 00 still looks."""
    for name in ("00_check_your_setup", "03_smoke_test_with_mock_data", "03_smoke_test_with_mock_data-Copy1"):
        (tmp_path / f"{name}.ipynb").touch()
    healthy = doctor.lessons_that_run([Finding("memory", "ok", "24 GiB")], folder=tmp_path)
    assert [(x.number, x.title, x.runs) for x in healthy] == [
        ("00", "check your setup", True),
        ("03", "smoke test with mock data", True),
    ]
    assert healthy[1].reason == "on the CPU"
    assert doctor.lessons_that_run([], folder=tmp_path, device="cuda")[1].reason == "on 8 GPUs"
    broken = doctor.lessons_that_run([Finding("helpers_cpp", "fail", "missing", "install it")], folder=tmp_path)
    assert [(x.number, x.runs) for x in broken] == [("00", True), ("03", False)]
    assert broken[1].reason == "stopped by: helpers_cpp"
    assert doctor.Report((), (), (), broken, ()).exit_code == 1


def test_a_warning_stops_nothing(tmp_path: Path) -> None:
    """A warning changes neither the lessons nor the exit code."""
    (tmp_path / "03_x.ipynb").touch()
    findings = (Finding("cores", "warn", "1", "give it two"),)
    lessons = doctor.lessons_that_run(findings, folder=tmp_path)
    assert lessons[0].runs
    assert doctor.Report(findings, (), (), lessons, ()).exit_code == 0

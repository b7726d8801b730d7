"""The doctor: each trap is made for real where that is possible, else its reading is handed in."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib import doctor
from course_lib.doctor import Finding

GIB = 2**30
PINS = {"torch": "2.13.0", "megatron-core": "0.19.2", "megatron-bridge": "0.6.2"}


@pytest.fixture(scope="module")
def real() -> doctor.Report:
    return doctor.report()


def in_another_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = dict(os.environ) | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, check=False, capture_output=True, text=True, timeout=60
    )


# ------------------------------------------------------------------------------------------------ this machine, whole


def test_this_environment_is_healthy(real: doctor.Report) -> None:
    """The environment of `make setup` has no finding that stops a lesson."""
    assert [finding for finding in real.findings if finding.status == "fail"] == []
    assert real.exit_code == 0
    names = [finding.name for finding in real.findings]
    assert len(names) == len(set(names))


def test_packages_name_the_file_they_come_from(real: doctor.Report) -> None:
    """Each NVIDIA package is listed with its version and an existing file of the same installation."""
    found = {package.name: package for package in real.packages}
    for name, version in PINS.items():
        assert found[name].version == version
        assert Path(found[name].file).is_file()
    assert found["transformer-engine"].version is None


def test_a_problem_always_has_a_fix() -> None:
    """A finding that is not ok says how to mend it, and one that is ok asks for nothing."""
    with pytest.raises(ValueError, match="fix"):
        Finding("memory", "fail", "1 GiB")
    with pytest.raises(ValueError, match="fix"):
        Finding("memory", "ok", "64 GiB", "buy more")


def test_the_report_is_made_without_torch_and_megatron() -> None:
    """The doctor looks before it leaps: a broken torch must not break it, and it must be quick."""
    code = (
        "import sys; from course_lib import doctor; doctor.as_json(doctor.report())\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('torch', 'megatron', 'transformers', 'pandas')]\n"
        "assert not loaded, loaded"
    )
    done = in_another_process(code)
    assert done.returncode == 0, done.stderr


def test_json_is_the_whole_report(real: doctor.Report) -> None:
    """`course doctor --json` gives one JSON object with everything that the tables show."""
    done = subprocess.run([sys.executable, "-m", "course_lib", "doctor", "--json"], check=False, capture_output=True, text=True, timeout=60,
                          cwd=doctor.project())  # fmt: skip
    content = json.loads(done.stdout)
    assert done.returncode == content["exit_code"] == 0
    assert [row["name"] for row in content["findings"]] == [finding.name for finding in real.findings]
    assert {"name", "module", "version", "file"} == set(content["packages"][0])
    assert {"findings", "packages", "stand_ins", "lessons", "exit_code"} == set(content)


def test_tables_show_every_finding(real: doctor.Report, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal's table and lesson 00's frame hold each finding; brackets in a value are shown.

    Not read as colours.
    """
    extra = Finding("odd", "warn", "a [bold] value", "mend [it]")
    shown = doctor.Report((*real.findings, extra), real.packages, real.stand_ins, real.lessons)
    doctor.show(shown)
    printed = capsys.readouterr().out
    assert all(finding.name in printed for finding in shown.findings)
    assert "a [bold] value" in printed
    frame = doctor.table(shown)
    assert list(frame.columns) == ["finding", "status", "value", "fix"]
    assert set(frame["finding"]) == {finding.name for finding in shown.findings}
    assert frame["status"].tolist() == sorted(frame["status"], key=["fail", "warn", "ok"].index)


def test_stand_ins_come_from_the_stack(real: doctor.Report) -> None:
    """What stands in for what is asked from `course_lib.stack`, not kept a second time."""
    from course_lib import stack

    assert list(real.stand_ins) == stack.stand_ins()


# --------------------------------------------------------------------------------------------------- which lessons run


def test_a_failure_stops_the_lessons_that_train(tmp_path: Path) -> None:
    """Only existing lessons are listed; a failure stops those that train and names itself, lesson 00 still looks."""
    for name in ("00_check_your_setup.ipynb", "03_smoke_test_with_mock_data.ipynb"):
        (tmp_path / name).touch()
    healthy = doctor.lessons_that_run([Finding("memory", "ok", "24 GiB")], notebooks=tmp_path)
    assert [(x.number, x.title, x.runs) for x in healthy] == [
        ("00", "check your setup", True),
        ("03", "smoke test with mock data", True),
    ]
    assert healthy[1].reason == "on the CPU"
    assert doctor.lessons_that_run([], notebooks=tmp_path, gpu_count=8)[1].reason == "on 8 GPUs"
    broken = doctor.lessons_that_run([Finding("helpers_cpp", "fail", "missing", "install it")], notebooks=tmp_path)
    assert [(x.number, x.runs) for x in broken] == [("00", True), ("03", False)]
    assert broken[1].reason == "stopped by: helpers_cpp"
    assert doctor.Report((), (), (), broken).exit_code == 1


def test_a_warning_stops_nothing(tmp_path: Path) -> None:
    """A warning changes neither the lessons nor the exit code."""
    (tmp_path / "03_x.ipynb").touch()
    findings = (Finding("cores", "warn", "1", "give it two"),)
    lessons = doctor.lessons_that_run(findings, notebooks=tmp_path)
    assert lessons[0].runs
    assert doctor.Report(findings, (), (), lessons).exit_code == 0


# -------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("finding", "status", "word"),
    [
        (doctor.python(version=(3, 11, 9)), "fail", "3.12"),
        (doctor.python(version=(3, 12, 1)), "ok", ""),
        (doctor.glibc(version=(2, 17)), "fail", "2.28"),
        (doctor.cores(count=1), "warn", "two cores"),
        (doctor.cores(count=2.0), "ok", ""),
        (doctor.memory(total_bytes=4 * GIB), "fail", "6 GiB"),
        (doctor.disk(Path("/"), free_bytes=GIB // 2), "fail", "COURSE_RUNS"),
        (doctor.shared_memory(size_bytes=64 * 2**20), "warn", "--shm-size"),
        (doctor.shared_memory(path=Path("/no/such/folder")), "warn", "--shm-size"),
        (doctor.file_descriptors(limit=256), "warn", "ulimit -n"),
        (doctor.file_descriptors(limit=-1), "ok", ""),
        (doctor.text_encoding(encoding="ISO-8859-1"), "warn", "LC_ALL"),
        (doctor.text_encoding(encoding="utf8"), "ok", ""),
        (doctor.bytecode(environment={"PYTHONDONTWRITEBYTECODE": "1"}), "warn", "unset"),
        (doctor.bytecode(environment={}), "ok", ""),
        (doctor.hub(environment={"HF_TOKEN": "x"}), "ok", ""),
        (doctor.gpus([]), "ok", ""),
        (doctor.gpus(None), "warn", "nvidia-smi"),
        (doctor.gpus(["NVIDIA H100, 81559 MiB"] * 8), "ok", ""),
    ],
    ids=lambda value: value.name if isinstance(value, Finding) else str(value),
)
def test_thresholds(finding: Finding, status: str, word: str) -> None:
    """Each reading of the machine has its limit, and what is under it says what to do."""
    assert finding.status == status
    assert word in finding.fix


def test_a_secret_is_never_shown() -> None:
    """A report is pasted into issues: it says that a token is set, never which."""
    assert "hf_abc" not in doctor.hub(environment={"HF_TOKEN": "hf_abc"}).value


def test_cores_are_the_containers(tmp_path: Path) -> None:
    """A container with a quota of one and a half cores has no more, on control groups of either version."""
    (tmp_path / "cpu.max").write_text("50000 100000\n", encoding="ascii")
    assert doctor.available_cores(cgroup=str(tmp_path)) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert doctor.available_cores(cgroup=str(tmp_path)) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("25000", encoding="ascii")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000", encoding="ascii")
    assert doctor.available_cores(cgroup=str(tmp_path)) == 0.25


def test_a_broken_driver_is_not_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi that fails or hangs is told apart from a machine without it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.installed_gpus() == []
    smi = tmp_path / "nvidia-smi"
    for text, expected in (
        ("exit 9", None),
        ("echo 'H100, 81559 MiB'; echo 'H100, 81559 MiB'", ["H100, 81559 MiB"] * 2),
    ):
        smi.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        smi.chmod(0o755)
        assert doctor.installed_gpus() == expected


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runs folder on a read-only mount stops the lessons; root ignores permission bits.

    So a file is really written.
    """
    assert doctor.runs_writable(tmp_path / "runs" / "not-yet").status == "ok"
    assert list(tmp_path.iterdir()) == []
    found = doctor.runs_writable(Path("/proc/runs"))
    assert found.status == "fail"
    assert "COURSE_RUNS" in found.fix
    monkeypatch.setenv("COURSE_RUNS", "/proc/runs")
    assert doctor.runs_directory() == Path("/proc/runs")


# -------------------------------------------------------------------------------------------------------- the network


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def test_gloo_binds_to_loopback() -> None:
    """With the interface named `lo`, a byte really travels over a socket of this machine."""
    found = doctor.gloo(environment={"GLOO_SOCKET_IFNAME": "lo"})
    assert statuses(found) == {"loopback": "ok", "gloo": "ok"}
    assert "127.0.0.1" in found[1].value


def test_gloo_with_an_interface_that_is_not_there() -> None:
    """A GLOO_SOCKET_IFNAME copied from another machine stops every rank, so it stops here first."""
    found = doctor.gloo(environment={"GLOO_SOCKET_IFNAME": "eth99"})
    assert statuses(found) == {"loopback": "ok", "gloo": "fail"}
    assert "eth99" in found[1].value
    assert "unset GLOO_SOCKET_IFNAME" in found[1].fix


def test_gloo_with_a_host_name_that_does_not_resolve() -> None:
    """The classic cause: gloo falls back to loopback with a warning, and the fix is one line of /etc/hosts."""
    found = doctor.gloo(environment={}, hostname="no-such-host.invalid")
    assert statuses(found) == {"loopback": "ok", "gloo": "warn"}
    assert "127.0.0.1 no-such-host.invalid" in found[1].fix


def test_gloo_with_an_address_of_another_machine() -> None:
    """A host name that resolves to an address which this machine does not have cannot be bound to."""
    found = doctor.gloo(environment={}, hostname="192.0.2.1")  # reserved for documentation: no machine has it
    assert found[1].status == "warn"
    assert "192.0.2.1" in found[1].value


def test_a_broken_loopback_stops_the_lessons() -> None:
    """Without loopback no rank finds another."""

    def refuse(address: str) -> None:
        raise OSError("Network is unreachable")

    found = doctor.gloo(environment={}, hostname="localhost", talk=refuse)
    assert statuses(found) == {"loopback": "fail", "gloo": "warn"}


def test_a_silent_name_server_does_not_hang_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that never returns is given up after the stated seconds."""
    import threading

    never = threading.Event()
    monkeypatch.setattr(doctor.socket, "getaddrinfo", lambda *a, **k: never.wait())
    found = doctor.gloo(environment={}, hostname="slow", seconds=0.05)
    never.set()
    assert "no answer within 0.05 s" in found[1].value


# ------------------------------------------------------------------------------------------------------- the packages


def test_the_foreign_megatron_is_caught(tmp_path: Path) -> None:
    """PyPI's `megatron` puts an __init__.py where NVIDIA has a namespace package: the fix names both."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/__init__.py").write_text("raise RuntimeError('must not be imported')\n", encoding="utf-8")
    code = "from course_lib import doctor as d; f = d.foreign_megatron(); print(f.status, f.value); print(f.fix)"
    done = in_another_process(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith(f"fail hidden by {tmp_path}/megatron/__init__.py"), done.stderr
    assert "pip uninstall -y megatron" in done.stdout
    assert doctor.foreign_megatron().status == "ok"


def test_the_foreign_megatron_fails_the_command(tmp_path: Path) -> None:
    """`course doctor` ends with exit code 1 where a lesson could not run."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/__init__.py").touch()
    done = in_another_process(
        "import sys; from course_lib import doctor; sys.exit(doctor.main())", PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 1, done.stderr
    assert "megatron namespace" in done.stdout


def source_checkout(folder: Path, *parts: str) -> Path:
    for part in parts:
        (folder / "megatron" / part).mkdir(parents=True)
        (folder / "megatron" / part / "__init__.py").touch()
    return folder


def test_a_source_checkout_beside_the_wheel(tmp_path: Path) -> None:
    """A Megatron-LM checkout on PYTHONPATH takes part of the namespace: core from there, Bridge from the wheel."""
    source_checkout(tmp_path, "core")
    code = (
        "from course_lib import doctor as d; f = d.mixed_installation(d.installed()); print(f.status, "
        "f.value); print(f.fix)"
    )
    done = in_another_process(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith("fail 2 copies of megatron.core"), done.stderr
    assert str(tmp_path) in done.stdout
    assert "PYTHONPATH" in done.stdout.splitlines()[-1]


def test_bridge_from_elsewhere_than_core(tmp_path: Path) -> None:
    """Core and Bridge must come from one folder, and from the folder that their metadata names."""
    one, other = source_checkout(tmp_path / "a", "core"), source_checkout(tmp_path / "b", "bridge")
    found = doctor.mixed_installation(
        {}, core_places=[one / "megatron/core/__init__.py"], bridge_places=[other / "megatron/bridge/__init__.py"]
    )
    assert found.status == "fail"
    assert f"core comes from {one}, Bridge from {other}" in found.value
    records = {"megatron-core": [importlib.metadata.distribution("megatron-core")]}
    found = doctor.mixed_installation(records, core_places=[one / "megatron/core/__init__.py"], bridge_places=[])
    assert f"imported from {one / 'megatron/core'}" in found.value


def test_two_records_of_one_package(tmp_path: Path) -> None:
    """A second dist-info of Megatron Core on the path means that pip no longer knows what is imported."""
    info = tmp_path / "megatron_core-0.15.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n", encoding="utf-8")
    code = "from course_lib import doctor as d; f = d.mixed_installation(d.installed()); print(f.status, f.value)"
    done = in_another_process(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith("fail megatron-core is installed 2 times: 0.15.0, 0.19.2"), done.stderr


def test_a_missing_or_broken_helper(tmp_path: Path) -> None:
    """The compiled index builder is really loaded; a missing one and a damaged one name the wheel to reinstall."""
    assert doctor.helpers().status == "ok"
    (tmp_path / "datasets").mkdir()
    missing = doctor.helpers(core=tmp_path)
    assert (missing.status, "missing" in missing.value, "megatron-core==0.19.2" in missing.fix) == ("fail", True, True)
    from importlib.machinery import EXTENSION_SUFFIXES

    (tmp_path / f"datasets/helpers_cpp{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    broken = doctor.helpers(core=tmp_path)
    assert broken.status == "fail"
    assert "does not load" in broken.value


def test_torch_without_gloo(tmp_path: Path) -> None:
    """A torch built without gloo is found by its library; the installed one has it."""
    assert doctor.torch_has_gloo().status == "ok"
    library = tmp_path / "libtorch_python.so"
    library.write_bytes(b"\x7fELF" + b"N4c10d15ProcessGroupMPIE")
    assert doctor.torch_has_gloo(library=library).status == "fail"
    assert "cannot be read" in doctor.torch_has_gloo(library=tmp_path / "none.so").value


def rows(**versions: str | None) -> list[doctor.Package]:
    return [doctor.Package(name, name, versions.get(name.replace("-", "_"), PINS[name]), None) for name in PINS]


def test_a_container_with_another_version_says_what_to_install() -> None:
    """nemo:26.06 carries Bridge 0.5.0 and core 0.18.0: the fix installs the tested ones and leaves torch alone."""
    container = {"NEMO_VERSION": "26.06"}
    found = doctor.versions(
        rows(megatron_bridge="0.5.0", megatron_core="0.18.0"), pinned=PINS, environment=container, has_gpus=True
    )
    by_name = {finding.name: finding for finding in found}
    assert by_name["version of torch"].status == "ok"
    for name in ("megatron-bridge", "megatron-core"):
        finding = by_name[f"version of {name}"]
        assert finding.status == "warn"
        assert f"pip install --no-deps {name}=={PINS[name]}" in finding.fix
    assert "0.5.0, tested with 0.6.2 (in NVIDIA's container: 26.06)" in by_name["version of megatron-bridge"].value


def test_other_versions_stop_the_lessons_on_a_cpu() -> None:
    """The CPU redirection is tested against exact versions; a missing package stops the lessons everywhere."""
    on_cpu = doctor.versions(rows(megatron_bridge="0.5.0"), pinned=PINS, environment={}, has_gpus=False)
    assert [finding.status for finding in on_cpu] == ["ok", "ok", "fail"]
    absent = doctor.versions(rows(torch=None), pinned=PINS, environment={}, has_gpus=True)
    assert absent[0].status == "fail"
    assert absent[0].value.startswith("not installed")
    local = doctor.versions(rows(torch="2.13.0+cpu"), pinned=PINS, environment={}, has_gpus=False)
    assert local[0].status == "ok"


def test_the_pins_are_those_of_pyproject(tmp_path: Path) -> None:
    """The tested versions are read from pyproject.toml, not repeated."""
    assert {name: doctor.pins()[name] for name in PINS} == PINS
    other = tmp_path / "pyproject.toml"
    other.write_text('[project]\ndependencies = ["torch==9.9.9", "pandas>=2"]\n', encoding="utf-8")
    assert doctor.pins(other) == {"torch": "9.9.9"}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"nemo-run": "0.11.1", "leptonai": "0.47.0"}, "warn"),
        ({"nemo-run": "0.11.1", "leptonai": "1.0"}, "warn"),
        ({"nemo-run": "0.11.1", "leptonai": "0.26.6"}, "ok"),
    ],
)
def test_leptonai_that_breaks_nemo_run(found: dict[str, str], status: str) -> None:
    """leptonai 0.47 dropped what nemo-run 0.11.1 imports."""
    assert doctor.leptonai(found).status == status
    assert doctor.leptonai({"leptonai": "0.47.0"}) is None

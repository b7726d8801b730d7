"""The readings of the machine: each is made wrong for real where that is possible, else handed in."""

import os
import re
import threading
from pathlib import Path

import pytest

from course_lib import runs, stack
from course_lib.common.units import GiB
from course_lib.machine import doctor, readings
from course_lib.machine.readings import Finding


@pytest.mark.parametrize(
    ("finding", "status", "word"),
    [
        (readings.python(version=(3, 11, 9)), "fail", "3.12"),
        (readings.python(version=(3, 12, 1)), "ok", ""),
        (readings.glibc(version=(2, 17)), "fail", "2.28"),
        (readings.glibc(version=()), "fail", "2.28"),
        (readings.cores(count=1), "warn", "two cores"),
        (readings.cores(count=2.0), "ok", ""),
        (readings.memory(total_bytes=4 * GiB), "fail", "6 GiB"),
        (readings.disk(Path("/"), free_bytes=GiB // 2), "fail", "COURSE_RUNS"),
        (readings.shared_memory(size_bytes=64 * 2**20), "warn", "--shm-size"),
        (readings.shared_memory(folder=Path("/no/such/folder")), "warn", "--shm-size"),
        (readings.open_files(limit=256), "warn", "ulimit -n"),
        (readings.open_files(limit=-1), "ok", ""),
        (readings.text_encoding(encoding="ISO-8859-1"), "warn", "LC_ALL"),
        (readings.text_encoding(encoding="utf8"), "ok", ""),
        (readings.bytecode(environment={"PYTHONDONTWRITEBYTECODE": "1"}), "warn", "unset"),
        (readings.bytecode(environment={}), "ok", ""),
        (readings.hub(environment={"HF_TOKEN": "x"}), "ok", ""),
        (readings.gpus([], device=lambda _: "cpu"), "ok", ""),
        (readings.gpus(None, device=lambda _: "cpu"), "warn", "nvidia-smi"),
        (readings.gpus(["NVIDIA H100, 81559 MiB"] * 8, device=lambda _: "cuda"), "ok", ""),
    ],
    ids=lambda value: value.name if isinstance(value, Finding) else str(value),
)
def test_thresholds(finding: Finding, status: str, word: str) -> None:
    """Each reading of the machine has its limit, and what is under it says what to do."""
    assert finding.status == status
    assert word in finding.fix


def test_a_secret_is_never_shown() -> None:
    """A report is pasted into issues: it says that a token is set, never which."""
    assert "hf_abc" not in readings.hub(environment={"HF_TOKEN": "hf_abc"}).value


def test_cores_are_the_containers(tmp_path: Path) -> None:
    """A container with a quota of one and a half cores has no more, on control groups of either version."""
    (tmp_path / "cpu.max").write_text("50000 100000\n", encoding="ascii")
    assert readings.available_cores(cgroup=str(tmp_path)) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert readings.available_cores(cgroup=str(tmp_path)) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("25000", encoding="ascii")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000", encoding="ascii")
    assert readings.available_cores(cgroup=str(tmp_path)) == 0.25


def test_a_broken_driver_is_not_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi that fails or hangs is told apart from a machine without it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert stack.gpus() == []
    smi = tmp_path / "nvidia-smi"
    for text, expected in (
        ("exit 9", None),
        ("echo 'GPU-a, H100, 81559 MiB'; echo 'GPU-b, H100, 81559 MiB'", ["H100, 81559 MiB"] * 2),
    ):
        smi.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        smi.chmod(0o755)
        assert stack.gpus() == expected
        assert stack.gpu_count() == len(expected or [])


def test_the_doctor_and_the_launcher_see_the_same_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA_VISIBLE_DEVICES hides, or COURSE_DEVICE overrides, the doctor does not promise."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\nfor rank in 0 1 2 3 4 5 6 7; do echo "GPU-$rank, H100, 81559 MiB"; done\n', encoding="utf-8"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    for visible, asked, device, value in (
        (None, None, "cuda", "8 x H100, 81559 MiB (eight ranks use them)"),
        ("0,1,2", None, "cpu", "3 x H100, 81559 MiB (eight ranks run on the CPU)"),
        ("0,1,2,3,4,5,-1,7", None, "cpu", "6 x H100, 81559 MiB (eight ranks run on the CPU)"),
        ("GPU-3, GPU-1", None, "cpu", "2 x H100, 81559 MiB (eight ranks run on the CPU)"),
        ("9", None, "cpu", "none: the ranks run on the CPU"),
        ("", None, "cpu", "none: the ranks run on the CPU"),
        (None, "cpu", "cpu", "8 x H100, 81559 MiB (eight ranks run on the CPU)"),
    ):
        for name, setting in (("CUDA_VISIBLE_DEVICES", visible), ("COURSE_DEVICE", asked)):
            monkeypatch.delenv(name, raising=False) if setting is None else monkeypatch.setenv(name, setting)
        assert stack.device(8) == device
        assert next(found for found in readings.findings() if found.name == "GPUs").value == value


def test_a_device_that_there_is_not_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor says so and goes on, instead of failing itself."""
    monkeypatch.setenv("COURSE_DEVICE", "gpu")
    (found,) = [finding for finding in doctor.report(imports=False).findings if finding.name == "GPUs"]
    assert (found.status, found.value) == ("fail", "COURSE_DEVICE is 'gpu'")
    assert "unset COURSE_DEVICE" in found.fix


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runs folder on a read-only mount stops the lessons; root ignores permission bits, so a file is written."""
    assert readings.runs_writable(tmp_path / "runs" / "not-yet").status == "ok"
    assert list(tmp_path.iterdir()) == []
    found = readings.runs_writable(Path("/proc/runs"))
    assert found.status == "fail"
    assert "COURSE_RUNS" in found.fix
    monkeypatch.setenv("COURSE_RUNS", "/proc/runs")
    assert found in readings.findings()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("dangling", r"a link to .*/nowhere, which does not exist"),
        ("file", "it is a file"),
        ("file/in", "it is a file"),
    ],
)
def test_a_place_that_holds_no_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    """The doctor and the launch say the same of a link to nowhere and of a file, and write nothing."""
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / place))
    assert re.search(words, readings.runs_writable(runs.directory()).value)
    with pytest.raises(runs.RunsUnwritable, match=words + ".*set COURSE_RUNS"):
        runs.create("smoke")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "has 300 bytes: use at most 200"),
        ("ä" * 101, "202 bytes"),
        ("a/b", "use letters"),
        ("..", "use letters"),
        ("", "use letters"),
        (None, "use letters"),
    ],
)
def test_a_name_that_is_none_is_refused(runs_directory: Path, name: str, words: str) -> None:
    """Nothing is written, not even the directory of runs."""
    with pytest.raises(ValueError, match=words):
        runs.create(name)
    assert not runs_directory.exists()
    assert runs.create("a" * 200).is_dir() and runs.create("a" * 200).name.endswith("a-2")


@pytest.mark.parametrize(
    ("interface", "hostname", "status", "value", "fix"),
    [
        ("lo", "any", "ok", "127.0.0.1", ""),
        ("eth99", "any", "fail", "eth99", "unset GLOO_SOCKET_IFNAME"),
        ("", "no-such-host.invalid", "warn", "no-such-host.invalid", "127.0.0.1 no-such-host.invalid"),
        ("", "192.0.2.1", "warn", "192.0.2.1", "GLOO_SOCKET_IFNAME=lo"),  # reserved for documentation: nobody has it
        ("", "x" * 64, "warn", "label", "GLOO_SOCKET_IFNAME=lo"),  # Linux allows the name, DNS does not
    ],
)
def test_gloo_binds_or_says_why(interface: str, hostname: str, status: str, value: str, fix: str) -> None:
    """A byte really travels where gloo will bind; a wrong interface stops the ranks, a wrong host name warns them."""
    found = readings.gloo(environment={"GLOO_SOCKET_IFNAME": interface}, hostname=hostname)
    assert found.status == status
    assert value in found.value
    assert fix in found.fix


def test_a_broken_loopback_stops_the_lessons() -> None:
    """Without loopback no rank finds another."""

    def refuse(address: str) -> None:
        raise OSError("Network is unreachable")

    assert readings.loopback().status == "ok"
    assert readings.loopback(talk=refuse).status == "fail"
    assert readings.gloo(environment={}, hostname="localhost", talk=refuse).status == "warn"


def test_a_silent_name_server_does_not_hang_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that never returns is given up after the stated seconds."""
    never = threading.Event()

    def silent(*_: object, **__: object) -> None:
        never.wait()
        raise OSError

    monkeypatch.setattr(readings.socket, "getaddrinfo", silent)
    found = readings.gloo(environment={}, hostname="slow", seconds=0.05)
    never.set()
    assert "no answer within 0.05 s" in found.value


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\t{far}\tPIX\t0-55\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tSYS\t0-55\t0\t\tN/A
GPU2\t{far}\tNV18\t X \tSYS\t56-111\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


@pytest.mark.parametrize(
    ("answer", "status", "value"),
    [
        (TOPOLOGY.format(far="NV18"), "ok", "NV18 between all pairs"),
        (TOPOLOGY.format(far="SYS"), "warn", "1 of 3 pairs without NVLink, GPU0-GPU2 by SYS"),
        ("\tGPU0\tCPU Affinity\nGPU0\t X \t0-55\n", "ok", "one GPU"),
        ("no devices were found\n", "warn", "gave no matrix"),
        (None, "warn", "`nvidia-smi topo -m` fails: CalledProcessError"),
    ],
)
def test_the_wires_between_gpus_are_read(tmp_path, monkeypatch, answer, status, value) -> None:
    """NVLink between all pairs is well; a pair that goes through the processors is named, and so is a silent tool."""
    (tmp_path / "matrix").write_text(answer or "")
    smi = tmp_path / "nvidia-smi"
    told = f"[ \"$1 $2\" = 'topo -m' ] && /bin/cat {tmp_path / 'matrix'}" if answer else "exit 9"
    smi.write_text(f"#!/bin/sh\n{told}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = readings.topology()
    assert (found.status, value in found.value) == (status, True), found


def test_a_gpu_node_is_looked_at_more_closely(tmp_path, monkeypatch) -> None:
    """Wires and limits are findings where there are GPUs, and nowhere else; memory that may not be locked is told."""
    extra = {"GPU topology", "locked memory"}
    assert not extra & {found.name for found in readings.findings()}
    monkeypatch.setattr(readings.stack, "gpus", lambda: ["H100, 81559 MiB"] * 8)
    assert extra <= {found.name for found in readings.findings()}
    assert readings.locked_memory(limit=64 * 1024).fix.startswith("Start the container with `--ulimit memlock=-1`")
    assert readings.locked_memory(limit=-1).value == "unlimited"

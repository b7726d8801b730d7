"""The checks of the installed packages: each trap is made for real where that is possible."""

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from course_lib import stack
from course_lib.machine import doctor, installation

PRINT = "from course_lib.machine import installation as i; f = i.{check}; print(f.status, f.value); print(f.fix)"
ONE_INSTALLATION = PRINT.format(check="one_installation(i.places('megatron.core'), i.places('megatron.bridge'))")


def beside(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What a process says that finds another folder first when it imports."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)


def test_the_foreign_megatron_is_caught(tmp_path: Path) -> None:
    """PyPI's `megatron` puts an __init__.py where NVIDIA has a namespace package: the fix names both."""
    packages = tmp_path / "site-packages"
    (packages / "megatron").mkdir(parents=True)
    (packages / "megatron/__init__.py").write_text("raise RuntimeError('must not be imported')\n", encoding="utf-8")
    done = beside(packages, PRINT.format(check="foreign_megatron()"))
    assert done.stdout.startswith(f"fail hidden by {packages}/megatron/__init__.py"), done.stderr
    assert "pip uninstall -y megatron" in done.stdout
    assert installation.foreign_megatron().status == "ok"


@pytest.mark.parametrize("name", ["megatron/__init__.py", "megatron.py"])
def test_a_folder_of_your_own_is_not_to_be_uninstalled(tmp_path: Path, name: str) -> None:
    """pip knows nothing of a folder or a file that you called `megatron`: the fix is another name."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    done = beside(tmp_path, PRINT.format(check="foreign_megatron()"))
    assert done.stdout.startswith(f"fail hidden by {tmp_path / name}"), done.stderr
    mine = tmp_path / name.removesuffix("/__init__.py")
    assert f"Rename {mine}, or take {tmp_path} off PYTHONPATH" in done.stdout and "pip" not in done.stdout


def test_the_foreign_megatron_fails_the_command(tmp_path: Path) -> None:
    """`course doctor` ends with exit code 1 where a lesson could not run."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/__init__.py").touch()
    done = beside(tmp_path, "import sys; from course_lib.machine import doctor; sys.exit(doctor.main(quick=True))")
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
    done = beside(tmp_path, ONE_INSTALLATION)
    assert done.stdout.startswith("fail 2 copies of megatron.core"), done.stderr
    assert str(tmp_path) in done.stdout
    assert "PYTHONPATH" in done.stdout.splitlines()[-1]


def test_bridge_from_elsewhere_than_core(tmp_path: Path) -> None:
    """Core and Bridge must come from one folder, and from the folder that their metadata names."""
    one, other = source_checkout(tmp_path / "a", "core"), source_checkout(tmp_path / "b", "bridge")
    found = installation.one_installation([one / "megatron/core/__init__.py"], [other / "megatron/bridge/__init__.py"])
    assert found.status == "fail"
    assert f"core comes from {one}, Bridge from {other}" in found.value
    assert f"imported from {one / 'megatron/core'}" in found.value


def test_two_records_of_one_package(tmp_path: Path) -> None:
    """A second dist-info of Megatron Core on the path means that pip no longer knows what is imported."""
    info = tmp_path / "megatron_core-0.15.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n", encoding="utf-8")
    done = beside(tmp_path, ONE_INSTALLATION)
    assert done.stdout.startswith("fail megatron-core is installed 2 times: 0.15.0, 0.19.2"), done.stderr


def test_a_missing_or_broken_helper(tmp_path: Path) -> None:
    """The compiled index builder is really loaded; a missing one and a damaged one name the wheel to reinstall."""
    assert installation.helpers().status == "ok"
    missing = installation.helpers(tmp_path)
    assert (missing.status, "missing" in missing.value, "megatron-core==0.19.2" in missing.fix) == ("fail", True, True)
    (tmp_path / f"helpers_cpp{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    broken = installation.helpers(tmp_path)
    assert broken.status == "fail"
    assert "does not load" in broken.value


def test_torch_without_gloo(tmp_path: Path) -> None:
    """A torch built without gloo is found by its library; the installed one has it."""
    assert installation.torch_has_gloo().status == "ok"
    library = tmp_path / "libtorch_python.so"
    library.write_bytes(b"\x7fELF" + b"N4c10d15ProcessGroupMPIE")
    assert installation.torch_has_gloo(library).status == "fail"
    assert "is missing" in installation.torch_has_gloo(tmp_path / "none.so").value


def test_a_container_with_another_version_says_what_to_install() -> None:
    """nemo:26.06 carries Bridge 0.5.0 and core 0.18.0: the fix installs the tested ones and leaves torch alone."""
    container = {"NEMO_VERSION": "26.06"}
    found = installation.versions(
        stack.TESTED | {"megatron-bridge": "0.5.0", "megatron-core": "0.18.0"}, environment=container, has_gpus=True
    )
    by_name = {finding.name: finding for finding in found}
    assert by_name["version of torch"].status == "ok"
    for name in ("megatron-bridge", "megatron-core"):
        finding = by_name[f"version of {name}"]
        assert finding.status == "warn"
        assert f"pip install --no-deps {name}=={stack.TESTED[name]}" in finding.fix
    assert "0.5.0, tested with 0.6.2 (in NVIDIA's container: 26.06)" in by_name["version of megatron-bridge"].value


def test_other_versions_stop_the_lessons_on_a_cpu() -> None:
    """The CPU redirection is tested against exact versions; a missing package stops the lessons everywhere."""
    other = stack.TESTED | {"megatron-bridge": "0.5.0"}
    on_cpu = installation.versions(other, environment={}, has_gpus=False)
    assert [finding.status for finding in on_cpu] == ["ok", "ok", "fail"]
    absent = installation.versions(stack.TESTED | {"torch": None}, environment={}, has_gpus=True)
    assert absent[0].status == "fail"
    assert absent[0].value.startswith("not installed")


@pytest.mark.parametrize(("found", "status"), [("0.47.0", "warn"), ("1.0", "warn"), ("0.26.6", "ok"), (None, "ok")])
def test_leptonai_that_breaks_nemo_run(found: str | None, status: str) -> None:
    """leptonai 0.47 dropped what nemo-run 0.11.1 imports."""
    assert installation.leptonai(found).status == status


def test_a_missing_part_beside_the_engine_is_named() -> None:
    """NeMo Run, Curator and AutoModel are dependencies of the course; training goes on without one, so it is a warning."""
    installed = {name: installation.version(name) for name in installation.BESIDE_THE_ENGINE}
    assert installation.beside_the_engine(installed).status == "ok"
    finding = installation.beside_the_engine(installed | {"nemo-curator": None})
    assert (finding.status, finding.value) == ("warn", "not importable: nemo-curator")
    assert "make setup" in finding.fix


def test_a_broken_package_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed but cannot be imported is named with its last words and a fix; a good one is ok."""
    (tmp_path / "nemo_run.py").write_text("raise RuntimeError('planted: a part of it is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken, whole = installation.imports({"nemo-run": "nemo_run", "nemo-curator": "json"}, seconds_limit=120)
    assert (broken.name, broken.status) == ("import of nemo-run", "warn")
    assert "RuntimeError: planted: a part of it is missing" in broken.value
    assert f"--reinstall nemo-run=={installation.version('nemo-run')}" in broken.fix
    assert (whole.name, whole.status) == ("import of nemo-curator", "ok")


def test_an_import_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that hangs costs the limit and no more, and the doctor says how to look at it alone."""
    (tmp_path / "nemo_run.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = installation.imports({"nemo-run": "nemo_run"}, seconds_limit=1)
    assert (finding.status, finding.value) == ("warn", "not over within 1 s")
    assert "import nemo_run" in finding.fix


def test_a_gpu_node_needs_cuda_nccl_and_transformer_engine(tmp_path, monkeypatch) -> None:
    """A torch of the CPU index, a library that is no NCCL, missing layers: each is a finding where the ranks have GPUs."""
    assert installation.torch_has_cuda(tmp_path / "libtorch_cuda.so").status == "fail"
    assert installation.nccl().status == "ok" and installation.nccl().value.startswith("2.")
    assert installation.nccl("libc.so.6").status == installation.nccl("libno-such.so").status == "fail"
    assert installation.transformer_engine([]).status == "ok"
    assert "--extra gpu" in installation.transformer_engine(["transformer_engine"]).fix
    asked = {"CUDA in torch", "NCCL", "Transformer Engine"}
    names = {gpus: {found.name for found in installation.findings(has_gpus=gpus)} for gpus in (True, False)}
    assert names[True] - names[False] == asked


def test_one_gpu_does_not_excuse_other_versions(monkeypatch) -> None:
    """With one GPU the eight ranks run on the CPU, where the redirection refuses another torch: the doctor says so first."""
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    monkeypatch.setattr(doctor.stack, "versions", lambda: doctor.stack.TESTED | {"torch": "2.11.0"})
    status = {}
    for count in (1, 8):
        monkeypatch.setattr(doctor.stack, "gpu_count", lambda count=count: count)
        found = {finding.name: finding for finding in doctor.report(imports=False).findings}
        status[count] = found["version of torch"].status
    assert status == {1: "fail", 8: "warn"}


def test_what_fills_a_namespace_and_who_imports_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders fill one namespace; a file that names the other in any import counts, one without does not."""
    written = {"one/space/a/__init__.py": "import space.b", "one/space/a/c.py": "from space.b import d\n# x",
               "one/space/a/e.py": "import os", "two/space/b/__init__.py": "", "two/space/notes/f.py": ""}  # fmt: skip
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for root in ("one", "two"):
        monkeypatch.syspath_prepend(tmp_path / root)
    assert installation.inside("space") == {"a", "b"}
    assert installation.importing("space.a", "space.b") == 2 and installation.importing("space.b", "space.a") == 0
    assert installation.source("space.a", "e.py") == "import os"

"""The bundle for a node without a network: what goes in, how it is cut, and the one command that unpacks it."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from course_lib.machine.gpu import bundle, kernels, start
from course_lib.machine.gpu.bundle import CannotBundle, Part, Target

NODE = Target("3.12", "2.11.0", "13.0", 90, frozenset({"torch"}))
MODULE = "import json, sys\n\nprint(json.dumps([sys.argv[1:], __file__]))\n"


def a_part(
    name: str, content: str = "x" * 5000, *, optional: bool = False, fails: str = "", calls: list | None = None
) -> Part:
    """A part of one file that counts how often it is made."""

    def make(_: Target, folder: Path, __: Path) -> None:
        if calls is not None:
            calls.append(name)
        if fails:
            raise CannotBundle(fails)
        module = folder.joinpath(*bundle.CHECK.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True)
        for package in module.relative_to(folder).parents:
            (folder / package / "__init__.py").touch()
        module.write_text(MODULE)
        (folder / "text").write_text(content)

    return Part(name, f"the part {name}", 1, optional, make, on_path=name != "laptop")


def bundled(tmp_path: Path, *parts: Part, **options) -> dict:
    """Make a bundle of these parts."""
    to, work = tmp_path / "bundle", tmp_path / "work"
    return bundle.make(to, NODE, work=work, parts=parts, say=lambda line: None, **options)


def started(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    """Call the bundle's own command."""
    words = [sys.executable, str(tmp_path / "bundle" / "start.py"), "--at", str(tmp_path / "node"), *options]
    return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)


def random_text(size: int) -> str:
    """Text that does not pack."""
    return "".join(hashlib.sha256(str(number).encode()).hexdigest() for number in range(size // 64))


def test_a_bundle_unpacks_and_starts_the_check(tmp_path):
    """Cut into pieces of the stated size, checked, unpacked once, and the check is called with the laptop's folder."""
    text = random_text(50_000)
    manifest = bundled(tmp_path, a_part("project", text), a_part("laptop"), piece_bytes=10_000)
    pieces = manifest["parts"]["project"]["pieces"]
    assert len(pieces) > 2 and all(piece["bytes"] <= 10_000 for piece in pieces)
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "bundle", capture_output=True, text=True)
    assert sums.returncode == 0 and sums.stdout.count(": OK") == len(pieces) + 1
    for _ in range(2):  # the second time it is unpacked already
        done = started(tmp_path, "--budget-seconds", "500")
        assert done.returncode == 0, done.stderr
        told, module = json.loads(done.stdout)
        assert told[:2] == ["--laptop", str(tmp_path / "node" / "laptop")] and told[-2:] == ["--budget-seconds", "500"]
        assert Path(module).is_relative_to(tmp_path / "node" / "project")
        (tmp_path / "bundle" / pieces[0]["file"]).write_bytes(b"no longer needed")
    assert (tmp_path / "node" / "project" / "text").read_text() == text


def test_a_bundle_goes_on_where_it_was(tmp_path):
    """A part that is there is not made again; another piece size cuts it anew; another node makes it anew."""
    calls: list[str] = []
    parts = [a_part("project", random_text(20_000), calls=calls), a_part("laptop", calls=calls)]
    first = bundled(tmp_path, *parts)
    again = bundled(tmp_path, *parts, piece_bytes=4_000)
    assert calls == ["project", "laptop"]
    assert len(again["parts"]["project"]["pieces"]) > len(first["parts"]["project"]["pieces"]) == 1
    names = {path.name for path in (tmp_path / "bundle").glob("*.tar.xz.*")}
    assert names == {piece["file"] for one in again["parts"].values() for piece in one["pieces"]}, (
        "and no old piece is left"
    )
    bundle.make(tmp_path / "bundle", Target("3.12", "2.13.0", "13.0", 90), work=tmp_path / "work", parts=parts,
                    say=lambda line: None)  # fmt: skip
    assert calls == ["project", "laptop"] * 2


def test_what_is_optional_is_left_out_by_name(tmp_path):
    """With the reason in the manifest; a part that was asked for by name, or that is needed, ends it."""
    missing = a_part("kernels", optional=True, fails="there is no wheel for CUDA 12")
    manifest = bundled(tmp_path, a_part("project"), missing)
    assert manifest["left_out"] == {"kernels": "there is no wheel for CUDA 12"} and list(manifest["parts"]) == [
        "project"
    ]
    with pytest.raises(CannotBundle, match="kernels: there is no wheel for CUDA 12"):
        bundled(tmp_path, a_part("project"), missing, only=["kernels"])
    with pytest.raises(CannotBundle, match="packages: the index is silent"):
        bundled(tmp_path, a_part("packages", fails="the index is silent"))
    with pytest.raises(CannotBundle, match="no part is named kernel: choose from project"):
        bundled(tmp_path, a_part("project"), only=["kernel"])


def test_half_a_bundle_says_what_is_missing(tmp_path):
    """Pieces that come in turns are collected; nothing starts before the last one is there."""
    manifest = bundled(tmp_path, a_part("project", random_text(30_000)), a_part("laptop"), piece_bytes=8_000)
    last = manifest["parts"]["project"]["pieces"][-1]["file"]
    kept = (tmp_path / "bundle" / last).read_bytes()
    (tmp_path / "bundle" / last).unlink()
    collected = ["--collect", str(tmp_path / "collected")]
    done = started(tmp_path, *collected)
    assert (done.returncode, done.stdout) == (3, f"still missing: {last}\n")
    for path in (tmp_path / "bundle").glob("*.tar.xz.*"):
        path.unlink()
    (tmp_path / "bundle" / last).write_bytes(kept)
    assert started(tmp_path, *collected).returncode == 0


def test_a_damaged_piece_is_named(tmp_path):
    """And nothing half-unpacked counts as unpacked."""
    manifest = bundled(tmp_path, a_part("project", random_text(30_000)), a_part("laptop"), piece_bytes=8_000)
    second = tmp_path / "bundle" / manifest["parts"]["project"]["pieces"][1]["file"]
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = started(tmp_path)
    assert done.returncode == 2 and f"{second.name} is damaged: copy it again" in done.stderr
    second.write_bytes(whole)
    assert started(tmp_path).returncode == 0


def test_another_python_or_torch_is_told(tmp_path, monkeypatch):
    """A part built for another torch stays packed; another Python ends it."""
    manifest = bundled(tmp_path, a_part("project"), a_part("laptop"))
    part = manifest["parts"]["project"]
    monkeypatch.setattr(start.importlib.metadata, "version", lambda name: "2.13.0+cu130")
    assert start.why_not("project", part, manifest) is None
    reason = start.why_not("mamba", part | {"needs_torch": True}, manifest)
    assert reason == "it is built for torch 2.11.0, and this Python has 2.13.0"
    manifest["for"]["python"] = "3.13"
    with pytest.raises(start.NotHere, match="for Python 3.13"):
        start.unpack(manifest, tmp_path / "bundle", tmp_path / "node")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "3.11"}, "the node has Python 3.11"),
        ({"torch": "2.11"}, "torch '2.11'"),
        ({"cuda": "13"}, "CUDA '13'"),
        ({"arch": 9}, "architecture 9"),
    ],
)
def test_what_cannot_be_prepared_is_refused(change, words):
    """Before anything is made, with what was asked for."""
    from dataclasses import replace

    with pytest.raises(CannotBundle, match=words):
        bundle.refuse(replace(NODE, **change))


def test_transformer_engine_for_another_cuda_is_refused_by_name(tmp_path):
    """The lock has the library for CUDA 13 only."""
    with pytest.raises(
        CannotBundle, match="pins no transformer-engine-cu12: the course has no wheel of Transformer Engine"
    ):
        bundle._transformer_engine(Target("3.12", "2.11.0", "12.6", 90), tmp_path / "te", tmp_path)


def test_packages_follow_the_lock():
    """With all that they need, extras too, at the lock's versions, without what the node has and only that needs."""
    found = bundle.closure(bundle.ROOTS)
    assert found["megatron-core"] == "0.19.2" and {"omegaconf", "antlr4-python3-runtime", "torch"} <= set(found)
    less = bundle.closure(bundle.ROOTS, without=bundle.torchs_own() | bundle.NOT_IMPORTED.keys())
    assert not {"torch", "nvidia-cublas", "triton", "wandb", "mlflow", "flask", "botocore"} & set(less)
    assert set(less) < set(found)


def test_what_nobody_carries_is_told(tmp_path):
    """A package that asks for what neither the bundle nor the node has is named with who asks; extras do not count."""
    (tmp_path / "one-1.dist-info").mkdir()
    asked = ("torch>=2", "Typing_Extensions", "fast.api; extra == 'web'", "PyYAML")
    lines = ["Metadata-Version: 2.1", "Name: One", "Version: 1", *(f"Requires-Dist: {line}" for line in asked)]
    (tmp_path / "one-1.dist-info" / "METADATA").write_text("\n".join(lines) + "\n")
    assert bundle.lacking([tmp_path], frozenset({"torch", "pyyaml"})) == {"typing-extensions": ["One"]}


FAT = {75: b"seven five", 90: b"nine zero!!"}


def a_library(path: Path, containers: list[dict[int, bytes]]) -> None:
    """The least that is a 64-bit ELF file with a section of fat binaries."""
    fat = b""
    for codes in containers:
        entries = b"".join(struct.pack("<HHIQ12xI", 2, 0, 32, len(code), arch) + code for arch, code in codes.items())
        fat += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    names = b"\0.nv_fatbin\0.shstrtab\0"
    sections = [(0, 0, 0, 0, 0, 0), (1, 1, 0, 0, 64, len(fat)), (12, 3, 0, 0, 64 + len(fat), len(names))]
    table = b"".join(struct.pack("<IIQQQQ", *one) + bytes(24) for one in sections)
    head = b"\x7fELF\x02\x01\x01" + bytes(33) + struct.pack("<Q", 64 + len(fat) + len(names)) + bytes(10)
    head += struct.pack("<HHH", 64, len(sections), 2)
    path.write_bytes(head.ljust(64, b"\0") + fat + names + table)


def test_one_architecture_is_kept(tmp_path):
    """Its code moves to the front, the size is corrected, zeros follow, and nothing else moves."""
    library = tmp_path / "lib.so"
    a_library(library, [FAT, {90: b"only"}])
    before = library.read_bytes()
    assert kernels.keep_architecture(library, 90) == {75: 10, 90: 15}
    after = library.read_bytes()
    assert len(after) == len(before) and after[:64] == before[:64] and b"seven five" not in after
    entry = struct.pack("<HHIQ12xI", 2, 0, 32, 11, 90) + FAT[90]
    assert after[64:80] == struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entry)) and after[80 : 80 + len(entry)] == entry
    assert after[80 + len(entry) : 80 + len(entry) + 42] == bytes(42), "as many zeros as the other entry had bytes"
    assert kernels.keep_architecture(library, 90) == {90: 15}, "it reads its own result"


def test_an_architecture_that_is_not_there_is_refused(tmp_path):
    """By name, and the library is left as it was."""
    library = tmp_path / "lib.so"
    a_library(library, [FAT, {75: b"other"}])
    before = library.read_bytes()
    with pytest.raises(kernels.CannotBuild, match=r"no machine code for sm_90, but for \[75\]"):
        kernels.keep_architecture(library, 90)
    assert library.read_bytes() == before


def test_the_sources_are_those_that_are_patched(tmp_path):
    """A source that is laid out in another way is refused, not compiled for hours."""
    setup = tmp_path / "conv" / "setup.py"
    setup.parent.mkdir()
    pairs = [f'cc_flag.append("-gencode")\n    cc_flag.append("arch=compute_{a},code=sm_{a}")' for a in (80, 90)]
    setup.write_text("    " + "\n    ".join(pairs))
    kernels._one_architecture(setup, 90)
    assert setup.read_text().split() == ["pass", *pairs[1].split()]
    with pytest.raises(kernels.CannotBuild, match="not written for sm_80, but for 90"):
        kernels._one_architecture(setup, 80)
    with pytest.raises(kernels.CannotBuild, match="laid out in another way"):
        (tmp_path / "te" / "build_tools").mkdir(parents=True)
        (tmp_path / "te" / "build_tools" / "pytorch.py").write_text('"-O3"')
        kernels._in_few_units(tmp_path / "te")


def test_the_project_travels_without_leftovers(tmp_path):
    """The package and its facts, and nothing that a run or Python left."""
    bundle._project(NODE, tmp_path, tmp_path)
    assert (tmp_path / "course_lib" / "__init__.py").exists() and (tmp_path / "data" / "gpus.json").exists()
    names = {path.name for path in tmp_path.rglob("*")}
    assert "__pycache__" not in names and not any(name.endswith(".pyc") for name in names)


def test_equal_folders_become_equal_pieces(tmp_path):
    """Times and owners stay out, so a second bundle needs no second copy."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("the same")
    one, two = (bundle.cut(tmp_path / name, tmp_path, name, 1000) for name in ("one", "two"))
    assert one[0]["sha256"] == two[0]["sha256"]
    with tarfile.open(tmp_path / "one.tar.xz.00") as archive:
        (entry,) = archive.getmembers()
    assert (entry.mtime, entry.uid, entry.uname, entry.name) == (0, 0, "", "file")

"""Build NVIDIA's kernels on a machine without a GPU: for one torch, one CUDA and one architecture.

The compiler comes from PyPI, beside a torch of the node's version; nothing of the machine's own CUDA is used.
"""

from __future__ import annotations

import collections
import hashlib
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLKIT = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-profiler-api")
"""The compiler, its headers and its back end; torch's own wheels hold the libraries."""


class CannotBuild(RuntimeError):
    """A program that makes a part failed, or what it made is not what was asked for."""


@dataclass(frozen=True)
class Pin:
    """A package of the lock: `requirement` as `name==version`, and the checksum of its source distribution."""

    requirement: str
    source_sha256: str


def run(words: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        CannotBuild: If it fails, with its last lines.
    """
    done = subprocess.run(list(words), env=os.environ | (env or {}), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()][-12:]
        raise CannotBuild(f"`{Path(words[0]).name} {' '.join(words[1:4])} ...` failed: " + "\n  ".join(told))
    return done.stdout


def _torch(target: Any, work: Path, uv: Callable[..., None]) -> Path:
    """A Python with the node's torch and a compiler for its CUDA, made once; checked before anything is compiled."""
    place = work / f"torch-{target.torch}-cuda-{target.cuda}"
    python = place / "bin" / "python"
    if not (place / "whole").exists():
        shutil.rmtree(place, ignore_errors=True)
        uv(["venv", "--quiet", "--python", sys.executable, str(place)])
        tools = [f"{name}=={target.cuda}.*" for name in TOOLKIT]
        uv(["pip", "install", "--quiet", "--python", str(python), f"torch=={target.torch}", *tools,
            "setuptools<82", "wheel", "packaging", "ninja", "pybind11", "numpy", "einops"])  # fmt: skip
        (place / "whole").touch()
    told = run([str(python), "-W", "ignore", "-c", "import torch; print(torch.version.cuda)"]).strip()
    if told != target.cuda:
        raise CannotBuild(
            f"PyPI's torch {target.torch} is made for CUDA {told}, and the node has {target.cuda}: no wheel to build on"
        )
    return python


def _compiler(python: Path, cuda: str) -> dict[str, str]:
    """The environment in which extensions find nvcc, headers and libraries: one folder of wheels serves as a toolkit."""
    site = next((python.parents[1] / "lib").glob("python3*")) / "site-packages" / "nvidia"
    root = site / f"cu{cuda.split('.')[0]}"
    for library in (root / "lib").glob("lib*.so.*"):
        plain = library.with_name(library.name.partition(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)  # the linker asks for a name without a number, which wheels lack
    if not (root / "lib64").exists():
        (root / "lib64").symlink_to("lib")
    headers = [root / "include", *(site / name / "include" for name in ("cudnn", "nccl"))]
    return {"CUDA_HOME": str(root), "CPATH": os.pathsep.join(map(str, headers)), "LIBRARY_PATH": str(root / "lib"),
            "PATH": os.pathsep.join([str(root / "bin"), str(python.parent), os.environ["PATH"]]),
            "MAX_JOBS": str(len(os.sched_getaffinity(0)))}  # fmt: skip


def _source(pin: Pin, python: Path, work: Path, environment: dict[str, str]) -> Path:
    """The unpacked source distribution of a pinned package, checked against the lock."""
    place = work / "source" / pin.requirement.split("==")[0]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if not (python.parent / "pip").exists():
        run([str(python), "-m", "ensurepip", "--upgrade"])
    skip = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    run([str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
         "--dest", str(place), pin.requirement], env=environment | skip)  # fmt: skip
    (archive,) = place.glob("*.tar.gz")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != pin.source_sha256:
        raise CannotBuild(f"{archive.name} is not the file that uv.lock names: its checksum differs")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return next(path for path in place.iterdir() if path.is_dir())


def _wheel(source: Path | str, python: Path, to: Path, environment: dict[str, str]) -> Path:
    """Build a wheel against the Python's own torch."""
    shutil.rmtree(to, ignore_errors=True)
    run([str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(to),
         str(source)], env=environment)  # fmt: skip
    (made,) = to.glob("*.whl")
    return made


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


# ---------------------------------------------------------------------------------------------- Transformer Engine


def transformer_engine(
    target: Any,
    folder: Path,
    work: Path,
    *,
    pins: dict[str, str],
    uv: Callable[..., None],
    install: Callable[..., None],
) -> None:
    """NVIDIA's library with one architecture's code, and its part for torch, built here.

    Args:
        target: A `bundle.Target`.
        pins: The packages by name.

    Raises:
        CannotBuild: If it cannot be built, or the library has no code for the architecture.
    """
    python = _torch(target, work, uv)
    environment = _compiler(python, target.cuda) | {"NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE"}
    environment |= {"NVTE_WITH_NCCL_EP": "0"}
    source = _source(pins["transformer-engine-torch"], python, work, environment)
    _in_few_units(source)
    wheel = _wheel(source, python, work / "wheels" / "transformer-engine-torch", environment)
    core = next(name for name in pins if name.startswith("transformer-engine-cu"))
    install([pins["transformer-engine"].requirement], folder)
    beside = work / "transformer-engine-core"
    shutil.rmtree(beside, ignore_errors=True)
    install([pins[core].requirement], beside)
    shutil.copytree(beside, folder, dirs_exist_ok=True)  # both wheels carry parts of one package
    shutil.rmtree(beside)
    _unpack(wheel, folder)
    for name in ("jax", "wheel_lib/nccl_ep", "wheel_lib/libnccl_ep.so"):  # of another framework, and of many nodes
        path = folder / "transformer_engine" / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    keep_architecture(folder / "transformer_engine" / "wheel_lib" / "libtransformer_engine.so", target.arch)


UNITS = 2


def _in_few_units(source: Path) -> None:
    """Compile its some thirty files as two: each reads all of torch's headers, which is nearly all of the work.

    They only call the library, so they are not optimised hard.
    """
    csrc, tool = source / "csrc", source / "build_tools" / "pytorch.py"
    found = sorted(csrc.rglob("*.cpp"), key=lambda path: path.stat().st_size)
    if len(found) < UNITS or '"-O3"' not in tool.read_text(encoding="utf-8"):
        raise CannotBuild(f"{source.name} is laid out in another way than transformer_engine_torch 2.20.2")
    for unit in range(UNITS):
        included = [path.rename(path.with_suffix(".inc")).relative_to(csrc) for path in found[unit::UNITS]]
        (csrc / f"unit{unit}.cpp").write_text("".join(f'#include "{path}"\n' for path in included), encoding="utf-8")
    tool.write_text(tool.read_text(encoding="utf-8").replace('"-O3"', '"-O1"'), encoding="utf-8")


# ----------------------------------------------------------------------------------- one architecture of a library

_CONTAINER = struct.Struct("<IHHQ")  # magic, version, size of this header, bytes that follow it
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, size of this header, bytes that follow it; architecture
_MAGIC, _MACHINE_CODE = 0xBA55ED50, 2


def keep_architecture(library: Path, arch: int) -> dict[int, int]:
    """Leave only one architecture's machine code in a CUDA library, in place.

    A library carries code for ten kinds of GPU, and the driver takes what fits.  Entries that fit move to the front of their
    container, its size is corrected, and zeros follow, which pack to nothing: no offset of the file changes.

    Args:
        library: A shared library.

    Returns:
        Bytes by architecture, as they were.

    Raises:
        CannotBuild: If a container has no code for the architecture, which is then left as it was; names those that it has.

    Source: the fat binary's layout as `cuobjdump --list-elf` shows it; observed in CUDA 13.0.
    """
    before: collections.Counter[int] = collections.Counter()
    changes: list[tuple[int, bytes]] = []
    with open(library, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for begin, end in _sections(library):
            for place in _containers(memory, begin, end):
                _, _, head, size = _CONTAINER.unpack_from(memory, place)
                entry, stop, kept, met = place + head, place + head + size, [], set()
                while entry < stop:
                    kind, _, entry_head, body, of = _ENTRY.unpack_from(memory, entry)
                    before[of] += body
                    met.add(of)
                    if of == arch and kind == _MACHINE_CODE:
                        kept.append(memory[entry : entry + entry_head + body])
                    entry += entry_head + body
                if not kept:
                    raise CannotBuild(f"{library.name} has no machine code for sm_{arch}, but for {sorted(met)}")
                whole = b"".join(kept)
                changes.append((place + head, whole + bytes(size - len(whole))))
                changes.append(
                    (place, _CONTAINER.pack(_MAGIC, *_CONTAINER.unpack_from(memory, place)[1:3], len(whole)))
                )
        for place, content in changes:
            memory[place : place + len(content)] = content
    return dict(before)


def _sections(library: Path) -> Iterator[tuple[int, int]]:
    """Where the sections `.nv_fatbin` begin and end in a 64-bit ELF file."""
    with open(library, "rb") as file:
        start = file.read(64)
        if start[:5] != b"\x7fELF\x02":
            raise CannotBuild(f"{library.name} is no 64-bit ELF library")
        table, each, count, names = struct.unpack_from("<Q", start, 40)[0], *struct.unpack_from("<HHH", start, 58)
        file.seek(table)
        headers = [struct.unpack_from("<IIQQQQ", file.read(each)) for _ in range(count)]
        file.seek(headers[names][4])
        words = file.read(headers[names][5])
    for name, _, _, _, offset, size in headers:
        if words[name : words.index(b"\0", name)] == b".nv_fatbin":
            yield offset, offset + size


def _containers(memory: mmap.mmap, begin: int, end: int) -> Iterator[int]:
    magic = struct.pack("<I", _MAGIC)
    place = memory.find(magic, begin, end)
    while place >= 0:
        _, _, head, size = _CONTAINER.unpack_from(memory, place)
        yield place
        place = memory.find(magic, place + head + size, end)


# ------------------------------------------------------------------------------------------------------------ Mamba


def mamba(target: Any, folder: Path, work: Path, *, pins: dict[str, Pin], uv: Callable[..., None]) -> None:
    """causal-conv1d built for one architecture, and mamba-ssm without the kernels of Mamba 1; arguments as above.

    Nemotron's layers are Mamba 2, which mamba-ssm writes in Triton.  Mamba 1's CUDA module is imported all the same, so a
    module of its name raises when it is used.
    """
    python = _torch(target, work, uv)
    environment = _compiler(python, target.cuda)
    source = _source(pins["causal-conv1d"], python, work, environment)
    _one_architecture(source / "setup.py", target.arch)
    forced = environment | {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}
    _unpack(_wheel(source, python, work / "wheels" / "causal-conv1d", forced), folder)
    skipped = environment | {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}
    source = _source(pins["mamba-ssm"], python, work, environment)
    _unpack(_wheel(source, python, work / "wheels" / "mamba-ssm", skipped), folder)
    (folder / "selective_scan_cuda.py").write_text(
        '"""Mamba 1\'s kernels were not built: Nemotron\'s layers are Mamba 2."""\n\n\n'
        "def __getattr__(name):\n"
        '    if name.startswith("__"):\n'
        "        raise AttributeError(name)\n"
        "    raise RuntimeError(\"Mamba 1's kernels are not in this bundle; Nemotron's layers are Mamba 2\")\n",
        encoding="utf-8",
    )


def _one_architecture(setup: Path, arch: int) -> None:
    """Let a setup.py ask nvcc for one architecture only; each of the others costs as much time again."""
    text = setup.read_text(encoding="utf-8")
    asked = re.compile(r'cc_flag\.append\("-gencode"\)\s*cc_flag\.append\("arch=compute_(\d+),code=sm_\d+"\)')
    if str(arch) not in asked.findall(text):
        raise CannotBuild(f"{setup.parent.name} is not written for sm_{arch}, but for {', '.join(asked.findall(text))}")
    setup.write_text(asked.sub(lambda one: one[0] if one[1] == str(arch) else "pass", text), encoding="utf-8")

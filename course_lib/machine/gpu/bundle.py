"""Pack what a node with a GPU and without a network lacks: one folder to copy, with one command in it.

    python -m course_lib.machine.gpu.bundle --to gpu-bundle --torch 2.11.0 --cuda 13.0 --arch 90 --have node.txt

Run it on Linux on x86_64 with a network.  Packages come from `uv.lock`, NVIDIA's kernels are built for one torch and one GPU
architecture, and a laptop's run goes along to be resumed.  A part that is there already is not made again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import re
import shutil
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course_lib.common import files
from course_lib.common.project import PROJECT
from course_lib.common.units import MiB, format_bytes
from course_lib.machine.gpu import kernels, start

ROOTS = ("megatron-bridge", "megatron-core", "psutil", "pyyaml", "rich", "scipy", "tokenizers", "typer", "pandas")
"""What ranks and the check import; the rest follows from the lock."""

NOT_IMPORTED = {
    **dict.fromkeys(
        ("wandb", "mlflow", "comet-ml", "swanlab"), "a tracker of experiments, imported if a run asks for it"
    ),
    "mistral-common": "Mistral's tokenizers",
    **dict.fromkeys(("s3fs", "fastapi"), "files in a cloud, and a server"),
    "grpcio-tools": "a compiler of protocols, which nvidia-resiliency-ext names",
}
"""Packages that the lock names and no rank of the check imports."""


CHECK = f"{__package__}.check"
"""What `start.py` runs on the node."""


class CannotBundle(ValueError):
    """A part cannot be had; the message says which and why."""


@dataclass(frozen=True)
class Target:
    """The node.

    Attributes:
        python: Its Python, such as `"3.12"`.
        torch: Its torch, such as `"2.11.0"`.
        cuda: The CUDA of that torch, such as `"13.0"`.
        arch: Compute capability of its GPU without the dot: 90 for an H100, 80 for an A100.
        have: Normalized names of packages that it has already.
    """

    python: str
    torch: str
    cuda: str
    arch: int
    have: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Part:
    """One part of the bundle.

    Attributes:
        minutes: How long it took once, on two cores that others kept busy; `None` if nobody timed it.
        optional: Without it the bundle is of use all the same; the checks that need it are skipped, by name.
    """

    name: str
    what: str
    minutes: float | None
    optional: bool
    make: Callable[[Target, Path, Path], None]
    on_path: bool = True


def have(text: str) -> frozenset[str]:
    """Package names of `pip list --format=freeze`, normalized.

    >>> sorted(have("torch==2.11.0\\nPyYAML==6.0.4\\nruamel.yaml==0.18"))
    ['pyyaml', 'ruamel-yaml', 'torch']
    """
    names = (re.match(r"[A-Za-z0-9][\w.-]*", line.strip()) for line in text.splitlines())
    return frozenset(re.sub(r"[-_.]+", "-", name.group()).lower() for name in names if name)


@functools.cache
def _lock() -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in tomllib.loads((PROJECT / "uv.lock").read_text(encoding="utf-8"))["package"]}


def closure(roots: Sequence[str], *, without: frozenset[str] | set[str] = frozenset()) -> dict[str, str]:
    """Name and version of packages and all that they need, as `uv.lock` pins them."""
    found: dict[str, str] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in roots]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if name in without or (name, extras) in seen:
            continue
        seen.add((name, extras))
        package = _lock()[name]
        found[name] = package["version"]
        needed = [*package.get("dependencies", ())]
        for extra in extras:
            needed += package.get("optional-dependencies", {}).get(extra, ())
        waiting += [(one["name"], tuple(one.get("extra", ()))) for one in needed if _applies(one.get("marker", ""))]
    return dict(sorted(found.items()))


def _applies(marker: str) -> bool:
    from packaging.markers import Marker, default_environment

    return not marker or Marker(marker).evaluate(default_environment() | {"extra": ""})


def pin(name: str) -> kernels.Pin:
    """A package as `uv.lock` has it, with the checksum of its source."""
    package = _lock()[name]
    return kernels.Pin(
        f"{name}=={package['version']}", package.get("sdist", {}).get("hash", "").removeprefix("sha256:")
    )


# ------------------------------------------------------------------------------------------------------- the parts


def _project(_: Target, folder: Path, __: Path) -> None:
    """The course's package and its facts, without what Python or a run left there."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "lab")
    for name in ("course_lib", "data"):
        shutil.copytree(PROJECT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "uv.lock", "Makefile", "LICENSE"):
        shutil.copy(PROJECT / name, folder / name)


def _packages(target: Target, folder: Path, _: Path) -> None:
    install([f"{name}=={version}" for name, version in _wanted(target).items()], folder)
    shutil.rmtree(folder / "pulp" / "solverdir", ignore_errors=True)  # solvers, which no import asks for


def _wanted(target: Target) -> dict[str, str]:
    return closure(ROOTS, without=target.have | NOT_IMPORTED.keys())


def install(requirements: Sequence[str], folder: Path, *options: str) -> None:
    """Put packages into a folder, without what they need, checked against the lock's checksums.

    Raises:
        CannotBundle: Says what uv said.
    """
    if not requirements:
        return
    lines = []
    for requirement in requirements:
        name = requirement.split("==")[0]
        package = _lock().get(name, {})
        wheels = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        lines.append(" ".join([requirement, *(f"--hash={one['hash']}" for one in wheels)]))
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder.parent / f"{folder.name}.requirements"
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said(["pip", "install", "--quiet", "--target", str(folder), "--no-deps", "--link-mode", "copy", *options,
          "--requirement", str(listing)])  # fmt: skip


def said(words: Sequence[str], **options: Any) -> None:
    """Run uv.

    Raises:
        CannotBundle: If it fails, with its last lines.
    """
    uv = shutil.which("uv", path=f"{PROJECT / '.tools' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise CannotBundle("uv is not here: run `make setup` in the course's folder first")
    python = [] if "--python" in words or words[0] == "venv" else ["--python", sys.executable]
    kernels.run([uv, *words, "--no-config", *python], **options)


def _laptop(_: Target, folder: Path, __: Path) -> None:
    """In a process of its own: it prepares imports, and launches CPU ranks."""
    code = (
        "import sys; from pathlib import Path; from course_lib import stack; from course_lib.machine.gpu import reference; "
        "stack.prepare_imports(); reference.make(Path(sys.argv[1]))"
    )
    kernels.run([sys.executable, "-W", "ignore", "-c", code, str(folder)], env={"COURSE_RUNS": str(folder.parent)})


def _resiliency(target: Target, folder: Path, _: Path) -> None:
    needs = closure(RESILIENCY_NEEDS, without=target.have)
    install([f"{name}=={version}" for name, version in needs.items()], folder)
    install(
        [RESILIENCY],
        folder,
        "--python-platform",
        "x86_64-manylinux_2_39",
        "--only-binary",
        ":all:",
        "--no-verify-hashes",
    )


RESILIENCY = "nvidia-resiliency-ext==0.6.0"
"""Bridge's pretrain imports it; its wheel wants glibc 2.39, so the lock leaves it out."""

RESILIENCY_NEEDS = ("defusedxml",)
"""What it imports beyond what the other parts hold."""


def _transformer_engine(target: Target, folder: Path, work: Path) -> None:
    core = f"transformer-engine-cu{target.cuda.split('.')[0]}"
    if core not in _lock():
        raise CannotBundle(
            f"uv.lock pins no {core}: the course has no wheel of Transformer Engine for CUDA {target.cuda}. Take a torch for "
            "CUDA 13, or leave this part out"
        )
    names = ("transformer-engine", "transformer-engine-torch", core)
    _what_they_need(names, target, folder)
    kernels.transformer_engine(target, folder, work, pins={name: pin(name) for name in names}, uv=said, install=install)


def _mamba(target: Target, folder: Path, work: Path) -> None:
    names = ("mamba-ssm", "causal-conv1d")
    _what_they_need(names, target, folder)
    kernels.mamba(target, folder, work, pins={name: pin(name) for name in names}, uv=said)


def _what_they_need(names: Sequence[str], target: Target, folder: Path) -> None:
    """What kernels import that neither the node nor another part has."""
    there = target.have | torchs_own() | set(closure(ROOTS)) | NOT_IMPORTED.keys()
    install(
        [f"{name}=={version}" for name, version in closure(names, without=there).items() if name not in names], folder
    )


PARTS: tuple[Part, ...] = (
    Part("project", "course_lib and data/", 0.1, False, _project),
    Part("packages", "Megatron-Bridge, Megatron Core and what they import, from uv.lock", 0.4, False, _packages),
    Part("laptop", "tokens, tokenizer, losses and a checkpoint of a run on one CPU rank", 1.4, False, _laptop, on_path=False),
    Part("resiliency", "nvidia-resiliency-ext, which Bridge imports; without it a stand-in", 0.1, True, _resiliency),
    Part("transformer_engine", "Transformer Engine for one architecture, its torch part built here", 23, True,
         _transformer_engine),
    Part("mamba", "mamba-ssm and causal-conv1d, for the hybrid Nemotron models", None, True, _mamba),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the bundle


def make(
    to: Path,
    target: Target,
    *,
    work: Path,
    only: Sequence[str] = (),
    piece_bytes: int = 1900 * MiB,
    parts: Sequence[Part] = PARTS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make every part that is not there yet, and cut it into pieces.

    Args:
        work: A folder for half-done work, kept so that a second call goes on.
        only: Names of parts; an optional one that is named must succeed.
        piece_bytes: Largest size of a piece.

    Returns:
        The manifest, as in `manifest.json`.

    Raises:
        CannotBundle: If a part cannot be had that is not optional, or that was named.
    """
    refuse(target)
    if unknown := sorted(set(only) - {part.name for part in parts}):
        raise CannotBundle(
            f"no part is named {', '.join(unknown)}: choose from {', '.join(part.name for part in parts)}"
        )
    wanted = [part for part in parts if not only or part.name in only or not part.optional]
    said_target = asdict(target) | {"have": sorted(target.have)}
    manifest: dict[str, Any] = {
        "schema": 1,
        "check": CHECK,
        "made": time.strftime("%Y-%m-%d"),
        "for": said_target,
        "parts": {},
        "left_out": {},
    }
    to.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part not in wanted:
            manifest["left_out"][part.name] = "not asked for"
            continue
        timed = "nobody timed it" if part.minutes is None else f"{part.minutes:g} min once, on two busy cores"
        say(f"{part.name}: {part.what} ({timed})")
        try:
            manifest["parts"][part.name] = _part(part, target, to, work, piece_bytes, say)
        except (CannotBundle, kernels.CannotBuild) as error:
            if not part.optional or part.name in only:
                raise CannotBundle(f"{part.name}: {error}") from error
            manifest["left_out"][part.name] = str(error)
            say(f"{part.name}: left out. {error}")
    folders = [work / name for name in manifest["parts"]]
    manifest["not_carried"] = lacking(folders, target.have | NOT_IMPORTED.keys() | _left_out_on_purpose())
    _tidy(to, manifest)
    shutil.copy(start.__file__, to / "start.py")
    files.write_text(to / "manifest.json", json.dumps(manifest, indent=1))
    pieces = [piece for one in manifest["parts"].values() for piece in one["pieces"]]
    files.write_text(to / "SHA256SUMS", "".join(f"{piece['sha256']}  {piece['file']}\n" for piece in pieces))
    return manifest


def lacking(folders: Sequence[Path], there: frozenset[str]) -> dict[str, list[str]]:
    """What carried packages ask for that neither the bundle nor the node has, with who asks; it may be of no use here.

    Args:
        there: Normalized names of what the node has.
    """
    from packaging.requirements import Requirement

    carried = list(importlib.metadata.distributions(path=[str(folder) for folder in folders]))
    known = there | have("\n".join(one.metadata["Name"] for one in carried))
    found: dict[str, list[str]] = {}
    for one in carried:
        for line in one.requires or ():
            asked = Requirement(line)
            (name,) = have(asked.name)
            if name not in known and (asked.marker is None or asked.marker.evaluate({"extra": ""})):
                found.setdefault(name, []).append(one.metadata["Name"])
    return dict(sorted(found.items()))


def _left_out_on_purpose() -> frozenset[str]:
    """What `pyproject.toml` excludes everywhere: Bridge names it, and no part of the course imports it."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    return have("\n".join(settings["tool"]["uv"]["override-dependencies"]))


def refuse(target: Target) -> None:
    """Say by name what this machine cannot prepare.

    Raises:
        CannotBundle: Says what was asked for, and what is possible.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotBundle(f"this machine is {platform.system()} on {platform.machine()}: bundle on Linux on x86_64")
    if target.python != here:
        raise CannotBundle(
            f"the node has Python {target.python}, and this is {here}: Megatron-Bridge needs 3.12 on both"
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+", target.torch) or not re.fullmatch(r"\d+\.\d+", target.cuda):
        raise CannotBundle(f"torch {target.torch!r} and CUDA {target.cuda!r}: give them as 2.11.0 and 13.0")
    if not 70 <= target.arch <= 130:
        raise CannotBundle(f"architecture {target.arch}: give the compute capability without its dot, 90 for an H100")


def _part(
    part: Part, target: Target, to: Path, work: Path, piece_bytes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """One part: its folder, unless it is there; its pieces, unless they are of this folder and this size."""
    key = hashlib.sha256(
        json.dumps([part.name, asdict(target) | {"have": sorted(target.have)}, _source(part, target)]).encode()
    ).hexdigest()
    folder, record = work / part.name, work / f"{part.name}.json"
    kept = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if kept.get("key") != key or not folder.exists():
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        half = work / f"{part.name}.half"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        began = time.monotonic()
        part.make(target, half, work)
        for cache in half.rglob("__pycache__"):
            shutil.rmtree(cache)
        if not any(half.iterdir()):
            raise CannotBundle("it is empty: the package index had nothing for this machine")
        half.rename(folder)
        kept = {"key": key, "seconds": round(time.monotonic() - began, 1)}
    if kept.get("piece_bytes") != piece_bytes or not all((to / one["file"]).exists() for one in kept.get("pieces", ())):
        kept |= {"piece_bytes": piece_bytes, "pieces": cut(folder, to, part.name, piece_bytes)}
    kept["unpacked_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    files.write_text(record, json.dumps(kept))
    packed = sum(piece["bytes"] for piece in kept["pieces"])
    say(f"{part.name}: {format_bytes(packed)} in {len(kept['pieces'])} piece(s), "
        f"{format_bytes(kept['unpacked_bytes'])} unpacked, made in {kept['seconds']:.0f} s")  # fmt: skip
    return {name: kept[name] for name in ("pieces", "unpacked_bytes", "seconds")} | {
        "on_path": part.on_path, "optional": part.optional, "needs_torch": part.name in ("transformer_engine", "mamba")
    }  # fmt: skip


def _source(part: Part, target: Target) -> str:
    """What a change of makes a part old: the lock, the list of packages, and for the project every file of it."""
    if part.name in ("packages", "resiliency"):
        return json.dumps(_wanted(target) if part.name == "packages" else [RESILIENCY, *RESILIENCY_NEEDS])
    if part.name != "project":
        return hashlib.sha256((PROJECT / "uv.lock").read_bytes()).hexdigest()
    found = sorted(path for name in ("course_lib", "data") for path in (PROJECT / name).rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in found if path.suffix in (".py", ".json"))).hexdigest()


def cut(folder: Path, to: Path, name: str, piece_bytes: int) -> list[dict[str, Any]]:
    """Pack a folder into `NAME.tar.xz.00`, `.01` and so on; equal folders become equal pieces.

    Args:
        piece_bytes: Largest size of one.

    Returns:
        `file`, `bytes` and `sha256` of each.
    """
    for old in to.glob(f"{name}.tar.xz.*"):
        old.unlink()
    archive = to / f".{name}.tar.xz"
    try:
        with lzma.open(archive, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for path in sorted(folder.rglob("*")):
                if path.is_symlink() or not path.is_dir():
                    tar.add(path, arcname=str(path.relative_to(folder)), recursive=False, filter=_anonymous)
        pieces = []
        with open(archive, "rb") as whole:
            while content := whole.read(piece_bytes):
                piece = to / f"{name}.tar.xz.{len(pieces):02d}"
                with files.replacing(piece) as half:
                    half.write_bytes(content)
                digest = hashlib.sha256(content).hexdigest()
                pieces.append({"file": piece.name, "bytes": len(content), "sha256": digest})
        return pieces
    finally:
        archive.unlink(missing_ok=True)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.mode & 0o100 else 0o644
    return entry


def _tidy(to: Path, manifest: dict[str, Any]) -> None:
    """Take away pieces of parts that are not in this bundle."""
    wanted = {piece["file"] for one in manifest["parts"].values() for piece in one["pieces"]}
    for old in to.glob("*.tar.xz.*"):
        if old.name not in wanted:
            old.unlink()


def torchs_own() -> frozenset[str]:
    """torch and what it brings: a node with a GPU has them, and they would be some 2 GB."""
    return frozenset(closure(["torch"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if the bundle is whole, 1 if a part cannot be had."""
    words = "Pack the course for a node without a network."
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.bundle", description=words)
    parser.add_argument("--to", type=Path, default=PROJECT / "gpu-bundle", help="the folder that is copied to the node")
    parser.add_argument("--python", default="3.12", help="Python of the node")
    parser.add_argument("--torch", default=_lock()["torch"]["version"], help="torch of the node")
    parser.add_argument("--cuda", default="13.0", help="CUDA of that torch (torch.version.cuda)")
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability of the GPU without its dot: 90 is an H100"
    )
    parser.add_argument("--have", type=Path, help="what `python3 -m pip list --format=freeze` prints on the node; "
                        "else torch and what it brings")  # fmt: skip
    parser.add_argument("--piece-mib", type=int, default=1900, help="largest size of a file")
    parser.add_argument("--parts", nargs="+", default=(), help=", ".join(part.name for part in PARTS))
    parser.add_argument("--work", type=Path, help="a folder for half-done work, some 10 GB; else beside the bundle")
    given = parser.parse_args(arguments)
    try:
        there = have(given.have.read_text(encoding="utf-8")) if given.have else torchs_own()
        target = Target(given.python, given.torch, given.cuda, given.arch, there)
        to = given.to.resolve()
        manifest = make(to, target, work=given.work or to.with_name(f"{to.name}-work"), only=given.parts,
                        piece_bytes=given.piece_mib * MiB)  # fmt: skip
    except (CannotBundle, OSError) as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    total = sum(piece["bytes"] for one in manifest["parts"].values() for piece in one["pieces"])
    print(f"bundle            {to}   ({format_bytes(total)})")
    for name, reason in manifest["left_out"].items():
        print(f"left out          {name}: {reason}")
    for name, by in manifest["not_carried"].items():
        print(f"not carried       {name}, which {', '.join(by)} asks for")
    print(f"on the node       python3 {to.name}/start.py --out gpu-report")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The one command of a bundle, on a node without a network: `python3 gpu-bundle/start.py --out gpu-report`.

It checks every piece, unpacks what fits this Python and this torch, and starts the check.  Standard library only: nothing
else is there yet.  Options that are not its own go to the check (`--budget-seconds`, `--only`, ...).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path


class NotHere(Exception):
    """The bundle cannot be used here; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 if nothing failed; 3 while pieces are missing."""
    parser = argparse.ArgumentParser(description="Check the course on this node's GPU, from the bundle in this folder.")
    parser.add_argument("--collect", type=Path, help="copy the pieces that are here to this folder first, and use all that are "
                        "there: for a bundle that comes in several turns")  # fmt: skip
    parser.add_argument("--at", type=Path, help="where to unpack; else a folder in the temporary directory")
    parser.add_argument("--unpack-only", action="store_true", help="start no check, and print how to")
    given, rest = parser.parse_known_args(arguments)
    here = Path(__file__).resolve().parent
    try:
        if given.collect:
            here = collect(here, given.collect)
        manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))
        if lacking := missing(manifest, here):
            print(f"still missing: {', '.join(lacking)}")
            return 3
        at = (given.at or Path(tempfile.gettempdir()) / f"course-gpu-{os.getuid()}").resolve()
        folders = unpack(manifest, here, at)
    except (NotHere, OSError, ValueError) as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 2
    environment = settings(manifest, folders)
    options = ["--laptop", str(folders["laptop"]), "--work", str(at / "work"), *rest]
    words = [sys.executable, "-m", manifest["check"], *options]
    if given.unpack_only:
        print(f"PYTHONPATH={environment['PYTHONPATH']} {' '.join(words)}")
        return 0
    return subprocess.run(words, env=os.environ | environment).returncode


def collect(here: Path, place: Path) -> Path:
    """Copy what is here to a folder that outlives it."""
    place.mkdir(parents=True, exist_ok=True)
    for path in here.iterdir():
        if path.is_file() and path.resolve().parent != place.resolve():
            half = place / f".{path.name}"
            shutil.copyfile(path, half)
            os.replace(half, place / path.name)
    return place


def missing(manifest: dict, here: Path) -> list[str]:
    """Names of pieces that have not come yet."""
    return [
        one["file"]
        for part in manifest["parts"].values()
        for one in part["pieces"]
        if not (here / one["file"]).exists()
    ]


def why_not(name: str, part: dict, manifest: dict) -> str | None:
    """Why a part does not fit this node, or `None`; what does not fit and is optional is left packed."""
    if not part["needs_torch"]:
        return None
    try:
        version = importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "there is no torch in this Python"
    wanted = manifest["for"]["torch"]
    return None if version == wanted else f"it is built for torch {wanted}, and this Python has {version}"


def unpack(manifest: dict, here: Path, at: Path) -> dict[str, Path]:
    """Check and unpack every part that fits, once; a second call finds them.

    Args:
        manifest: `manifest.json`.

    Returns:
        Folder by part.

    Raises:
        NotHere: For another Python, a damaged piece, or a disk without room.
    """
    wanted, mine = manifest["for"]["python"], f"{sys.version_info.major}.{sys.version_info.minor}"
    if mine != wanted:
        raise NotHere(
            f"the bundle is for Python {wanted}, and {sys.executable} is {mine}: call start.py with that Python"
        )
    at.mkdir(parents=True, exist_ok=True)
    folders = {}
    for name, part in manifest["parts"].items():
        if reason := why_not(name, part, manifest):
            print(f"{name}: left packed, {reason}")
            continue
        folder = at / name
        done = at / f"{name}.done"
        stamp = json.dumps(part["pieces"])
        if not done.exists() or done.read_text(encoding="utf-8") != stamp or not folder.exists():
            room = shutil.disk_usage(at).free
            if room < 1.1 * part["unpacked_bytes"]:
                raise NotHere(f"{at} has {room / 2**30:.1f} GiB free, and {name} needs {part['unpacked_bytes'] / 2**30:.1f}: "
                              "give another folder with --at")  # fmt: skip
            done.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            pieces = Pieces([(here / one["file"], one["sha256"]) for one in part["pieces"]])
            with tarfile.open(fileobj=pieces, mode="r|xz") as archive:
                archive.extractall(folder, filter="data")
            pieces.finish()
            if part["on_path"] or name == "project":
                compiled = [sys.executable, "-m", "compileall", "-q", "-j", "0", str(folder)]
                subprocess.run(compiled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            done.write_text(stamp, encoding="utf-8")
        folders[name] = folder
    return folders


class Pieces(io.RawIOBase):
    """Pieces read as one file, each checked before it is read."""

    def __init__(self, pieces: list[tuple[Path, str]]) -> None:
        self._chunks = self._read(pieces)
        self._rest = b""

    @staticmethod
    def _read(pieces: list[tuple[Path, str]]) -> Iterator[bytes]:
        for path, wanted in pieces:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while content := file.read(2**20):
                    digest.update(content)
            if digest.hexdigest() != wanted:
                raise NotHere(f"{path.name} is damaged: copy it again")
            with open(path, "rb") as file:
                while content := file.read(2**20):
                    yield content

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """So many bytes, fewer only at the end."""
        while size < 0 or len(self._rest) < size:
            content = next(self._chunks, b"")
            if not content:
                break
            self._rest += content
        size = len(self._rest) if size < 0 else size
        given, self._rest = self._rest[:size], self._rest[size:]
        return given

    def finish(self) -> None:
        """Read what the archive did not need, so that every piece is checked."""
        for _ in self._chunks:
            pass


def settings(manifest: dict, folders: dict[str, Path]) -> dict[str, str]:
    """Where Python looks for packages: the parts first, then what the node has, and not where the command was given."""
    found = [str(folders[name]) for name, part in manifest["parts"].items() if part["on_path"] and name in folders]
    found += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join(found), "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


if __name__ == "__main__":
    sys.exit(main())

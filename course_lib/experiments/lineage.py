"""Stages chained by artifacts: what was made of what, proved by the digests of the files.

The layout and the keys are those of Nemotron's `ManifestTracker`: `{root}/{name}/v{N}/manifest.json`, and a text file
`latest`.  Three keys are added: `files` has the sha256 of each file, `digest` that of the table, and `used_digests` what the
inputs were when they were used.  Hence a file that was changed later is named, and a stage whose settings and inputs are
those of an artifact is not run again.

Source: NVIDIA-NeMo/Nemotron `src/nemo_runspec/manifest_tracker.py` @ e27b371, read and not installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common import files

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ADDED", "Artifact", "Changed", "NoArtifact", "Store"]

ADDED = ("files", "digest", "used_digests")
"""The keys of a manifest that Nemotron's has not."""


class NoArtifact(LookupError):
    """Nothing was published under that name and version."""


class Changed(ValueError):
    """The files of an artifact, or an input of it, are not what they were when it was published."""


@dataclass(frozen=True)
class Artifact:
    """What one stage published.

    Attributes:
        manifest: The content of `manifest.json`.
    """

    manifest: dict[str, Any]

    @property
    def ref(self) -> str:
        """Name and version, such as `nano3-sft-model:v2`."""
        return f"{self.manifest['name']}:v{self.manifest['version']}"

    @property
    def path(self) -> Path:
        """The file or folder that was published."""
        return Path(self.manifest["path"])

    @property
    def digest(self) -> str:
        """One number for all its files and their contents."""
        return self.manifest["digest"]

    @property
    def inputs(self) -> dict[str, str]:
        """Of each input its ref, and its digest when it was used."""
        return self.manifest["used_digests"]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the producer said of it."""
        return self.manifest["metadata"]


@dataclass(frozen=True)
class Store:
    """Artifacts below one folder; several processes may publish there.

    Attributes:
        root: The folder; it is made when something is published.
    """

    root: Path

    def publish(
        self, name: str, path: Path, *, kind: str, inputs: Sequence[str] = (), producer: str = "", **metadata: Any
    ) -> Artifact:
        """Write the next version's manifest; whoever reads meanwhile finds the version before, or this one whole.

        Args:
            name: Such as `nano3-sft-model`.
            path: A file or folder.  What is written into the folder later is not part of the artifact: Megatron and Bridge
                keep their indices beside the data.
            kind: Nemotron's `type`: `dataset`, `model` or `evaluation`.
            inputs: Refs of what it was made of; each is verified first.
            producer: Name of the run that made it.
            metadata: What else is to be known of it, of JSON's kinds.

        Raises:
            Changed: If an input is not what was published; nothing is written then.
            NoArtifact: If there is no such input.
            ValueError: If there is no file.
        """
        used = {each.ref: each.digest for each in map(self.verify, inputs)}
        table = (
            {file: files.sha256(path / file) for file in _names(path)} if path.is_dir() else {"": files.sha256(path)}
        )
        if not table:
            raise ValueError(f"{path} holds no file: there is nothing to publish as {name}")
        home = self.root / name
        with self._locked():
            version = 1 + max(self._versions(name), default=0)
            manifest = {
                "name": name,
                "version": version,
                "type": kind,
                "path": str(path.resolve()),
                "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "producer": producer,
                "metadata": metadata,
                "inputs": [],  # Nemotron's own: what came from outside of the store
                "used_artifacts": list(used),
                "used_digests": used,
                "digest": _sha256_of(table),
                "files": table,
            }
            with files.replacing_folder(home / f"v{version}") as half:
                (half / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                (half / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
            files.write_text(home / "latest", f"v{version}")
        return Artifact(manifest)

    def read(self, ref: str) -> Artifact:
        """What was published, without a look at its files.

        Args:
            ref: `NAME:vN`, or `NAME` for the latest.

        Raises:
            NoArtifact: If nothing was published so; it names what there is.
        """
        name, _, version = ref.partition(":")
        latest = self.root / name / "latest"
        if name and version in ("", "latest") and latest.is_file():
            version = latest.read_text(encoding="utf-8")
        place = self.root / name / (version or "none") / "manifest.json"
        if not place.is_file():
            there = [f"{name}:v{each}" for each in self._versions(name)] or sorted(
                one.parent.name for one in self.root.glob("*/latest")
            )
            raise NoArtifact(f"no artifact {ref!r} in {self.root}: there is {', '.join(there) or 'nothing'}")
        return Artifact(json.loads(place.read_text(encoding="utf-8")))

    def verify(self, ref: str) -> Artifact:
        """What was published, if each of its files is still the same.

        Raises:
            Changed: It names the files that are not.
            NoArtifact: As `read`.
        """
        found = self.read(ref)
        if wrong := _wrong(found):
            rest = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise Changed(
                f"{found.ref}: {wrong[0]}{rest}. What was made of it after that change is not what its manifest says: put "
                "the file back, or publish a new version and run the stages after it again"
            )
        return found

    def back(self, ref: str) -> pd.DataFrame:
        """The walk from an artifact to all that it was made of, each verified on the way.

        Returns:
            Columns `depth`, 0 for the artifact itself; `ref`, `type`, `producer`, `digest` (its beginning) and `files`.
            What was used twice stands there twice.

        Raises:
            Changed: If a file was changed, or an input is not the one that was used.
            NoArtifact: As `read`.
        """
        import pandas as pd

        rows = []

        def walk(found: Artifact, depth: int) -> None:
            said = found.manifest
            rows.append((depth, found.ref, said["type"], said["producer"], found.digest[:12], len(said["files"])))
            for parent, digest in found.inputs.items():
                above = self.verify(parent)
                if above.digest != digest:
                    raise Changed(f"{found.ref} was made of another {parent}: that version was published again since")
                walk(above, depth + 1)

        walk(self.verify(ref), 0)
        return pd.DataFrame(rows, columns=["depth", "ref", "type", "producer", "digest", "files"])

    def stage(
        self,
        name: str,
        make: Callable[[Path], Path],
        *,
        kind: str,
        inputs: Sequence[Artifact] = (),
        settings: dict[str, Any],
    ) -> Artifact:
        """The artifact of these settings and inputs: found, or made now and published.

        It is found by the inputs' digests, so an input that was made again with the same result changes nothing.  An
        artifact whose own files were changed since is not found.

        Args:
            name: Of the artifact.
            make: Gets a folder of its own, which is the same when a stage that was killed is run again, so that it can go
                on from what is there; returns what is to be published.
            inputs: What it is made of.
            settings: All that the result depends on besides, of JSON's kinds.

        Raises:
            Changed: As `publish`, before anything is made.
        """
        for each in inputs:
            self.verify(each.ref)
        made_of = [[each.manifest["name"], each.digest] for each in inputs]
        key = _sha256_of([name, settings, made_of])
        for version in sorted(self._versions(name), reverse=True):
            found = self.read(f"{name}:v{version}")
            if found.metadata.get("key") == key and not _wrong(found):
                print(f"{found.ref}: found, made before of the same settings and inputs")
                return found
        folder = self.root / name / f"files-{key[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        path = make(folder)
        seconds = time.monotonic() - begin
        refs = [each.ref for each in inputs]
        said = {"key": key, "settings": settings, "seconds": round(seconds, 1), "folder": str(folder)}
        made = self.publish(name, path, kind=kind, inputs=refs, producer=_producer(path, folder), **said)
        print(f"{made.ref}: made in {seconds:.0f} s, {len(made.manifest['files'])} files")
        return made

    def _versions(self, name: str) -> list[int]:
        found = (self.root / name).glob("v*/manifest.json") if name else ()
        return [int(place.parent.name[1:]) for place in found]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _names(folder: Path) -> list[str]:
    return sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())


def _wrong(found: Artifact) -> list[str]:
    """The published files that are gone or have another content, in words."""
    wrong = []
    for name, digest in found.manifest["files"].items():
        place = found.path / name if name else found.path
        if not place.is_file():
            wrong.append(f"{name or place.name} is gone from {found.path}")
        elif files.sha256(place) != digest:
            wrong.append(f"{name or place.name} is not the file that was published")
    return wrong


def _producer(path: Path, folder: Path) -> str:
    """The run directory that an artifact lies in, or the stage itself."""
    inside = [one for one in (path, *path.parents) if (one / "launch.json").is_file()]
    return inside[0].name if inside else folder.parent.name


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

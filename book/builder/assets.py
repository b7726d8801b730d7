"""The JavaScript that a default book loads from CDNs: fetched once, held against checksums, kept with the book."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["PACKAGES", "AssetError", "Package", "vendor"]

REGISTRY = "https://registry.npmjs.org"


class AssetError(RuntimeError):
    """A JavaScript package of the book can neither be found nor fetched, or is not what was tested."""


@dataclass(frozen=True)
class Package:
    """A JavaScript package of the book.

    Attributes:
        name: Its name in the npm registry.
        version: The exact version.
        integrity: The tarball's checksum, in the registry's own notation.
        folder: Where its files go below ``assets``.
        keep: What the book needs: path in the tarball, path in the folder; a path that ends in "/" is a tree.
    """

    name: str
    version: str
    integrity: str
    folder: str
    keep: tuple[tuple[str, str], ...]

    @property
    def tarball(self) -> str:
        """The tarball's name, as ``npm pack`` writes it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """The tarball's address in the registry."""
        return f"{REGISTRY}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


# Source of the checksums: `npm view NAME@VERSION dist.integrity`, registry.npmjs.org, November 2026.
PACKAGES = (
    Package(
        name="mathjax",
        version="3.2.2",
        integrity="sha512-Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
        folder="mathjax",
        keep=(
            ("es5/tex-mml-chtml.js", "tex-mml-chtml.js"),
            ("es5/output/chtml/fonts/", "output/chtml/fonts/"),
            ("es5/input/tex/extensions/", "input/tex/extensions/"),  # loaded when a formula needs one
            ("es5/a11y/", "a11y/"),
            ("es5/sre/", "sre/"),  # formulae as speech, when a reader asks for it
        ),
    ),
    Package(
        name="requirejs",
        version="2.3.7",
        integrity="sha512-DouTG8T1WanGok6Qjg2SXuCMzszOo0eHeH9hDZ5Y4x8Je+9JB38HdTLT4/VA8OaUhBa0JPVHJ0pyBkM1z+pDsw==",
        folder="widgets",
        keep=(("require.js", "require.js"),),
    ),
    Package(
        name="@jupyter-widgets/html-manager",
        version="1.0.15",
        integrity="sha512-5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
        folder="widgets",
        keep=(("dist/embed-amd.js", "embed-amd.js"),),
    ),
    Package(
        name="mermaid",
        version="11.17.2",
        integrity="sha512-V6K3C8EBdEsPFZXSKMJe6ppQOENxuHARr9GvHX4hh47lAbhMRD9qf4oEK7LoaRQxULMa80/qt5gHO73aCleBBg==",
        folder="mermaid",
        keep=(("dist/mermaid.min.js", "mermaid.min.js"),),
    ),
)
# sphinxcontrib-mermaid imports a module; this one hands over what the single-file build puts on the page.
MERMAID_MODULE = 'import "./mermaid.min.js";\nexport default globalThis.mermaid;\n'
# The single-file build expects to be a plain script, where `var` makes a global, and parts of it turn to `define` where
# require.js offers one, which leaves mermaid without them. A function around it settles both.
MERMAID_GLOBAL = 'globalThis.__esbuild_esm_mermaid_nm["mermaid"].default'


def vendor(directory: Path, *, packages: tuple[Package, ...] = PACKAGES) -> Path:
    """Put the JavaScript packages below ``directory``; a second call finds them and does nothing.

    Args:
        directory: The folder for the assets; tarballs are kept in its ``.tarballs``.
        packages: What to put there.

    Raises:
        AssetError: A package can neither be found nor fetched, or its checksum is wrong.
    """
    stamp = directory / ".stamp.json"
    wanted = json.dumps([asdict(package) for package in packages], indent=1)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return directory
    tarballs = directory / ".tarballs"
    tarballs.mkdir(parents=True, exist_ok=True)
    for package in packages:
        path = tarballs / package.tarball
        if not path.is_file():
            print(f"book: fetching {package.name} {package.version}", file=sys.stderr, flush=True)
            _fetch(package, path)
        _require_integrity(package, path)
        _unpack(package, path, directory / package.folder)
        if package.name == "mermaid":
            _adapt_mermaid(directory / package.folder)
    stamp.write_text(wanted, encoding="utf-8")
    return directory


def _fetch(package: Package, path: Path) -> None:
    """Fetch a tarball with npm, which knows the machine's registry and proxy, or else from the registry's address."""
    problems = []
    for fetch in (_fetch_with_npm, _fetch_from_registry):
        try:
            return fetch(package, path)
        except (OSError, subprocess.TimeoutExpired) as error:
            problems.append(str(error))
    raise AssetError(
        f"{package.name} {package.version} cannot be fetched ({'; '.join(problems)}). "
        f"Connect this machine to an npm registry once, or copy {path.name} into {path.parent}, and build again."
    )


def _fetch_with_npm(package: Package, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    command = [
        npm,
        "pack",
        f"{package.name}@{package.version}",
        "--silent",
        "--pack-destination",
        os.fspath(path.parent),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=300, check=False)
    if not path.is_file():
        raise FileNotFoundError(f"npm made no {path.name}: {(done.stderr or done.stdout).strip()[-200:]}")


def _fetch_from_registry(package: Package, path: Path) -> None:
    try:
        with urllib.request.urlopen(package.url, timeout=60) as answer:
            path.write_bytes(answer.read())
    except OSError as error:
        raise OSError(f"{package.url}: {error}") from error


def _require_integrity(package: Package, path: Path) -> None:
    kind, _, wanted = package.integrity.partition("-")
    got = base64.b64encode(hashlib.new(kind, path.read_bytes()).digest()).decode()
    if got != wanted:
        path.unlink()
        raise AssetError(
            f"{path.name} has the checksum {kind}-{got}, needed {package.integrity}. "
            "The file was removed: build again. If it comes back, the registry does not serve what was tested."
        )


def _unpack(package: Package, tarball: Path, folder: Path) -> None:
    missing = {source for source, _ in package.keep}
    with tarfile.open(tarball) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            name = member.name.partition("/")[2]  # the registry packs everything below package/
            for source, target in package.keep:
                wanted = name == source or (source.endswith("/") and name.startswith(source))
                if wanted and ".." not in name.split("/"):
                    path = folder / (target + name.removeprefix(source))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.extractfile(member).read())
                    missing.discard(source)
    if missing:
        raise AssetError(
            f"{tarball.name} has no {', '.join(sorted(missing))}: correct `keep` of {package.name} in PACKAGES of "
            "book/builder/assets.py."
        )


def _adapt_mermaid(folder: Path) -> None:
    path = folder / "mermaid.min.js"
    text = path.read_text(encoding="utf-8")
    if text.count(MERMAID_GLOBAL) != 1:
        raise AssetError(
            f"{path} does not end as mermaid 11.17.2 does: adapt MERMAID_GLOBAL in book/builder/assets.py."
        )
    text = text.replace(MERMAID_GLOBAL, MERMAID_GLOBAL.removeprefix("globalThis."))
    path.write_text(f"(function (define) {{\n{text}\n}})();\n", encoding="utf-8")
    (folder / "mermaid.mjs").write_text(MERMAID_MODULE, encoding="utf-8")

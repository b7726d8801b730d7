"""The book: executed lessons and a few prose pages, as HTML that asks nothing of any other machine.

What was executed is what is published: the build runs no cell. Lessons that were never executed, or not since their
source changed, are executed first. The pages are put together in ``book/_build/source``: ``book/`` holds only sources.
The four JavaScript packages that a default book loads from CDNs come from the npm registry once, are held against their
checksums, and travel with the book.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from course_lib import lessons

__all__ = ["PACKAGES", "BookError", "Package", "build", "external_loads", "vendor"]

PROJECT = Path(__file__).resolve().parent.parent
REGISTRY = "https://registry.npmjs.org"


class BookError(RuntimeError):
    """The book cannot be built."""


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
            (
                "es5/input/tex/extensions/",
                "input/tex/extensions/",
            ),  # MathJax loads an extension when a formula needs it
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


def build(*, root: Path | None = None, execute: bool = True) -> Path:
    """Build the book.

    Args:
        root: The project, by default this one; a test gives a small copy.
        execute: Execute lessons that are missing or older than their source; otherwise they are left out.

    Returns:
        The front page, ``book/_build/html/index.html``.

    Raises:
        BookError: A JavaScript package is missing, Sphinx warned, or a page would load something from elsewhere.
        lessons.LessonFailed: A lesson that had to be executed failed.
    """
    root = root or PROJECT
    start = time.monotonic()
    book = root / "book"
    vendor(book / "assets")
    pages = _executed(root, execute=execute)
    source = _stage(book, pages)
    html = book / "_build" / "html"
    _say(f"building {len(pages)} lessons and {len(list(book.glob('*.md')))} pages")
    _run_jupyter_book(source, output=book)
    loads = external_loads(html)
    if loads:
        shown = "\n".join(loads[:20])
        raise BookError(
            f"{len(loads)} loads from other machines in the built book:\n{shown}\nVendor them in book.PACKAGES."
        )
    _say(f"built in {time.monotonic() - start:.0f} s: {html / 'index.html'}")
    return html / "index.html"


def vendor(directory: Path, *, packages: tuple[Package, ...] = PACKAGES) -> Path:
    """Put the JavaScript packages below ``directory``; a second call finds them and does nothing.

    Args:
        directory: The folder for the assets; tarballs are kept in its ``.tarballs``.
        packages: What to put there.

    Raises:
        BookError: A package can neither be found nor fetched, or its checksum is wrong.
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
            _say(f"fetching {package.name} {package.version}")
            _fetch(package, path)
        _require_integrity(package, path)
        _unpack(package, path, directory / package.folder)
        if package.name == "mermaid":
            _adapt_mermaid(directory / package.folder)
    stamp.write_text(wanted, encoding="utf-8")
    return directory


def external_loads(html: Path) -> list[str]:
    """List everything that the built pages would load from another machine.

    Links that a reader follows are no loads. Scripts, styles, pictures, frames, fonts and imports are.

    Args:
        html: The folder of the built book.

    Returns:
        One line a load: "page: address".
    """
    found: list[str] = []
    for path in sorted(html.rglob("*")):
        name = path.relative_to(html).as_posix()
        if path.suffix == ".html":
            parser = _Loads()
            parser.feed(path.read_text(encoding="utf-8"))
            found += [f"{name}: {address}" for address in parser.addresses if ELSEWHERE.match(address)]
        elif path.suffix == ".css":
            found += [
                f"{name}: {address}" for address in _css_loads(path.read_text(encoding="utf-8", errors="replace"))
            ]
    return found


ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
SCRIPT_IMPORT = re.compile(r"""(?:\bimport\b[^;\n]*?|\bimport\(|\bfetch\(|importScripts\()\s*["'`]([^"'`]+)["'`]""")
CSS_ADDRESS = re.compile(r"""(?:@import\s+|url\()\s*["']?([^"')\s;]+)""")


class _Loads(HTMLParser):
    """Collect the addresses that a browser fetches while it shows a page."""

    BY_ATTRIBUTE = {"script": "src", "img": "src", "iframe": "src", "embed": "src", "object": "data", "source": "src"}
    BY_ATTRIBUTE |= {"video": "src", "audio": "src", "track": "src", "input": "src", "image": "href", "use": "href"}
    FETCHED_LINKS = frozenset(
        "stylesheet icon shortcut preload modulepreload prefetch dns-prefetch preconnect manifest".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "link" and self.FETCHED_LINKS & set(values.get("rel", "").lower().split()):
            self.addresses.append(values.get("href", ""))
        if tag in self.BY_ATTRIBUTE:
            self.addresses.append(values.get(self.BY_ATTRIBUTE[tag], ""))
        self.addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.addresses += _css_loads(values.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.addresses += _css_loads(data)
        elif self._inside == "script":
            self.addresses += SCRIPT_IMPORT.findall(data)


def _css_loads(text: str) -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [address for address in CSS_ADDRESS.findall(text) if ELSEWHERE.match(address)]


def _fetch(package: Package, path: Path) -> None:
    """Fetch a tarball with npm, which knows the machine's registry and proxy, or else from the registry's address."""
    problems = []
    npm = shutil.which("npm")
    if npm:
        command = [
            npm,
            "pack",
            f"{package.name}@{package.version}",
            "--silent",
            "--pack-destination",
            os.fspath(path.parent),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            problems.append("npm gave no answer for 300 s")
        else:
            if path.is_file():
                return
            problems.append(f"npm: {(done.stderr or done.stdout).strip().splitlines()[-1:] or done.returncode}")
    else:
        problems.append("npm is not installed")
    partial = path.with_suffix(".partial")
    try:
        with urllib.request.urlopen(package.url, timeout=60) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
        os.replace(partial, path)
    except (OSError, urllib.error.URLError) as error:
        partial.unlink(missing_ok=True)
        problems.append(f"{package.url}: {error}")
        raise BookError(
            f"{package.name} {package.version} cannot be fetched ({'; '.join(problems)}). "
            f"Connect this machine to an npm registry once, or copy {path.name} into {path.parent}, and build again."
        ) from error


def _require_integrity(package: Package, path: Path) -> None:
    kind, _, wanted = package.integrity.partition("-")
    got = base64.b64encode(hashlib.new(kind, path.read_bytes()).digest()).decode()
    if got != wanted:
        path.unlink()
        raise BookError(
            f"{path.name} has the checksum {kind}-{got}, needed {package.integrity}. "
            "The file was removed: build again. If it comes back, the registry does not serve what was tested."
        )


def _unpack(package: Package, tarball: Path, folder: Path) -> None:
    kept = dict.fromkeys((pattern for pattern, _ in package.keep), 0)
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = member.name.partition("/")[2]  # the registry packs everything below package/
            for pattern, target in package.keep:
                inside = name.removeprefix(pattern) if pattern.endswith("/") and name.startswith(pattern) else None
                if not member.isfile() or (name != pattern and inside is None) or ".." in name.split("/"):
                    continue
                path = folder / (target if inside is None else target + inside)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
                kept[pattern] += 1
    missing = [pattern for pattern, count in kept.items() if not count]
    if missing:
        raise BookError(
            f"{tarball.name} has no {', '.join(missing)}: correct `keep` of {package.name} in book.PACKAGES."
        )


def _adapt_mermaid(folder: Path) -> None:
    path = folder / "mermaid.min.js"
    text = path.read_text(encoding="utf-8")
    if text.count(MERMAID_GLOBAL) != 1:
        raise BookError(f"{path} does not end as mermaid 11.17.2 does: adapt MERMAID_GLOBAL in course_lib/book.py.")
    text = text.replace(MERMAID_GLOBAL, MERMAID_GLOBAL.removeprefix("globalThis."))
    path.write_text(f"(function (define) {{\n{text}\n}})();\n", encoding="utf-8")
    (folder / "mermaid.mjs").write_text(MERMAID_MODULE, encoding="utf-8")


def _executed(root: Path, *, execute: bool) -> list[Path]:
    """Return the executed lessons, after executing those that are missing or older than their source."""
    directory, output = root / "notebooks", root / "book" / "lessons"
    paths = []
    for lesson in lessons.listing(directory=directory):
        path = output / lesson.path.name
        if execute and (not path.is_file() or path.stat().st_mtime < lesson.path.stat().st_mtime):
            _say(
                f"executing {lesson.path.stem}, {'which was changed' if path.is_file() else 'which was never executed'}"
            )
            lessons.execute(lesson.number, directory=directory, output_directory=output)
        if path.is_file():
            paths.append(path)
    return paths


def _stage(book: Path, pages: list[Path]) -> Path:
    """Put the pages together for Sphinx; a file that did not change keeps its time, so that Sphinx skips it."""
    source = book / "_build" / "source"
    wanted = {path.name: path.read_text(encoding="utf-8") for path in [*book.glob("*.md"), *book.glob("_*.yml")]}
    wanted |= {f"lessons/{path.name}": _page(path) for path in pages}
    old = {
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and not path.is_symlink()
    }
    for name in old - set(wanted):
        if not name.startswith(("assets/", "static/")):
            (source / name).unlink()
    for name, text in wanted.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for folder in ("assets", "static"):
        link = source / folder
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(book / folder, source), target_is_directory=True)
    return source


def _page(path: Path) -> str:
    """Turn an executed lesson into a page: links fit the book's folders, and pictures carry their words.

    myst-nb takes the alternative text from the cell, while a notebook keeps it with the output.
    """
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = "".join(cell["source"]).replace("](../book/", "](../")
        described = [
            output["metadata"]["image/png"]["alt"]
            for output in cell.get("outputs", ())
            if output.get("metadata", {}).get("image/png", {}).get("alt")
        ]
        if described:
            cell["metadata"]["mystnb"] = {"image": {"alt": " ".join(described)}}
    return json.dumps(notebook, indent=1, ensure_ascii=False)


def _run_jupyter_book(source: Path, *, output: Path) -> None:
    """Run jupyter-book with warnings as errors; its output is shown when it fails."""
    build = ["build", ".", "--path-output", os.fspath(output.resolve()), "-W", "-n", "--keep-going", "-q"]
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", *build]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        told = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).splitlines()
        told = [line for line in told if re.search(r"WARNING|ERROR|error", line)] or told
        shown = "\n".join(told[-30:]).replace(f"{source}{os.sep}", "")
        raise BookError(f"jupyter-book failed (a warning is an error here):\n{shown}")


def _say(text: str) -> None:
    print(f"book: {text}", file=sys.stderr, flush=True)

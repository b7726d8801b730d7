"""Links, anchors and pictures of the built pages: each leads somewhere inside the book, and each picture has words."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken", "external_loads"]


def broken(html: Path) -> list[str]:
    """List what a reader of the built book would stumble over.

    Args:
        html: The folder of the built book.

    Returns:
        One line each: a link to a page that is not there, an anchor that no page has, a picture without a file or
        without alternative text.  Addresses of other machines are left alone.
    """
    pages = {path: _read(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}
    found: list[str] = []
    for path, page in pages.items():
        name = path.relative_to(html).as_posix()
        for address in page.addresses:
            problem = _problem(address, path, pages)
            if problem:
                found.append(f"{name}: {address} {problem}")
        found += [f"{name}: the picture {source} has no alternative text" for source in page.silent_pictures]
    return found


def _problem(address: str, page: Path, pages: dict[Path, _Page]) -> str:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return ""
    target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "leads nowhere"
    # search.html?q=... and the empty anchor of a button are no places in a page
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "names a place that the page does not have"
    return ""


class _Page(HTMLParser):
    """Collect what a page links to, shows, and can be linked at."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: set[str] = {"top"}
        self.silent_pictures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.addresses.append(values["href"])
        if tag == "img":
            if not values.get("src", "").startswith("data:"):
                self.addresses.append(values.get("src", ""))
            if not values.get("alt", "").strip():
                self.silent_pictures.append(values.get("src", "")[:80])


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
SCRIPT_IMPORT = re.compile(r"""(?:\bimport\b[^;\n]*?|\bimport\(|\bfetch\(|importScripts\()\s*["'`]([^"'`]+)["'`]""")
CSS_ADDRESS = re.compile(r"""(?:@import\s+|url\()\s*["']?([^"')\s;]+)""")


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

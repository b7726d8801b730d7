"""Links, anchors and pictures of the built pages: each leads somewhere inside the book, and each picture has words."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken"]


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

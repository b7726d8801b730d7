"""The book: built from executed lessons, and it asks nothing of any other machine."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from book import builder
from book.builder import archive as book_archive
from book.builder import assets as book_assets
from book.builder.links import broken, external_loads
from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks
from support.notebooks_made_here import clean, markdown, write
from support.small_book import copy_book, executed_lesson


def test_the_book_has_its_pages_and_loads_nothing_from_elsewhere(built: Path) -> None:
    """Front page, glossary, the honest page and the lesson are there; no page loads anything from another machine."""
    assert all(
        (built / name).is_file()
        for name in ("index.html", "glossary.html", "what_runs_where.html", "lessons/07_small.html")
    )
    assert external_loads(built) == []


def test_each_lesson_stands_in_its_part() -> None:
    """The contents of the book put a lesson into the part that the table of the README names, and into no other."""
    toc = yaml.safe_load((PROJECT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| ([IV]*) *\| (\d\d|A) ", (PROJECT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    numerals = list(itertools.accumulate((numeral for numeral, _ in rows), lambda last, own: own or last))
    named = {number.lower(): numeral for numeral, (_, number) in zip(numerals, rows, strict=True)}
    for lesson in notebooks.listing():
        page = f"lessons/{lesson.path.stem}"
        parts = [
            part["caption"].partition(".")[0]
            for part in toc["parts"]
            for entry in part["chapters"]
            if fnmatch.fnmatch(page, entry.get("glob", ""))
        ]
        assert parts == [named[lesson.number]], page


def test_what_pages_need_travels_with_the_book(built: Path) -> None:
    """Formulae, widgets and diagrams are drawn by files of the book, and each of these files is there."""
    page = (built / "lessons" / "07_small.html").read_text()
    for script in ("mathjax/tex-mml-chtml.js", "widgets/require.js", "widgets/embed-amd.js", "mermaid/mermaid.mjs"):
        assert f"../_static/{script}" in page
        assert (built / "_static" / script).is_file()
    assert (built / "_static" / "mermaid" / "mermaid.min.js").is_file()
    assert "widget-state+json" in page


def test_pictures_have_words_and_links_fit(built: Path) -> None:
    """Alternative text and width of a picture reach the page; links to the book's pages work from the lesson."""
    page = (built / "lessons" / "07_small.html").read_text()
    assert 'alt="Loss falls."' in page and "720" in page
    assert 'href="../glossary.html#nat"' in page
    assert 'href="../your_ledger.html"' in page, "the learner's notebook is no page; the page about it is"


def test_a_page_names_no_folder_of_whoever_built_it(built: Path) -> None:
    """What a cell printed about files reads as it would for the reader."""
    page = (built / "lessons" / "07_small.html").read_text()
    assert "wrote ~/course/runs/smoke/config.yaml" in page
    assert "/project/runs/smoke" not in page


def test_the_archive_is_the_book_and_the_same_twice(built: Path, tmp_path: Path) -> None:
    """One folder with every page and script, no file's time or build directory, and equal bytes for equal pages."""
    one = book_archive.pack(built, tmp_path / "one.zip")
    for path in built.rglob("*"):
        os.utime(path)
    two = book_archive.pack(built, tmp_path / "two.zip")
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    pages = {path.relative_to(built).as_posix() for path in built.rglob("*.html")}
    pages.add("_sources/lessons/07_small.ipynb")  # behind the page's download button
    assert {f"{book_archive.FOLDER}/{name}" for name in pages} <= names
    assert not any(name.endswith(".buildinfo") for name in names)
    assert external_loads(tmp_path / "unpacked") == []


def test_an_archive_of_nothing_is_refused(tmp_path: Path) -> None:
    """Without a built book the message says how to build it, and no file is left."""
    with pytest.raises(FileNotFoundError, match="make book"):
        book_archive.pack(tmp_path, tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == []


def test_solutions_are_folded(built: Path) -> None:
    """A cell tagged hide-cell is folded in the page."""
    page = (built / "lessons" / "07_small.html").read_text()
    assert 'class="hide above-input"' in page or "Show code cell content" in page


def test_a_warning_fails_the_build(tmp_path: Path) -> None:
    """A broken link is an error, and the message names the page."""
    root = copy_book(tmp_path)
    executed_lesson(root, extra="See [nothing](no_such_page.md).\n")
    for name in ("what_runs_where", "glossary"):  # the fewer pages, the sooner the answer
        (root / "book" / f"{name}.md").write_text(f"# {name}\n\n## Nat\n")
    with pytest.raises(builder.BookError, match=r"lessons/07_small.*no_such_page"):
        builder.build(root=root, execute=False)


def test_lessons_are_executed_when_missing_or_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lesson runs before the build if it never ran or its source is newer; otherwise its copy is taken as it is."""
    asked: list[str] = []

    def execute(number: str, *, directory: Path, output_directory: Path) -> None:
        asked.append(number)
        write(output_directory / "07_small.ipynb", clean())

    monkeypatch.setattr(notebooks, "execute", execute)
    source = write(tmp_path / "notebooks" / "07_small.ipynb", clean())
    builder._executed(tmp_path, execute=True)
    builder._executed(tmp_path, execute=True)
    assert asked == ["07"], "never executed: once, and its copy is taken from then on"
    later = time.time() + 5
    os.utime(source, (later, later))
    builder._executed(tmp_path, execute=True)
    assert asked == ["07", "07"], "the source is newer than the copy"
    executed = tmp_path / "book" / "lessons" / "07_small.ipynb"
    (tmp_path / "book" / "lessons" / "07_small.failed.ipynb").write_text("{}")
    assert builder._executed(tmp_path, execute=False) == [executed], "a failed copy is no page"


@pytest.mark.parametrize(
    "load",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        '<script src="//cdn.example.org/x.js"></script>',
        '<link rel="stylesheet" href="https://cdn.example.org/x.css">',
        '<link rel="preload" as="font" href="https://cdn.example.org/x.woff2">',
        '<img src="http://cdn.example.org/x.png">',
        '<img srcset="x.png 1x, https://cdn.example.org/x.png 2x">',
        '<iframe src="https://cdn.example.org/"></iframe>',
        "<style>@import 'https://cdn.example.org/x.css';</style>",
        '<div style="background: url(https://cdn.example.org/x.png)"></div>',
        '<script type="module">import mermaid from "https://cdn.example.org/mermaid.mjs";</script>',
    ],
)
def test_every_kind_of_load_is_found(tmp_path: Path, load: str) -> None:
    """The check finds scripts, styles, fonts, pictures, frames and imports."""
    (tmp_path / "page.html").write_text(f"<html><body>{load}</body></html>")
    assert len(external_loads(tmp_path)) == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="nowhere.html">x</a>', "leads nowhere"),
        ('<a href="other.html#gone">x</a>', "does not have"),
        ('<a href="#gone">x</a>', "does not have"),
        ('<img src="gone.png" alt="A loss.">', "leads nowhere"),
        ('<img src="there.png">', "no alternative text"),
        ('<img src="data:image/png;base64,AA" alt=" ">', "no alternative text"),
    ],
)
def test_every_kind_of_stumble_is_found(tmp_path: Path, body: str, problem: str) -> None:
    """Missing pages, anchors and pictures are found, and pictures without words."""
    (tmp_path / "page.html").write_text(f"<html><body>{body}</body></html>")
    (tmp_path / "other.html").write_text('<html><body><h2 id="here">x</h2></body></html>')
    (tmp_path / "there.png").write_bytes(b"")
    found = broken(tmp_path)
    assert len(found) == 1 and found[0].startswith("page.html: ") and problem in found[0]


def test_what_is_no_stumble(tmp_path: Path) -> None:
    """Pages, folders, anchors and described pictures of the book, and addresses elsewhere, are left alone."""
    body = '<a href="deep/#here">x</a><a href="https://example.org/#x">x</a><a href="#me" id="me">x</a>'
    (tmp_path / "deep").mkdir()
    (tmp_path / "page.html").write_text(f'{body}<a href="search.html?q=x">x</a><img src="a%20b.png" alt="A loss.">')
    (tmp_path / "search.html").write_text("")
    (tmp_path / "a b.png").write_bytes(b"")
    (tmp_path / "deep" / "index.html").write_text('<p id="here">x</p>')
    assert broken(tmp_path) == []


def test_links_are_no_loads(tmp_path: Path) -> None:
    """A link that a reader follows, a canonical address and a comment in a style sheet load nothing."""
    page = '<a href="https://example.org">x</a><link rel="canonical" href="https://example.org"><script src="x.js">'
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "x.css").write_text("/* @import url(https://example.org/x.css); */ a { background: url(x.png) }")
    assert external_loads(tmp_path) == []
    (tmp_path / "x.css").write_text("@font-face { src: url('https://example.org/x.woff2') }")
    assert external_loads(tmp_path) == ["x.css: https://example.org/x.woff2"]


def package_of(files: dict[str, bytes], *, keep: tuple[tuple[str, str], ...]) -> tuple[book_assets.Package, bytes]:
    """A package as the registry would serve it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    return book_assets.Package(name="@scope/tool", version="1.0.0", integrity=integrity, folder="tool", keep=keep), data


def put(assets: Path, package: book_assets.Package, data: bytes) -> None:
    """Put a tarball where the cache has it."""
    (assets / ".tarballs").mkdir(parents=True, exist_ok=True)
    (assets / ".tarballs" / package.tarball).write_bytes(data)


def test_vendoring_keeps_what_is_needed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the named files are kept, no path leaves the folder, and a second call touches nothing."""
    files = {"dist/a.js": b"a", "dist/a.js.map": b"map", "fonts/b.woff": b"b", "fonts/../../../evil": b"e"}
    package, data = package_of(files, keep=(("dist/a.js", "a.js"), ("fonts/", "f/")))
    put(tmp_path, package, data)
    monkeypatch.setattr(book_assets, "_fetch", lambda package, path: pytest.fail("nothing has to be fetched"))
    book_assets.vendor(tmp_path, packages=(package,))
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "tool").rglob("*") if path.is_file())
    assert kept == ["tool/a.js", "tool/f/b.woff"] and not list(tmp_path.rglob("evil"))
    (tmp_path / ".tarballs" / package.tarball).unlink()
    book_assets.vendor(tmp_path, packages=(package,))


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    """A tarball that is not the tested one is removed, and nothing of it is unpacked."""
    package, data = package_of({"dist/a.js": b"a"}, keep=(("dist/a.js", "a.js"),))
    put(tmp_path, package, data + b" ")
    with pytest.raises(book_assets.AssetError, match="checksum"):
        book_assets.vendor(tmp_path, packages=(package,))
    assert not (tmp_path / "tool").exists() and not (tmp_path / ".tarballs" / package.tarball).exists()


def test_a_missing_file_in_a_package_is_named(tmp_path: Path) -> None:
    """If upstream moves a file, the error says which."""
    package, data = package_of({"dist/a.js": b"a"}, keep=(("dist/b.js", "b.js"),))
    put(tmp_path, package, data)
    with pytest.raises(book_assets.AssetError, match="dist/b.js"):
        book_assets.vendor(tmp_path, packages=(package,))


@pytest.fixture
def registry(tmp_path: Path):
    """A registry on this machine that serves one package, and its name for the package's address."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    folder = tmp_path / "registry"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=os.fspath(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_without_npm_the_registry_is_asked_directly(tmp_path: Path, registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where npm is not installed, the tarball comes from the registry's address; else the error says all."""
    folder, address = registry
    package, data = package_of({"dist/a.js": b"a"}, keep=(("dist/a.js", "a.js"),))
    served = folder / package.url.removeprefix(f"{book_assets.REGISTRY}/")
    served.parent.mkdir(parents=True)
    served.write_bytes(data)
    monkeypatch.setattr(book_assets.shutil, "which", lambda name: None)
    monkeypatch.setattr(book_assets, "REGISTRY", address)
    book_assets.vendor(tmp_path / "one", packages=(package,))
    assert (tmp_path / "one" / "tool" / "a.js").read_bytes() == b"a"
    served.unlink()
    with pytest.raises(book_assets.AssetError, match=r"npm is not installed.*404.*copy scope-tool-1.0.0.tgz"):
        book_assets.vendor(tmp_path / "two", packages=(package,))
    assert not list((tmp_path / "two").rglob("*.tgz"))


def test_glossary_entries_are_unique_and_linked_words_exist() -> None:
    """Each word has one entry, and every link of a lesson or a page into the glossary has its entry."""
    entries = re.findall(r"^### (.+)$", (PROJECT / "book" / "glossary.md").read_text(), flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", entry.lower()).replace(" ", "-") for entry in entries]
    assert len(anchors) == len(set(anchors))
    sources = [*(PROJECT / "notebooks").glob("*.ipynb"), *(PROJECT / "book").glob("*.md")]
    linked = {
        anchor for path in sources for anchor in re.findall(r"glossary\.md#([\w-]+)", path.read_text(encoding="utf-8"))
    }
    assert linked <= set(anchors)


def test_the_readmes_picture_is_there_and_small() -> None:
    """One picture of a lesson, with words, under 200 kB."""
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    assert len(pictures) == 1
    for words, place in pictures:
        assert len(words.split()) > 4 and 0 < (PROJECT / place).stat().st_size < 200_000


def test_pages_keep_the_habits_of_prose() -> None:
    """The book's own pages have one sentence a line and plain words, as the lessons do."""
    from support import hygiene

    for path in (PROJECT / "book").glob("*.md"):
        page = json.loads(json.dumps({"cells": [markdown("page", path.read_text(encoding="utf-8"))]}))
        found = [*hygiene.one_sentence_a_line(page), *hygiene.plain_words(page)]
        assert found == [], path.name

"""The page of faults found upstream: each block is run as it stands there, and does what the page says it does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

import pytest

from course_lib.common.project import PROJECT

PAGE = (PROJECT / "book" / "upstream.md").read_text(encoding="utf-8")
RUN = """
import contextlib, gc, io, json, sys
from course_lib import stack
gc.disable()  # what is imported stays
stack.prepare_imports()
said = []
for code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(code, "block", "exec", dont_inherit=True), {"__name__": "__main__"})
        except (Exception, SystemExit) as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())}")
    said.append(out.getvalue())
print("said: " + json.dumps(said))
"""
"""One process for all blocks: the packages are imported once, and what they leave behind stays there."""


@dataclass(frozen=True)
class Section:
    """One fault, as the page tells it."""

    title: str
    text: str

    def block(self, kind: str) -> str:
        """The section's only fenced block of a kind."""
        (found,) = re.findall(rf"```{kind}\n(.*?)```", self.text, re.DOTALL)
        return found


def sections() -> list[Section]:
    """The faults of the page, in its order."""
    return [Section(part.partition("\n")[0], part) for part in re.split(r"(?m)^## ", PAGE)[1:]]


ALL = sections()


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each block printed, or raised."""
    codes = json.dumps([section.block("python") for section in ALL])
    done = subprocess.run([sys.executable, "-c", RUN], input=codes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("said: "))
    return dict(zip((section.title for section in ALL), json.loads(line.removeprefix("said: ")), strict=True))


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.title)
def test_a_reproduction_gives_what_the_page_says(section: Section, said: dict[str, str]) -> None:
    """If this fails, upstream may have mended the fault: then its section goes, and so does what the course does about it."""
    assert all(line in said[section.title] for line in section.block("text").splitlines()), said[section.title]


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.title)
def test_a_section_can_be_sent_as_it_is(section: Section) -> None:
    """Package with the installed version, what was expected, what came instead; nothing of the course in the code."""
    name, told = re.search(r"^Package: ([\w-]+) (\d+(?:\.\d+)+),", section.text, re.MULTILINE).groups()
    assert version(name) == told
    assert "\nExpected: " in section.text and "\nGot" in section.text and section.block("text").strip()
    assert "course_lib" not in section.block("python")

"""The map of NVIDIA's stack: six systems, what each takes and gives, and one object that proves its role.

Everything is read from `data/stack.json`; versions and files come from what is installed.  Only the places of the
diagram's boxes are kept here.  Its text takes the colour of the page, and its borders take the four colours of
`figures.plots`, which fit both themes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common.project import DATA, PROJECT
from course_lib.figures import plots
from course_lib.machine import installation

if TYPE_CHECKING:
    import pandas as pd
    from ipywidgets import Widget

__all__ = [
    "Box",
    "Page",
    "Proof",
    "Question",
    "beside",
    "boxes",
    "browse",
    "card",
    "cards",
    "flows",
    "home",
    "linked",
    "prove",
    "questions",
    "table",
]

_FILE = DATA / "stack.json"
_LIMIT_S = 420  # importing AutoModel takes ten seconds, or minutes on a machine that others use


@dataclass(frozen=True)
class Box:
    """One system of the stack, as `data/stack.json` describes it.

    Attributes:
        distribution: The installed package, None for a repository that is not one.
        isolated: Whether it must be imported in a process of its own, because it does not accept stand-ins.
    """

    name: str
    layer: str
    role: str
    distribution: str | None
    tested: str
    module: str
    object: str
    kind: str
    consumes: str
    produces: str
    isolated: bool
    enters: str
    repository: str
    shown_in: str


@dataclass(frozen=True)
class Question:
    """A question of a working day, the system whose repository answers it, and why."""

    question: str
    answer: str
    reason: str


@dataclass(frozen=True)
class Proof:
    """That an object exists: what it is and the file that defines it, below site-packages where it is there."""

    name: str
    type: str
    file: str


def boxes(*, path: Path = _FILE) -> tuple[Box, ...]:
    """The six systems.

    >>> [box.name for box in boxes() if box.layer == "machinery"]
    ['Megatron-LM']
    """
    return tuple(Box(**row) for row in _read(path)["boxes"])


def questions(*, path: Path = _FILE) -> tuple[Question, ...]:
    """The exercise "which repository do I open?"."""
    return tuple(Question(**row) for row in _read(path)["questions"])


def beside() -> pd.DataFrame:
    """Systems of the stages that this course does not run: one row each, with its stage, role, repository and source."""
    import pandas as pd

    return pd.DataFrame(_read(_FILE)["beside"])


def flows(*, path: Path = _FILE) -> tuple[tuple[str, str, str], ...]:
    """What goes from which system to which: (from, to, what)."""
    return tuple((start, end, what) for start, end, what in _read(path)["flows"])


def table(shown: Sequence[Box] | None = None) -> pd.DataFrame:
    """One row a system with the version and the file that this environment has."""
    import pandas as pd

    rows = []
    for box in boxes() if shown is None else shown:
        version = installation.version(box.distribution) if box.distribution else f"{box.tested} (read, not installed)"
        rows.append((box.name, box.layer, box.role, box.consumes, box.produces, version or "not installed", home(box)))
    return pd.DataFrame(rows, columns=["system", "layer", "role", "consumes", "produces", "version", "imported from"])


def prove(box: Box) -> Proof:
    """Import the object that proves a role.

    Raises:
        ImportError: If the module or the object is not there; the message names the package and the fix.
    """
    try:
        if box.isolated:
            return Proof(box.name, *_in_a_child(box))
        found = getattr(importlib.import_module(box.module), box.object)
        return Proof(box.name, type(found).__name__, _short(inspect.getsourcefile(found)))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{box.module}.{box.object} of {box.name} cannot be imported ({error}): run `make setup`, "
            f"which installs {box.distribution or 'the course'} {box.tested}"
        ) from error


def home(box: Box) -> str:
    """The file of a system's top package, found without importing it; `not installed` if there is none."""
    module = installation.PACKAGES.get(box.distribution or "", "course_lib")
    return _short(str(next(iter(installation.places(module)), "not installed")))


def _in_a_child(box: Box) -> tuple[str, str]:
    code = (
        f"import importlib, inspect; found = getattr(importlib.import_module({box.module!r}), {box.object!r}); "
        "print('proof:', type(found).__name__, inspect.getsourcefile(found))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ImportError(f"no answer within {_LIMIT_S} s") from None
    line = next((line for line in done.stdout.splitlines() if line.startswith("proof: ")), None)
    if line is None:
        raise ImportError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer")
    _, kind, file = line.split(" ", 2)
    return kind, _short(file)


def _short(file: str | None) -> str:
    """A path below site-packages or the project, as it is the same on every machine."""
    text = str(file)
    project = str(PROJECT) + "/"
    return text.split("site-packages/")[-1].removeprefix(project)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# Left to right as work flows, top to bottom as calls go: column and row of each box.
_PLACES = {
    "NeMo Curator": (0, 1),
    "Nemotron": (1, 1),
    "NeMo Run": (2, 0),
    "Megatron-Bridge": (2, 1),
    "NeMo AutoModel": (2, 2),
    "Megatron-LM": (3, 1),
}
_LAYER_COLOURS = {
    "data": plots.COLOURS["green"],
    "blueprint": plots.COLOURS["blue"],
    "orchestration": plots.COLOURS["purple"],
    "engine": plots.COLOURS["vermilion"],
    "machinery": plots.INK,
}
_WIDTH, _HEIGHT = 124, 52  # of a box, in CSS pixels
_STEP_X, _STEP_Y, _EDGE = 182, 96, 4  # from box to box, and around all of them; a dark page of the book has 688
_STYLE = """<style>
.stack-map { position: relative; margin: 0.5rem 0 1rem; color: inherit; }
.stack-map-scroll { overflow-x: auto; }
.stack-map svg { position: absolute; inset: 0; overflow: visible; }
.stack-map a, .stack-map a:visited { position: absolute; box-sizing: border-box; border: 2px solid; border-radius: 8px;
  display: flex; flex-direction: column; justify-content: center; text-align: center; font-size: 11.5px; line-height: 1.35;
  text-decoration: none; color: inherit; }
.stack-map a b { white-space: nowrap; }
.stack-map a:hover, .stack-map a:focus { background: rgba(128, 128, 128, 0.18); }
.stack-card { margin: 0.9rem 0; border-left: 4px solid; padding-left: 0.8rem; scroll-margin-top: 5rem; }
.stack-card:target { background: rgba(128, 128, 128, 0.18); }
.stack-card dl { display: grid; grid-template-columns: 8rem minmax(0, 1fr); margin: 0.3rem 0; font-size: 88%; }
.stack-card dl dt, .stack-card dl dd { float: none; width: auto; margin: 0; padding: 0; text-align: left; line-height: 1.5;
  font-weight: normal; overflow-wrap: anywhere; }
</style>"""


@dataclass(frozen=True)
class Page:
    """A piece of HTML that JupyterLab and the book show; `text` is what a reader without HTML gets."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def linked(*, selected: str = "") -> Page:
    """The diagram; each box is a link to its card and says its role when the pointer rests on it.

    Returns:
        HTML with an alternative text that names every box and every arrow.
    """
    arrows = "; ".join(f"{start} to {end}: {what}" for start, end, what in flows())
    alternative = f"Map of six systems. Arrows: {arrows}."
    links = []
    for box in boxes():
        x, y = _corner(box.name)
        border = f"border-color: {_LAYER_COLOURS[box.layer]}; border-width: {4 if box.name == selected else 2}px"
        links.append(
            f'<a href="#{_anchor(box)}" title="{escape(_hover(box))}" style="left: {x}px; top: {y}px; '
            f'width: {_WIDTH}px; height: {_HEIGHT}px; {border}"><b>{escape(box.name)}</b><span>{box.layer}</span></a>'
        )
    wide, high = 3 * _STEP_X + _WIDTH + 2 * _EDGE, 2 * _STEP_Y + _HEIGHT + 2 * _EDGE
    html = (
        f'{_STYLE}<div class="stack-map-scroll"><div class="stack-map" role="group" aria-label="{escape(alternative)}" '
        f'style="width: {wide}px; height: {high}px">{_arrows(wide, high)}{"".join(links)}</div></div>'
    )
    return Page(html, alternative)


def cards(shown: Iterable[Box] | None = None) -> Page:
    """One card a system, each the target of its box in the linked diagram."""
    found = boxes() if shown is None else tuple(shown)
    sections = [
        f'<section class="stack-card" id="{_anchor(box)}" style="border-color: {_LAYER_COLOURS[box.layer]}">'
        f"{card(box)}</section>"
        for box in found
    ]
    return Page(_STYLE + "".join(sections), "\n".join(f"{box.name}: {box.role}" for box in found))


def card(box: Box) -> str:
    """All that the table knows of one system, with the version and the file of this environment, as HTML."""
    version = installation.version(box.distribution) if box.distribution else f"{box.tested}, read and not installed"
    rows = {
        "role": escape(box.role),
        "enters": escape(box.enters),
        "consumes": escape(box.consumes),
        "produces": escape(box.produces),
        "proof": f"<code>{box.module}.{box.object}</code>, {'an' if box.kind[0] in 'aeiou' else 'a'} {escape(box.kind)}",
        "version": escape(version or "not installed"),
        "imported from": f"<code>{escape(home(box))}</code>",
        "repository": escape(box.repository),
        "lessons": escape(box.shown_in),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    return f"<b>{escape(box.name)}</b> ({box.layer})<dl>{lines}</dl>"


def browse() -> Widget:
    """The diagram as buttons: a click shows the card of a system.  In a static page the first card stays."""
    import ipywidgets

    known = {box.name: box for box in boxes()}
    shown = ipywidgets.HTML(_STYLE + f'<div class="stack-card">{card(next(iter(known.values())))}</div>')

    def choose(button: ipywidgets.Button) -> None:
        colour = _LAYER_COLOURS[known[button.description].layer]
        shown.value = (
            f'{_STYLE}<div class="stack-card" style="border-color: {colour}">{card(known[button.description])}</div>'
        )
        for other in buttons:
            other.style.font_weight = "bold" if other is button else "normal"

    buttons, parts = [], []
    for name, box in known.items():
        column, row = _PLACES[name]
        button = ipywidgets.Button(description=name, tooltip=_hover(box), style={"font_size": "12px"})
        button.layout = ipywidgets.Layout(width="auto", height="48px", border=f"2px solid {_LAYER_COLOURS[box.layer]}")
        button.layout.padding = "0"
        button.layout.grid_area = f"{2 * row + 1} / {2 * column + 1}"
        button.on_click(choose)
        buttons.append(button)
    for start, end, what in flows():
        (x0, y0), (x1, y1) = _PLACES[start], _PLACES[end]
        sign = "&rarr;" if y0 == y1 else "&darr;" if x0 == x1 else "&#8627;"
        arrow = ipywidgets.HTML(f'<div style="text-align: center; line-height: 1.2">{escape(what)}<br>{sign}</div>')
        # Between its boxes; an arrow around a corner stands below its start and beside its end.
        corner = x0 != x1 and y0 != y1
        row, column = (2 * y1 + 1, 2 * x0 + 1) if corner else (y0 + y1 + 1, x0 + x1 + 1)
        area = f"{row} / {column} / span 1 / span {2 if corner else 1}"
        arrow.layout = ipywidgets.Layout(grid_area=area, align_self="center")
        parts.append(arrow)
    columns = " ".join(["minmax(112px, 1fr)", "60px"] * 3 + ["minmax(112px, 1fr)"])
    layout = ipywidgets.Layout(grid_template_columns=columns, grid_gap="4px", max_width="860px")
    return ipywidgets.VBox([ipywidgets.GridBox([*buttons, *parts], layout=layout), shown])


def _anchor(box: Box) -> str:
    return "system-" + box.name.lower().replace(" ", "-")


def _hover(box: Box) -> str:
    return f"{box.role} It takes {box.consumes} and gives {box.produces}."


def _corner(name: str) -> tuple[int, int]:
    column, row = _PLACES[name]
    return _EDGE + column * _STEP_X, _EDGE + row * _STEP_Y


def _arrows(wide: int, high: int) -> str:
    """The arrows and what flows along them, as an SVG below the links."""
    drawn = []
    for start, end, what in flows():
        (x0, y0), (x1, y1) = _corner(start), _corner(end)
        middle = y1 + _HEIGHT / 2
        if y0 == y1:
            path, at, align = f"M{x0 + _WIDTH} {middle} H{x1 - 3}", ((x0 + _WIDTH + x1) / 2, middle - 6), "middle"
        elif x0 == x1:
            path = f"M{x0 + _WIDTH / 2} {y0 + _HEIGHT} V{y1 - 3}"
            at, align = (x0 + _WIDTH / 2 + 8, (y0 + _HEIGHT + y1) / 2 + 4), "start"
        else:
            path = f"M{x0 + _WIDTH / 2} {y0 + _HEIGHT} V{middle} H{x1 - 3}"
            at, align = (x0 + _WIDTH / 2 + 8, middle - 6), "start"
        words = what.split(" and ", 1) if y0 == y1 else [what]  # a short arrow has room for a short line
        lines = [words[0], *(f"and {word}" for word in words[1:])]
        rise = 14 * (len(lines) - 1)
        spans = "".join(
            f'<tspan x="{at[0]}" y="{at[1] - rise + 14 * number}">{escape(line)}</tspan>'
            for number, line in enumerate(lines)
        )
        drawn.append(f'<path d="{path}" marker-end="url(#stack-map-head)"/><text text-anchor="{align}">{spans}</text>')
    head = (
        '<defs><marker id="stack-map-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{plots.INK}"/></marker></defs>'
    )
    return (
        f'<svg width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" aria-hidden="true" fill="none" '
        f'stroke="{plots.INK}" stroke-width="1.5"><style>.stack-map text {{ fill: currentColor; stroke: none; '
        f"font-size: 10.5px; }}</style>{head}{''.join(drawn)}</svg>"
    )

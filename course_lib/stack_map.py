"""The map of NVIDIA's stack: six systems, what each takes and gives, and one object that proves its role.

Everything is drawn from `data/stack.json`; versions and files come from what is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import installation, plots

if TYPE_CHECKING:
    import pandas as pd
    from ipywidgets import Widget
    from matplotlib.axes import Axes

__all__ = ["Box", "Proof", "Question", "boxes", "browse", "draw", "flows", "prove", "questions", "table"]

_DATA = Path(__file__).resolve().parent.parent / "data" / "stack.json"
_LIMIT_S = 180
# Left to right as work flows, top to bottom as calls go: column and row of each box, in units of one box.
_PLACES = {
    "NeMo Curator": (0, 1),
    "Nemotron": (1, 1),
    "NeMo Run": (2, 0),
    "Megatron-Bridge": (2, 1),
    "NeMo AutoModel": (2, 2),
    "Megatron Core": (3, 1),
}
_LAYER_COLOURS = {
    "data": plots.COLOURS["green"],
    "blueprint": plots.COLOURS["blue"],
    "orchestration": plots.COLOURS["purple"],
    "engine": plots.COLOURS["vermilion"],
    "machinery": plots.INK,
}


@dataclass(frozen=True)
class Box:
    """One system of the stack, as `data/stack.json` describes it.

    Attributes:
        name: What people call it.
        layer: data, blueprint, orchestration, engine or machinery.
        role: What it does, in a sentence.
        distribution: The installed package, None for a repository that is not one.
        tested: The version that the course was written against.
        module: Where the object is imported from.
        object: The object that proves the role.
        kind: What sort of object it is.
        consumes: What it takes.
        produces: What it gives.
        isolated: Whether it must be imported in a process of its own, because it does not accept stand-ins.
        enters: At which moment of a project it enters.
        repository: Owner and name on GitHub.
        shown_in: Lessons that use it.
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


def boxes(*, path: Path = _DATA) -> tuple[Box, ...]:
    """The six systems.

    >>> [box.name for box in boxes() if box.layer == "machinery"]
    ['Megatron Core']
    """
    return tuple(Box(**row) for row in _read(path)["boxes"])


def questions(*, path: Path = _DATA) -> tuple[Question, ...]:
    """The exercise "which repository do I open?"."""
    return tuple(Question(**row) for row in _read(path)["questions"])


def flows(*, path: Path = _DATA) -> tuple[tuple[str, str, str], ...]:
    """What goes from which system to which: (from, to, what)."""
    return tuple((start, end, what) for start, end, what in _read(path)["flows"])


def table(shown: Sequence[Box] | None = None) -> pd.DataFrame:
    """One row a system with the version and the file that this environment has."""
    import pandas as pd

    rows = []
    for box in boxes() if shown is None else shown:
        version = installation.version(box.distribution) if box.distribution else f"{box.tested} (read, not installed)"
        rows.append((box.name, box.layer, box.role, box.consumes, box.produces, version or "not installed", _home(box)))
    return pd.DataFrame(rows, columns=["system", "layer", "role", "consumes", "produces", "version", "imported from"])


def prove(box: Box) -> Proof:
    """Import the object that proves a role.

    Args:
        box: One system.

    Returns:
        What was found.

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


def draw(*, ax: Axes, selected: str = "") -> Axes:
    """Draw the map from the table.

    Args:
        ax: Where to draw.
        selected: Name of the system to emphasise.

    Returns:
        The axis.
    """
    width, height = 0.64, 0.5
    for start, end, what in flows():
        (x0, y0), (x1, y1) = _PLACES[start], _PLACES[end]
        if y0 == y1:
            tail, head, at, align = (x0 + width / 2, y0), (x1 - width / 2, y1), ((x0 + x1) / 2, y0 - 0.04), "center"
        elif x0 == x1:
            tail, head, at, align = (x0, y0 + height / 2), (x1, y1 - height / 2), (x0 + 0.05, (y0 + y1) / 2), "left"
        else:
            tail, head, at, align = (x0, y0 + height / 2), (x1 - width / 2, y1), (x0 + 0.05, y1 - 0.4), "left"
        arrow = {"arrowstyle": "-|>", "color": plots.INK, "shrinkA": 3, "shrinkB": 3}
        if align == "left" and x0 != x1:
            arrow["connectionstyle"] = "angle,angleA=90,angleB=0,rad=6"
        ax.annotate("", head, tail, arrowprops=arrow)
        lines = what.replace(" and ", "\nand ")
        ax.text(*at, lines, ha=align, va="bottom" if y0 == y1 else "center", fontsize=8.5)
    for box in boxes():
        x, y = _PLACES[box.name]
        colour = _LAYER_COLOURS[box.layer]
        line = {"linewidth": 4 if box.name == selected else 1.8, "edgecolor": colour, "facecolor": "none"}
        ax.add_patch(_rectangle((x - width / 2, y - height / 2), width, height, **line))
        ax.text(x, y - 0.06, box.name, ha="center", va="center", fontweight="bold", fontsize=9.5)
        ax.text(x, y + 0.12, box.layer, ha="center", va="center", fontsize=8.5, color=colour)
    ax.set_xlim(-0.5, 3.5)
    ax.set_ylim(2.4, -0.4)
    ax.set_axis_off()
    ax.set_label("Arrows: " + "; ".join(f"{start} to {end}: {what}" for start, end, what in flows()))
    return ax


def browse() -> Widget:
    """A row of buttons, one a system; the choice shows its card.  In a static page the first card stays."""
    import ipywidgets

    known = {box.name: box for box in boxes()}
    choice = ipywidgets.ToggleButtons(options=list(known), description="System")
    card = ipywidgets.HTML(_card(known[choice.value]))
    choice.observe(lambda change: setattr(card, "value", _card(known[change["new"]])), names="value")
    return ipywidgets.VBox([choice, card])


def _card(box: Box) -> str:
    rows = {
        "role": box.role,
        "enters": box.enters,
        "consumes": box.consumes,
        "produces": box.produces,
        "proof": f"<code>{box.module}.{box.object}</code>, a {box.kind}",
        "imported from": f"<code>{_home(box)}</code>",
        "repository": box.repository,
        "lessons": box.shown_in,
    }
    return f"<b>{box.name}</b><table>{''.join(f'<tr><td>{k}</td><td>{v}</td></tr>' for k, v in rows.items())}</table>"


def _home(box: Box) -> str:
    """The file of the top package, found without importing it."""
    module = installation.PACKAGES.get(box.distribution or "", "course_lib")
    return _short(str(next(iter(installation.places(module)), "not installed")))


def _in_a_child(box: Box) -> tuple[str, str]:
    code = (
        f"import importlib, inspect; found = getattr(importlib.import_module({box.module!r}), {box.object!r}); "
        "print('proof:', type(found).__name__, inspect.getsourcefile(found))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=_LIMIT_S
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("proof: ")), None)
    if line is None:
        raise ImportError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer")
    _, kind, file = line.split(" ", 2)
    return kind, _short(file)


def _short(file: str | None) -> str:
    """A path below site-packages or the project, as it is the same on every machine."""
    text = str(file)
    project = str(_DATA.parent.parent) + "/"
    return text.split("site-packages/")[-1].removeprefix(project)


def _rectangle(corner: tuple[float, float], width: float, height: float, **line: Any) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", **line)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

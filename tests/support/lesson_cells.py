"""Cells of lessons, executed one at a time with stand-ins for what the lesson had made by then, and their claims."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from course_lib.common import units
from course_lib.lesson import checks, notebooks
from support import notebook_cells


def cells(number: str) -> dict[str, tuple[str, list[str]]]:
    """Source and tags of each code cell of a lesson by id."""
    notebook = json.loads(notebooks.find(number).read_text(encoding="utf-8"))
    code = notebook_cells.of_kind(notebook, "code")
    return {cell["id"]: (notebook_cells.source(cell), notebook_cells.tags(cell)) for cell in code}


def tagged(number: str, tag: str) -> set[str]:
    """The ids of a lesson's code cells with a tag."""
    return {name for name, (_, tags) in cells(number).items() if tag in tags}


def standard_modules(number: str) -> dict[str, ModuleType]:
    """What the lesson imports of Python's own library as whole modules, by name."""
    source = next(text for text, tags in cells(number).values() if "imports" in tags)
    aliases = [alias for node in ast.parse(source).body if isinstance(node, ast.Import) for alias in node.names]
    own = [alias for alias in aliases if alias.name in sys.stdlib_module_names]
    return {alias.asname or alias.name: importlib.import_module(alias.name) for alias in own}


def execute(number: str, name: str, things: dict[str, Any], change: tuple[str, str] | None = None) -> None:
    """Execute one cell of a lesson; it sees these things, `checks`, and what the lesson imports of Python's own library.

    Args:
        number: The lesson's number.
        name: The cell's id.
        things: What the cell finds, by name; a stand-in for `checks` may be among them.
        change: A text that stands once in the cell, and what a learner may have typed instead.
    """
    source = cells(number)[name][0]
    if change is not None:
        assert source.count(change[0]) == 1, f"the cell no longer says {change[0]!r}"
        source = source.replace(*change)
    code = compile(source, f"lesson {number}, cell {name}", "exec", dont_inherit=True)
    exec(code, {"checks": checks, **standard_modules(number), **things})


class Sample:
    """What `train[n]` is in lessons 04 and 08: ids in a row and their labels."""

    def __init__(self, labels: Callable[[np.ndarray], np.ndarray]) -> None:
        ids = np.arange(17)
        self.sample = {"tokens": ids[:-1], "labels": labels(ids[1:])}

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.sample


class Verdicts:
    """Stands for `checks`: notes what each claim found instead of stopping at the first that does not hold."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def claim(self, condition: object, message: str, *, otherwise: str = "") -> None:
        self.found.append(bool(condition))

    def close(self, measured: float, expected: float, *, rtol: float = 0.0, atol: float = 0.0, **_: str) -> None:
        self.found.append(abs(measured - expected) <= max(atol, rtol * abs(expected)))

    def measured(self, *_: object, **__: object) -> None:
        pass

    publish = measured

    @contextlib.contextmanager
    def expect_error(self, kind: type[Exception], *, contains: str = "") -> Iterator[None]:
        try:
            yield
            self.found.append(False)
        except kind as error:
            self.found.append(contains in str(error))


def verdicts(number: str, name: str, facts: Mapping[str, Any]) -> list[bool]:
    """What each claim of a cell finds."""
    noted = Verdicts()
    execute(number, name, {"checks": noted, "units": units, **facts})
    return noted.found


def falsify(number: str, name: str, facts: Mapping[str, Any], wrong: Iterable[Mapping[str, Any]]) -> None:
    """All claims of a cell hold on right facts, each of them fails on one of the wrong ones, and no wrong one passes.

    Args:
        number: The lesson's number.
        name: The cell's id.
        facts: What the cell finds, by name.
        wrong: Each time, the facts that are not as they should be.
    """
    right = verdicts(number, name, facts)
    assert right and all(right), f"claims that do not hold on right facts: {right}"
    found = [verdicts(number, name, {**facts, **change}) for change in wrong]
    failed = {claim for one in found for claim, holds in enumerate(one) if not holds}
    assert failed == set(range(len(right))), f"claims that nothing makes fail: {set(range(len(right))) - failed}"
    assert not any(map(all, found)), f"wrong facts on which all claims hold: {[all(one) for one in found]}"


def proving(number: str) -> set[str]:
    """The cells of a lesson that prove something."""
    return {name for name, (source, tags) in cells(number).items() if "check" in tags or "checks.close(" in source}


def tells(number: str, name: str, facts: Mapping[str, Any], words: str) -> None:
    """A cell raises a claim that says these words."""
    with pytest.raises(checks.ClaimFailed, match=re.escape(words)):
        execute(number, name, facts)


def predicted(number: str, names: Iterable[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger of the test's own, in which a lesson has predicted everything that its cells measure."""
    monkeypatch.setenv("COURSE_LEDGER", str(folder / "ledger.json"))
    for name in names:
        checks.predict(number, name, 1.0, "unit")


def gives(value: Any) -> Callable[..., Any]:
    """A function of anything that returns a value."""
    return lambda *_, **__: value

"""A redirection replaces what it names, or says why it cannot, and nothing is ever half applied."""

from __future__ import annotations

import sys
import types

import pytest

from course_lib.stack import redirection
from course_lib.stack.redirection import Misfit, Redirection


@pytest.fixture
def victim(monkeypatch):
    """A module with a function, a class and a value to redirect."""
    module = types.ModuleType("victim")

    def function(a, b=1, *, c=2):
        return "original"

    class Holder:
        def method(self, device):
            return device

    module.function, module.Holder, module.value = function, Holder, 7
    monkeypatch.setitem(sys.modules, "victim", module)
    return module


def test_a_redirection_replaces_functions_methods_and_values(victim):
    """Each kind of target is found by its dotted name and replaced with what the original was turned into."""
    redirection.apply(
        [
            Redirection("victim.function", lambda f: lambda: f(1) + "!", "", "", ("a", "b", "c")),
            Redirection("victim.Holder.method", lambda _: lambda self, device: "cpu", "", "", ("self", "device")),
            Redirection("victim.value", lambda v: v + 1, "", ""),
        ]
    )
    assert (victim.function(), victim.Holder().method("cuda"), victim.value) == ("original!", "cpu", 8)


def test_all_misfits_are_named_at_once_and_nothing_is_applied(victim):
    """When upstream moved, the message names every redirection that no longer fits, and why; none is half applied."""
    rows = [
        Redirection("victim.value", lambda _: "changed", "", ""),
        Redirection("victim.gone", lambda _: None, "", ""),
        Redirection("victim.Holder.gone", lambda _: None, "", ""),
        Redirection("victim.Gone.method", lambda _: None, "", ""),
        Redirection("no_such_package.name", lambda _: None, "", ""),
        Redirection("victim.function", lambda _: None, "", "", ("a", "device")),
    ]
    with pytest.raises(Misfit) as caught:
        redirection.apply(rows)
    text = str(caught.value)
    for row in rows[1:]:
        assert row.target in text
    assert "['device']" in text and "'a', 'b', 'c'" in text
    assert victim.value == 7


def test_a_missing_dependency_is_named(tmp_path, monkeypatch):
    """A module that exists but cannot be imported is no missing module: what it lacks is named."""
    (tmp_path / "needy.py").write_text("import no_such_kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Misfit, match="needy.function: importing it needs 'no_such_kernels'"):
        redirection.locate("needy.function")
    with pytest.raises(Misfit, match="no module 'nowhere'"):
        redirection.locate("nowhere.at.all")


def test_a_replacement_that_fails_leaves_everything_as_it_was(victim):
    """Replacements are all made before the first one is put in place."""

    def fail(_: object) -> None:
        raise ValueError("cannot be made")

    rows = [Redirection("victim.value", lambda _: "changed", "", ""), Redirection("victim.function", fail, "", "")]
    with pytest.raises(ValueError, match="cannot be made"):
        redirection.apply(rows)
    assert victim.value == 7


def test_the_parameters_of_wrapped_functions_are_those_of_the_innermost(victim):
    """Upstream decorates many functions; the check must look through functools.wraps."""
    import functools

    inner = victim.function
    victim.function = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    redirection.apply([Redirection("victim.function", lambda f: f, "", "", ("a", "c"))])
    with pytest.raises(Misfit):
        redirection.apply([Redirection("victim.function", lambda f: f, "", "", ("args",))])

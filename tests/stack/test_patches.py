"""A patch replaces what it names, or says why it cannot, and nothing is ever half applied."""

from __future__ import annotations

import sys
import types

import pytest

from course_lib.stack import patches
from course_lib.stack.patches import Misfit, Patch, Patches


@pytest.fixture
def victim(monkeypatch):
    """A module with a function, a class, one derived from it, and a value to replace."""
    module = types.ModuleType("victim")

    def function(a, b=1, *, c=2):
        return "original"

    class Holder:
        def method(self, device):
            return device

        @classmethod
        def of(cls, x):
            return cls.__name__, x

        @staticmethod
        def plain(x):
            return x

    class Child(Holder):
        pass

    module.function, module.Holder, module.Child, module.value = function, Holder, Child, 7
    monkeypatch.setitem(sys.modules, "victim", module)
    monkeypatch.setattr(patches, "_for_good", set())
    return module


@pytest.fixture
def every_kind():
    """A patch for each kind of target; the class method's is set on the derived class, which has it by inheritance."""
    mine = Patches()
    mine.makes("victim.value", why="")(lambda value: value + 1)

    @mine.replaces("victim.function", why="because")
    def function(original, a, b=1, *, c=2):
        """Says it louder."""
        return original(a, b, c=c) + "!"

    @mine.replaces("victim.Holder.method", why="")
    def method(original, self, device):
        return original(self, f"not {device}")

    @mine.replaces("victim.Child.of", why="")
    def of(original, cls, x):
        return original(cls, x + 1)

    @mine.replaces("victim.Holder.plain", why="")
    def plain(original, x):
        return original(x) * 2

    return mine


def seen(victim) -> tuple:
    """What the module's parts give."""
    held = victim.Holder()
    return (
        victim.function(1),
        held.method("cuda"),
        victim.Child.of(1),
        held.plain(2),
        victim.Holder.plain(2),
        victim.value,
    )


BEFORE = ("original", "cuda", ("Child", 1), 2, 2, 7)
AFTER = ("original!", "not cuda", ("Child", 2), 4, 4, 8)


def test_every_kind_of_target_is_replaced(victim, every_kind):
    """Functions, methods, class and static methods, and values are found by their dotted names."""
    assert seen(victim) == BEFORE
    patches.apply(every_kind)
    assert seen(victim) == AFTER and victim.Holder.of(1) == ("Holder", 1)
    assert victim.function.__name__ == "function"
    row = next(patch for patch in every_kind if patch.target == "victim.function")
    assert (row.becomes, row.why, row.parameters, row.options) == ("Says it louder.", "because", ("a", "b"), ("c",))


def test_a_block_leaves_everything_as_it_was(victim, every_kind):
    """Each part lies where it lay, of its own kind, and what a class inherited it inherits again; blocks nest."""
    before = dict(vars(victim.Holder))
    with pytest.raises(RuntimeError, match="inside"), patches.applied(every_kind):
        assert seen(victim) == AFTER
        with patches.applied(every_kind):
            assert victim.function(1) == "original!!" and victim.value == 9
        assert seen(victim) == AFTER
        raise RuntimeError("inside")
    assert seen(victim) == BEFORE
    assert dict(vars(victim.Holder)) == before and "of" not in vars(victim.Child)


def test_a_target_occurs_once(victim, every_kind):
    """A second patch of a name is refused, in one list and after it was patched for good; a block may stand on top."""
    again = Patches()
    again.sets(0, "victim.value", "victim.value", why="")
    with pytest.raises(Misfit, match="victim.value: patched twice"), patches.applied(again):
        pass
    patches.apply(every_kind)
    with pytest.raises(Misfit, match="victim.value: patched twice"):
        patches.apply(again[:1])
    with patches.applied(again[:1]):
        assert victim.value == 0
    assert seen(victim) == AFTER


def test_a_late_patch_waits_for_its_module(victim, tmp_path, monkeypatch):
    """Nobody imports the module for it; once somebody does, another target's own module too, the name is replaced."""
    from course_lib.stack import lazy

    monkeypatch.setattr(sys, "meta_path", [lazy._Finder(()), *sys.meta_path])
    for name in ("slow", "eager"):
        (tmp_path / f"{name}.py").write_text("value = 1\n")
    (tmp_path / "importer.py").write_text("import eager\nvalue = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = Patches()
    for name in ("slow", "eager"):
        mine.sets(2, f"{name}.value", why="", late=name)
    mine.sets(2, "importer.value", why="")
    with patches.applied(mine[:2]):
        assert not {"slow", "eager"} & set(sys.modules)
    patches.apply(mine)
    assert "slow" not in sys.modules
    import eager
    import slow

    assert (eager.value, slow.value) == (2, 2)
    with pytest.raises(Misfit, match="slow.value: patched twice"):
        patches.apply(mine[:1])


def test_late_patches_of_one_module_cost_one_look(victim, tmp_path, monkeypatch):
    """After patches are put in place every function there is is looked through, so those of one module go together."""
    from course_lib.stack import lazy

    monkeypatch.setattr(sys, "meta_path", [lazy._Finder(()), *sys.meta_path])
    (tmp_path / "three_values.py").write_text("one = two = three = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    looks, mine = [], Patches()
    monkeypatch.setattr(patches, "_replace_defaults", looks.append)
    for name in ("one", "two", "three"):
        mine.sets(2, f"three_values.{name}", why="", late="three_values")
    patches.apply(mine)
    import three_values

    assert (three_values.one, three_values.two, three_values.three) == (2, 2, 2)
    assert len(looks) == 2, "one for those that need not wait, one for the module"


def test_all_misfits_are_named_at_once_and_nothing_is_applied(victim):
    """When upstream moved, the message names every patch that no longer fits, and why; none is half applied."""
    rows = [
        Patch("victim.value", lambda _: "changed", "", ""),
        Patch("victim.gone", lambda _: None, "", ""),
        Patch("victim.Holder.gone", lambda _: None, "", ""),
        Patch("victim.Gone.method", lambda _: None, "", ""),
        Patch("no_such_package.name", lambda _: None, "", ""),
        Patch("victim.function", lambda _: None, "", "", ("a", "device")),
        Patch("victim.Holder.method", lambda _: None, "", "", ("device", "self")),
        Patch("victim.Holder.of", lambda _: None, "", "", (), ("y",)),
    ]
    with pytest.raises(Misfit) as caught:
        patches.apply(rows)
    text = str(caught.value)
    for row in rows[1:]:
        assert row.target in text
    assert "['device']" in text and "'a', 'b', 'c'" in text and "the order ['device', 'self']" in text
    assert victim.value == 7


def test_parameters_of_ones_own_are_not_compared(victim):
    """What stands before a slash, and stars, may have any name; a function without a signature has none to compare."""
    mine = Patches()

    @mine.replaces("victim.function", why="")
    def function(original, mine, /, *others, **options):
        return "mine"

    with patches.applied(mine):
        assert victim.function(0) == "mine"
    victim.function = iter  # built in, with two forms of call
    mine = Patches()
    mine.replaces("victim.function", why="")(lambda original, thing: thing)
    with pytest.raises(Misfit, match="victim.function: upstream has no signature"):
        patches.apply(mine)


def test_a_missing_dependency_is_named(tmp_path, monkeypatch):
    """A module that exists but cannot be imported is no missing module: what it lacks is named."""
    (tmp_path / "needy.py").write_text("import no_such_kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Misfit, match="needy.function: importing it needs 'no_such_kernels'"):
        patches.locate("needy.function")
    with pytest.raises(Misfit, match="no module 'nowhere'"):
        patches.locate("nowhere.at.all")


def test_a_replacement_that_fails_leaves_everything_as_it_was(victim):
    """Replacements are all made before the first one is put in place."""

    def fail(_: object) -> None:
        raise ValueError("cannot be made")

    rows = [Patch("victim.value", lambda _: "changed", "", ""), Patch("victim.function", fail, "", "")]
    with pytest.raises(ValueError, match="cannot be made"):
        patches.apply(rows)
    assert victim.value == 7
    with pytest.raises(Misfit):  # it was not taken for applied either
        patches.apply([*rows[:1], *rows[:1]])
    patches.apply(rows[:1])
    assert victim.value == "changed"


def test_the_parameters_of_wrapped_functions_are_those_of_the_innermost(victim):
    """Upstream decorates many functions; the check must look through functools.wraps."""
    import functools

    inner = victim.function
    victim.function = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    with patches.applied([Patch("victim.function", lambda f: f, "", "", ("a", "c"))]):
        pass
    with pytest.raises(Misfit), patches.applied([Patch("victim.function", lambda f: f, "", "", ("args",))]):
        pass

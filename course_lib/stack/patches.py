"""One way to change what an upstream package does: for good, as in a rank, or inside a block.

All patches of a list are checked before the first one is put in place, so an upgrade names everything that moved at once,
and nothing is ever half applied.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from course_lib.stack.lazy import after

_for_good: set[str] = set()
"""Targets of `apply` in this process."""
_absent = object()


class Misfit(RuntimeError):
    """Patches that do not fit the installed packages, or each other."""


@dataclass(frozen=True)
class Patch:
    """One upstream name that means something else.

    Attributes:
        target: Dotted name, such as `torch.cuda.synchronize`.
        make: Takes the original and returns what stands in its place; of a class method it takes the function.
        parameters: Names that the original's parameters must have, in this order.
        options: Names that they must have in any order.
        late: A module that is not imported for this: the name is replaced once somebody else imports it.
    """

    target: str
    make: Callable[[Any], Any]
    becomes: str
    why: str
    parameters: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    late: str = ""


class Patches(list[Patch]):
    """Patches that are declared together, each with what it does instead."""

    def replaces(self, *targets: str, why: str, late: str = "") -> Callable[[Callable], Callable]:
        """Decorator: the function is called in place of each target, with the original as its first argument.

        Every parameter that it names must exist upstream under that name, save those before a `/`.
        """

        def declare(function: Callable) -> Callable:
            named = list(inspect.signature(function).parameters.values())[1:]
            parameters = tuple(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)
            options = tuple(p.name for p in named if p.kind is p.KEYWORD_ONLY)
            make, becomes = functools.partial(_call, function), _first_line(function)
            self.extend(Patch(target, make, becomes, why, parameters, options, late) for target in targets)
            return function

        return declare

    def makes(self, *targets: str, why: str, becomes: str = "", late: str = "") -> Callable[[Callable], Callable]:
        """Decorator: the function takes the original once and returns what stands in its place."""

        def declare(make: Callable) -> Callable:
            self.extend(Patch(target, make, becomes or _first_line(make), why, late=late) for target in targets)
            return make

        return declare

    def sets(self, value: Any, *targets: str, why: str, becomes: str = "", late: str = "") -> None:
        """Put one and the same object in place of each target."""
        self.makes(*targets, why=why, becomes=becomes or repr(value), late=late)(lambda _: value)


def _call(function: Callable, original: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return functools.update_wrapper(call, original, updated=())


def _first_line(function: Callable) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def locate(target: str) -> tuple[Any, str]:
    """The module or class that holds a dotted name, whose longest importable prefix is imported, and the last part.

    Raises:
        Misfit: If a part of the name does not exist.

    Example:
        >>> locate("os.path.join")[1]
        'join'
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if not f"{target}.".startswith(f"{error.name}."):  # the module is there, something that it imports is not
                raise Misfit(f"{target}: importing it needs {error.name!r}, which is not installed") from error
            continue
        for part in parts[cut:]:
            if not hasattr(thing, part):
                raise Misfit(f"{target}: {part!r} does not exist")
            owner, thing = thing, getattr(thing, part)
        return owner, parts[-1]
    raise Misfit(f"{target}: no module {parts[0]!r}")


def apply(patches: Iterable[Patch]) -> None:
    """Put patches in place for the rest of this process.

    Raises:
        Misfit: Naming every patch that does not fit.  Nothing is replaced then.
    """
    made, later = _made(patches, _for_good)
    replacements = {id(old): new for owner, name, new in made if callable(old := getattr(owner, name))}
    for owner, name, new in made:
        setattr(owner, name, new)
    _replace_defaults(replacements)
    for module in dict.fromkeys(patch.late for patch in later):
        waiting = [patch for patch in later if patch.late == module]
        if module in sys.modules:  # another target's module has imported it meanwhile
            _apply_late(waiting, None)
        else:
            after(module, functools.partial(_apply_late, waiting))


def _apply_late(patches: list[Patch], _: object) -> None:
    """Apply what waited for one module, all at once: each `apply` looks through every function that there is."""
    _for_good.difference_update(patch.target for patch in patches)
    apply([replace(patch, late="") for patch in patches])


@contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Put patches in place inside a block, over what stands there for good; late ones whose module is absent stay out.

    Raises:
        Misfit: As `apply`.
    """
    made, _ = _made(patches, set())
    # as it lies there: getattr would give a method of C++ or of a class without its binding
    before = [(owner, name, vars(owner).get(name, _absent)) for owner, name, _ in made]
    try:
        for owner, name, new in made:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in before:
            delattr(owner, name) if old is _absent else setattr(owner, name, old)


def _made(patches: Iterable[Patch], taken: set[str]) -> tuple[list[tuple[Any, str, Any]], list[Patch]]:
    """Owner, name and replacement of each patch, and those that wait for their module; `taken` gets their targets.

    All replacements are made before the first is put in place.
    """
    fitting, later, misfits, targets = [], [], [], set()
    for patch in patches:
        try:
            if patch.target in taken or patch.target in targets:
                raise Misfit(f"{patch.target}: patched twice; write one function that does both")
            targets.add(patch.target)
            if patch.late and patch.late not in sys.modules:
                later.append(patch)
                continue
            owner, name = locate(patch.target)
            _check_parameters(patch, getattr(owner, name))
            fitting.append((owner, name, patch))
        except Misfit as misfit:
            misfits.append(str(misfit))
    if misfits:
        raise Misfit("these patches do not fit the installed packages:\n  " + "\n  ".join(misfits))
    made = [(owner, name, _replacement(owner, name, patch)) for owner, name, patch in fitting]
    taken |= targets
    return made, later


def _replacement(owner: Any, name: str, patch: Patch) -> Any:
    held = inspect.getattr_static(owner, name) if isinstance(owner, type) else None
    new = patch.make(held.__func__ if isinstance(held, classmethod) else getattr(owner, name))
    wrapped = isinstance(held, (classmethod, staticmethod)) and isinstance(new, FunctionType)
    return type(held)(new) if wrapped else new


def _check_parameters(patch: Patch, original: Any) -> None:
    expected = [*patch.parameters, *patch.options]
    if not expected:
        return
    try:
        found = list(inspect.signature(getattr(original, "__func__", original)).parameters)
    except ValueError:
        raise Misfit(f"{patch.target}: upstream has no signature that could be compared") from None
    absent = [name for name in expected if name not in found]
    if absent or [name for name in found if name in patch.parameters] != list(patch.parameters):
        what = f"parameters {absent}" if absent else f"the order {list(patch.parameters)}"
        raise Misfit(f"{patch.target}: expected {what}, upstream now has {found}")


def _replace_defaults(replacements: dict[int, Any]) -> None:
    """Give Megatron's functions the replacement where a default value was taken from the original when they were defined."""
    if "megatron.core" not in sys.modules:
        return
    functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType and thing.__defaults__]
    for function in functions:
        if (function.__module__ or "").startswith("megatron.") and replacements.keys() & set(
            map(id, function.__defaults__)
        ):
            function.__defaults__ = tuple(replacements.get(id(value), value) for value in function.__defaults__)

"""What a redirection is, and how a list of them is applied."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import FunctionType

from course_lib.stack import lazy

__all__ = ["Misfit", "Redirection", "apply", "locate"]


class Misfit(RuntimeError):
    """A redirection no longer fits the installed packages."""


@dataclass(frozen=True)
class Redirection:
    """One name that means something else in a CPU rank.

    Attributes:
        target: Dotted name of what is replaced, such as `torch.cuda.synchronize`.
        replace: Takes the original object and returns the new one.
        becomes: The effect in a few words.
        reason: Why a CPU rank needs it.
        parameters: Names of the parameters that the original must have, checked before replacing; `None` for objects
            whose signature cannot be read or does not matter.
        late: The module of the target belongs to one family of models: it is not imported for this, and its name is
            replaced once somebody else imports it.
    """

    target: str
    replace: Callable[[object], object]
    becomes: str
    reason: str
    parameters: tuple[str, ...] | None = None
    late: bool = False


def locate(target: str) -> tuple[object, str]:
    """The object that holds a dotted name, and the name's last part.

    Args:
        target: Dotted name; its longest importable prefix is imported.

    Returns:
        The owner (module or class) and the attribute's name.

    Raises:
        Misfit: If a part of the name does not exist.

    Example:
        >>> locate("os.path.join")[1]
        'join'
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if not f"{target}.".startswith(
                f"{error.name}."
            ):  # the module is there, and something that it imports is not
                raise Misfit(f"{target}: importing it needs {error.name!r}, which is not installed") from error
            continue
        for part in parts[cut:-1]:
            if not hasattr(owner, part):
                raise Misfit(f"{target}: {part!r} does not exist")
            owner = getattr(owner, part)
        if not hasattr(owner, parts[-1]):
            raise Misfit(f"{target}: {parts[-1]!r} does not exist")
        return owner, parts[-1]
    raise Misfit(f"{target}: no module {parts[0]!r}")


def apply(redirections: Iterable[Redirection]) -> None:
    """Check that every redirection fits, then put all of them in place.

    Args:
        redirections: What to replace; applied in order.

    Raises:
        Misfit: Naming every redirection that does not fit.  Nothing is replaced then.
    """
    ready, misfits = [], []
    for redirection in redirections:
        module = redirection.target.rpartition(".")[0]
        if redirection.late and module not in sys.modules:
            lazy.after(module, functools.partial(_apply_late, redirection))
            continue
        try:
            owner, name = locate(redirection.target)
            original = getattr(owner, name)
            _check_parameters(redirection, original)
            ready.append((owner, name, redirection, original))
        except Misfit as misfit:
            misfits.append(str(misfit))
    if misfits:
        raise Misfit("these redirections no longer fit the installed packages:\n  " + "\n  ".join(misfits))
    made: dict[tuple[int, str], tuple[object, object]] = {}
    for owner, name, redirection, original in ready:
        _, now = made.get(
            (id(owner), name), (owner, original)
        )  # a later redirection of the same name wraps the earlier
        made[id(owner), name] = owner, redirection.replace(now)
    for (_, name), (owner, replacement) in made.items():
        setattr(owner, name, replacement)
    _replace_defaults({id(before): made[id(owner), name][1] for owner, name, _, before in ready if callable(before)})


def _replace_defaults(replacements: dict[int, object]) -> None:
    """Give Megatron's functions the replacement where a default value was taken from the original when they were defined."""
    functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType and thing.__defaults__]
    for function in functions:
        if (function.__module__ or "").startswith("megatron.") and replacements.keys() & set(
            map(id, function.__defaults__)
        ):
            function.__defaults__ = tuple(replacements.get(id(value), value) for value in function.__defaults__)


def _apply_late(redirection: Redirection, _: object) -> None:
    apply([replace(redirection, late=False)])


def _check_parameters(redirection: Redirection, original: object) -> None:
    if redirection.parameters is None:
        return
    code = getattr(getattr(original, "__func__", original), "__code__", None)
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__
        code = getattr(original, "__code__", code)
    found = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
    absent = [name for name in redirection.parameters if name not in found]
    if absent:
        raise Misfit(f"{redirection.target}: expected parameters {absent}, upstream now has {list(found)}")

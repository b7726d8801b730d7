"""What a rank has imported.  This module imports nothing of the course, so that it adds nothing to that."""

import importlib
import sys


def modules(also: str | None) -> dict[str, str]:
    """Modules with a file by their names, after one more was imported if it is named."""
    if also:
        importlib.import_module(also)
    return {name: module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", None)}

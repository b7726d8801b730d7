"""Every recipe of the installed Megatron-Bridge, read from its source files without importing one.

A recipe's name says task, GPUs, generation and precision; its body sets the layout in plain assignments.  Reading both
takes a second for all of them, where importing them would take minutes.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import recipes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Entry", "entries", "table"]

_ROOT = "megatron.bridge.recipes"
# How a recipe asks for the shape of a model: AutoBridge with weights in mind, AutoConfig without.
_ASKS = ("from_hf_pretrained", "from_pretrained")
_TASKS = ("pretrain", "sft", "peft")
_SIZES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
}


@dataclass(frozen=True)
class Entry:
    """One recipe.

    Attributes:
        module: Where it is defined, below `megatron.bridge.recipes`.
        family: The folder, such as `llama`.
        task: `pretrain`, `sft`, `peft`, or empty where the name does not say.
        gpus: Number of GPUs in the name, None where the name does not say.
        hardware: GPU generation in the name, or empty.
        layout: Sizes that the body sets to a literal, such as `{"TP": 1, "EP": 8}`; others keep their default of 1.
        asks_hub_for: Model id whose shape the recipe asks from the Hub; None if the body holds the shape.
    """

    name: str
    module: str
    family: str
    task: str
    gpus: int | None
    hardware: str
    layout: dict[str, int]
    asks_hub_for: str | None

    @property
    def path(self) -> str:
        """`module:function`, as `census.count` takes it."""
        return f"{self.module}:{self.name}"


@functools.cache
def entries(*, directory: Path | None = None) -> tuple[Entry, ...]:
    """List the recipes, once for each folder.

    Args:
        directory: The folder `recipes` of a Megatron-Bridge; the installed one's if None.

    Returns:
        One entry a public function whose name ends in `_config`, by module and name.  Aliases are not repeated.

    Source: megatron-bridge 0.6.2 `recipes/`.
    """
    directory = directory or _installed()
    sources = {
        ".".join(path.relative_to(directory).with_suffix("").parts).removesuffix(".__init__"): _source(path, directory)
        for path in directory.rglob("*.py")
    }
    found = (entry for module in sources for entry in _read(module, sources))
    return tuple(sorted(found, key=lambda entry: (entry.module, entry.name)))


def table(*, directory: Path | None = None) -> pd.DataFrame:
    """The same as a frame, with a last column that says what stands in the way of building it offline."""
    import pandas as pd

    known = recipes.known_models()
    rows = [
        (
            entry.name,
            entry.family,
            entry.task,
            entry.gpus,
            entry.hardware,
            " ".join(f"{size}={value}" for size, value in entry.layout.items()),
            _shape(entry.asks_hub_for, known),
        )
        for entry in entries(directory=directory)
    ]
    frame = pd.DataFrame(rows, columns=["recipe", "family", "task", "GPUs", "hardware", "layout", "model shape"])
    return frame.astype({"GPUs": "Int64"})


def _shape(model_id: str | None, known: dict[str, recipes.ModelFacts]) -> str:
    if model_id is None:
        return "in the recipe or in one that it calls"
    return f"data/models/{known[model_id].path.name}" if model_id in known else f"wants config.json of {model_id}"


def _installed() -> Path:
    spec = importlib.util.find_spec("megatron")
    found = [Path(root, "bridge/recipes") for root in (spec.submodule_search_locations if spec else None) or ()]
    folder = next((path for path in found if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError("megatron-bridge is not installed here: run `make setup`")
    return folder


@dataclass(frozen=True)
class _Source:
    """What one file of recipes defines and imports."""

    functions: dict[str, ast.FunctionDef]
    constants: dict[str, Any]
    imports: dict[str, str]  # name -> module below `megatron.bridge.recipes`


def _source(path: Path, root: Path) -> _Source:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    folder = ".".join((_ROOT, *path.relative_to(root).parent.parts))
    imports = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), folder)
            if module.startswith(f"{_ROOT}."):
                imports |= {alias.asname or alias.name: module.removeprefix(f"{_ROOT}.") for alias in node.names}
    return _Source(functions, constants, imports)


def _read(module: str, sources: dict[str, _Source]) -> Iterator[Entry]:
    for name, function in sources[module].functions.items():
        if name.endswith("_config") and not name.startswith("_") and "." in module:
            gpus = re.search(r"_(\d+)gpu_([a-z0-9]+)", name)
            yield Entry(
                name=name,
                module=module,
                family=module.split(".")[0],
                task=next((task for task in _TASKS if f"_{task}_" in name), ""),
                gpus=int(gpus[1]) if gpus else None,
                hardware=gpus[2] if gpus else "",
                layout=dict(_layout(function)),
                asks_hub_for=_model_id(name, module, sources),
            )


def _layout(function: ast.FunctionDef) -> Iterator[tuple[str, int]]:
    """Literal sizes, given as an assignment or as an argument of the model; the last one wins, as at run time."""
    for node in ast.walk(function):
        names = [t.attr for t in node.targets if isinstance(t, ast.Attribute)] if isinstance(node, ast.Assign) else []
        names += [node.arg] if isinstance(node, ast.keyword) and node.arg else []
        value = getattr(node, "value", None)
        for name in names:
            if name in _SIZES and isinstance(value, ast.Constant) and isinstance(value.value, int):
                yield _SIZES[name], value.value


def _local(function: ast.FunctionDef) -> dict[str, Any]:
    """Literal defaults of arguments and literal assignments of a function."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    defaults = [*[None] * (len(function.args.args) - len(function.args.defaults)), *function.args.defaults]
    pairs = list(zip(arguments, [*defaults, *function.args.kw_defaults], strict=True))
    found = {argument.arg: value.value for argument, value in pairs if isinstance(value, ast.Constant)}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def _model_id(name: str, module: str, sources: dict[str, _Source], depth: int = 4) -> str | None:
    """The model whose configuration a function asks for, itself or through a recipe function that it calls."""
    source = sources.get(module)
    if source is None or not depth:
        return None
    if name not in source.functions:
        return _model_id(name, source.imports[name], sources, depth - 1) if name in source.imports else None
    function = source.functions[name]
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in _ASKS and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                return str(argument.value)
            values = {**source.constants, **_local(function)}
            return str(values.get(getattr(argument, "id", ""), ast.unparse(argument)))
        if isinstance(node.func, ast.Name):
            found = _model_id(node.func.id, module, sources, depth - 1)
            if found:
                return found
    return None

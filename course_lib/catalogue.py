"""Every recipe of the installed Megatron-Bridge, read from its source files without importing one.

A recipe's name says task, GPUs, generation and precision; its body sets the layout in plain assignments.  Reading both
takes a second for all of them, where importing them would take minutes.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import recipes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Entry", "describe", "entries", "table"]

_TASKS = ("pretrain", "sft", "peft")
_SIZES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
}
_HEADLINES = (
    "model.num_layers",
    "model.hybrid_layer_pattern",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.num_moe_experts",
    "model.moe_router_topk",
    "model.seq_length",
    "model.vocab_size",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "train.train_iters",
    "train.global_batch_size",
    "train.micro_batch_size",
    "optimizer.lr",
    "optimizer.min_lr",
    "scheduler.lr_decay_style",
    "scheduler.lr_warmup_iters",
    "mixed_precision",
    "tokenizer.tokenizer_type",
    "tokenizer.tokenizer_model",
)


@dataclass(frozen=True)
class Entry:
    """One recipe.

    Attributes:
        name: The function.
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


def entries(*, directory: Path | None = None) -> tuple[Entry, ...]:
    """List the recipes.

    Args:
        directory: The folder `recipes` of a Megatron-Bridge; the installed one's if None.

    Returns:
        One entry a public function whose name ends in `_config`, by module and name.  Aliases are not repeated.

    Source: megatron-bridge 0.6.2 `recipes/`.
    """
    directory = directory or _installed()
    return tuple(
        sorted(
            (entry for path in directory.rglob("*.py") for entry in _read(path, directory)),
            key=lambda entry: (entry.module, entry.name),
        )
    )


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


def describe(cfg: Any) -> pd.DataFrame:
    """The settings that a reader asks for first, of a configuration of some 800.

    Args:
        cfg: A Bridge `ConfigContainer` or nested mappings.

    Returns:
        Columns `field` and `value`; fields that the configuration lacks, or that are None, are left out.

    >>> describe({"train": {"train_iters": 10}, "model": {"num_layers": 4, "vocab_size": None}}).values.tolist()
    [['model.num_layers', 4], ['train.train_iters', 10]]
    """
    import pandas as pd

    flat = recipes.flatten(cfg)
    rows = [(name, flat[name]) for name in _HEADLINES if flat.get(name) is not None]
    return pd.DataFrame(rows, columns=["field", "value"], dtype=object)


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


def _read(path: Path, root: Path) -> Iterator[Entry]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    for name, function in functions.items():
        if name.endswith("_config") and not name.startswith("_") and "/" in str(path.relative_to(root)):
            gpus = re.search(r"_(\d+)gpu_([a-z0-9]+)", name)
            yield Entry(
                name=name,
                module=module,
                family=module.split(".")[0],
                task=next((task for task in _TASKS if f"_{task}_" in name), ""),
                gpus=int(gpus[1]) if gpus else None,
                hardware=gpus[2] if gpus else "",
                layout=dict(_layout(function)),
                asks_hub_for=_model_id(function, functions, constants),
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


def _model_id(
    function: ast.FunctionDef, functions: dict[str, ast.FunctionDef], constants: dict[str, Any], depth: int = 3
) -> str | None:
    """The first argument of `from_hf_pretrained`, here or in a helper of the same file."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == "from_hf_pretrained" and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                return str(argument.value)
            return str({**constants, **_local(function)}.get(getattr(argument, "id", ""), ast.unparse(argument)))
        if isinstance(node.func, ast.Name) and node.func.id in functions and depth:
            found = _model_id(functions[node.func.id], functions, constants, depth - 1)
            if found:
                return found
    return None

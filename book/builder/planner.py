"""The planner of the book, which has no kernel: every plan that its page can show, computed ahead into a file of `data/`.

A choice is a value for each lever, and a value is lines of Python: the page shows the lines that were run.  The bytes of
a rank fall into parts that depend on different levers, so the file holds the parts and the page adds them; a test plans
whole choices again.  `python -m book.builder.planner` writes the file, in ten minutes of one core or less of several.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from book.builder import plan
from course_lib.planning import fully_sharded, memory, usable
from course_lib.planning.controls import RECOMPUTE
from course_lib.planning.layout import LayoutError, require

FILE = plan.FILE.with_name("memory_plans.json")
RANKS = plan.RANKS
HYBRID = "Nemotron 3 Nano 4B"
SHARDED = "Megatron FSDP"
COMPONENTS = ("weights", "gradients", "optimizer", "whole layers", "activations", "loss")
"""Those of `memory`, and what Megatron FSDP gathers, at most."""


def _recipe(module: str, name: str, vocab_size: int, *more: str) -> list[str]:
    called = [f"from megatron.bridge.recipes.{module} import {name}", f"cfg = {name}()"]
    return [*called, f"cfg.tokenizer.vocab_size = {vocab_size}", *more]


def _sizes(field: str, *sizes: int) -> dict[str, list[str]]:
    return {str(size): [f"cfg.{field}_size = {size}"] for size in sizes}


def _formats(name: str) -> list[str]:
    imported = "from megatron.bridge.training.mixed_precision import get_mixed_precision_config"
    return [imported, f"cfg.mixed_precision = get_mixed_precision_config({name!r})"]


LEVERS: dict[str, dict[str, list[str]]] = {
    "model": {
        name: _recipe("llama", recipe, plan.VOCAB_SIZE, "cfg.train.global_batch_size = 128")
        for name, recipe in plan.RECIPES.items()
    }
    | {HYBRID: _recipe("nemotronh.nemotron_3_nano_4b", "nemotron_3_nano_4b_pretrain_config", 131072)},
    "tp": _sizes("model.tensor_model_parallel", 1, 2, 4, 8),
    "pp": _sizes("model.pipeline_model_parallel", 1, 2, 4, 8),
    "cp": _sizes("model.context_parallel", 1, 2, 4, 8),
    "sp": {"on": ["cfg.model.sequence_parallel = True"], "off": ["cfg.model.sequence_parallel = False"]},
    "micro": _sizes("train.micro_batch", 1, 2),
    "recompute": {  # norms are not among them: Transformer Engine fuses them, so computing them again saves nothing
        name: [f"cfg.model.{field} = {value!r}" for field, value in fields.items()]
        for name, fields in {
            "nothing": RECOMPUTE["nothing"],
            "5 layers": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 5},
            "feed-forward": RECOMPUTE["feed-forward"],
            "every layer": RECOMPUTE["full"],
        }.items()
    },
    "precision": {"bf16": _formats("bf16_mixed"), "FP8": _formats("bf16_with_fp8_current_scaling_mixed")},
    "sharding": {
        "distributed optimizer": ["cfg.ddp.use_distributed_optimizer = True"],
        SHARDED: [f"cfg.{field} = {value!r}" for field, value in fully_sharded.FIELDS.items()],
    },
    "gradients": {
        name: [
            "import torch",
            f"cfg.mixed_precision.grad_reduce_in_fp32 = {name == 'fp32'}",
            f"cfg.ddp.megatron_fsdp_main_grads_dtype = torch.{dtype}",  # Megatron FSDP reads this one
        ]
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    },
    "moments": {
        "fp32": ["cfg.optimizer.use_precision_aware_optimizer = False"],
        "bf16": [
            "import torch",
            "cfg.optimizer.use_precision_aware_optimizer = True",
            "cfg.optimizer.exp_avg_dtype = cfg.optimizer.exp_avg_sq_dtype = torch.bfloat16",
        ],
    },
    "kernel": {
        "Transformer Engine": ['cfg.model.cross_entropy_fusion_impl = "te"'],
        "Megatron Core": ['cfg.model.cross_entropy_fusion_impl = "native"'],
    },
}
"""For each lever its values, each with the lines that set it."""

LAYOUT = ("tp", "pp", "cp")
PARTS = {
    "states": ("sharding", "precision", "gradients", "moments"),
    "activations": ("sp", "micro", "precision", "recompute"),
    "loss": ("micro", "kernel"),
}
"""Each part of the bytes, with the levers that it depends on besides model and layout."""


def code(choice: Mapping[str, str]) -> str:
    """The lines that make a choice's configuration, imports first.

    Args:
        choice: A value for every lever.
    """
    lines = dict.fromkeys(line for name, values in LEVERS.items() for line in values[choice[name]])
    return "\n".join(sorted(lines, key=lambda line: not line.startswith(("import ", "from "))))


def configuration(choice: Mapping[str, str]) -> Any:
    """The ``ConfigContainer`` that `code` makes; a recipe is called once.

    Args:
        choice: A value for every lever.
    """
    names = {"cfg": copy.deepcopy(_recipes_own(choice["model"]))}
    for name, values in LEVERS.items():
        if name != "model":
            exec("\n".join(values[choice[name]]), names)
    return names["cfg"]


@cache
def _recipes_own(model: str) -> Any:
    from course_lib import recipes, stack

    stack.prepare_imports()
    names: dict[str, Any] = {}
    with recipes.offline():
        exec("\n".join(LEVERS["model"][model]), names)
    return names["cfg"]


def choices(*levers: str, given: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Every choice of some levers; without TP there is nothing to share along the sequence, so `sp` is off.

    Args:
        levers: The levers that vary.
        given: Values of the others.
    """
    for values in product(*(LEVERS[name] for name in levers)):
        choice = {**given, **dict(zip(levers, values, strict=True))}
        if choice["tp"] != "1" or choice["sp"] == "off":
            yield choice


def make(*, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Plan every choice.

    Args:
        say: Is told of each layout.

    Returns:
        What stands in the file: one row a layout of a model, with the reason where it is refused, else for each part
        a tree by the values of its levers.  A leaf holds the bytes of the first and the last stage, or the reason.
    """
    first = {name: next(iter(values)) for name, values in LEVERS.items()} | {"sp": "off"}
    every, rows = list(choices("model", *LAYOUT, given=first)), []
    with ProcessPoolExecutor() as pool:
        for choice, row in zip(every, pool.map(_row, every), strict=True):
            named = {name: choice[name] for name in ("model", *LAYOUT)}
            say(" ".join(named.values()))
            rows.append(named | row)
    settings = {}
    for model in LEVERS["model"]:
        cfg = configuration(first | {"model": model})
        settings[model] = {"seq_length": cfg.model.seq_length, "global_batch_size": cfg.train.global_batch_size}
    return {
        "about": "Planned bytes of a rank, for each choice of the planner in the book. Nothing was run on a GPU.",
        "source": f"course_lib.planning.memory (lesson 06) with {plan.packages()}",
        "ranks": RANKS,
        "gpu": json.loads(usable.FILE.read_text(encoding="utf-8"))["gpu"],
        "components": COMPONENTS,
        "parts": {part: list(levers) for part, levers in PARTS.items()},
        "levers": LEVERS,
        "settings": settings,
        "layouts": rows,
    }


def _row(choice: dict[str, str]) -> dict[str, Any]:
    """The parts of one layout of a model, or why it cannot run."""
    try:
        layout = require(configuration(choice), RANKS)
    except LayoutError as error:
        return {"refused": [str(refusal) for refusal in error.refusals]}
    ends = sorted({0, layout.pipeline_model_parallel_size - 1})

    def states(cfg: Any) -> list[list[int]]:
        if cfg.ddp.use_megatron_fsdp:
            one = fully_sharded.states(cfg, ranks=RANKS)
            return [[one.weights_bytes, one.gradients_bytes, one.optimizer_bytes, one.total_bytes - one.sharded_bytes]]
        every = [memory.states(cfg, ranks=RANKS)[end] for end in ends]
        return [[one.weights_bytes, one.gradients_bytes, one.optimizer_bytes, 0] for one in every]

    def activations(cfg: Any) -> list[list[int]]:
        return [[memory.activations(cfg, ranks=RANKS, stage=end).total_bytes] for end in ends]

    def loss(cfg: Any) -> list[list[int]]:
        return [[memory.activations(cfg, ranks=RANKS, stage=end).loss_bytes] for end in ends]

    counts = {"states": states, "activations": activations, "loss": loss}
    row = {"dp": layout.data_parallel_size} | {part: _tree(choice, part, counts[part]) for part in PARTS}
    return row | {"usable": {one["micro"]: _usable(configuration(one)) for one in choices("micro", given=choice)}}


def _usable(cfg: Any) -> dict[str, int]:
    """What a plan may use, and what takes the rest of the allocator's total."""
    room = usable.of(cfg, ranks=RANKS)
    return {"usable": room.usable_bytes} | {line.name: line.taken_bytes for line in room.lines}


def _tree(choice: dict[str, str], part: str, count: Callable[[Any], list[list[int]]]) -> Any:
    """The bytes of a part by the values of its levers; branches that are all refused for one reason are that reason."""

    def grown(levers: tuple[str, ...], chosen: dict[str, str]) -> Any:
        if not levers:
            if part == "activations" and (reason := left_out(chosen)):
                return reason
            try:
                return count(configuration(chosen))
            except (
                ValueError
            ) as error:  # a refusal by rule, by the planner, or by Megatron while it builds a hybrid model
                return str(error)
        branches = {one[levers[0]]: grown(levers[1:], one) for one in choices(levers[0], given=chosen)}
        reasons = [branch for branch in branches.values() if isinstance(branch, str)]
        return reasons[0] if len(reasons) == len(branches) and len(set(reasons)) == 1 else branches

    return grown(PARTS[part], choice)


def left_out(choice: Mapping[str, str]) -> str:
    """Why the activations of a choice are not planned ahead, or nothing: the file would take three times as long."""
    eight_bit, whole = choice["precision"] == "FP8", choice["tp"] != "1" and choice["sp"] == "off"
    if eight_bit and whole:
        return "FP8 is planned ahead with sequence parallelism: choose on, or plan this in lesson 06"
    if (eight_bit or whole) and {choice["micro"], choice["pp"], choice["cp"]} != {"1"}:
        named = "FP8" if eight_bit else "TP without sequence parallelism"
        return f"{named} is planned ahead at PP=1 CP=1, one sequence at a time: choose these, or plan this in lesson 06"
    return ""


def row_of(choice: Mapping[str, str], plans: Mapping[str, Any]) -> dict[str, Any]:
    """The file's row of a choice's model and layout."""
    return next(row for row in plans["layouts"] if all(row[name] == choice[name] for name in ("model", *LAYOUT)))


def planned(choice: Mapping[str, str], plans: Mapping[str, Any]) -> dict[str, int] | str:
    """What the page shows for a choice: bytes by component of the stage that needs more, or the reason against it.

    Args:
        choice: A value for every lever.
        plans: What `read` or `make` returned.
    """
    row = row_of(choice, plans)
    if "refused" in row:
        return " ".join(row["refused"])
    found = []
    for part, levers in PARTS.items():
        branch = row[part]
        for lever in levers:
            branch = branch if isinstance(branch, str) else branch[choice[lever]]
        if isinstance(branch, str):
            return branch
        found.append(branch)
    stages = [[size for part in parts for size in part] for parts in zip(*found, strict=True)]
    return dict(zip(plans["components"], max(stages, key=sum), strict=True))


def sample(count: int, *, seed: int) -> list[dict[str, str]]:
    """Choices drawn evenly from all that there are."""
    every = list(choices(*LEVERS, given={}))
    return random.Random(seed).sample(every, count)


def read(path: Path = FILE) -> dict[str, Any]:
    """What the file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(plans: Mapping[str, Any], path: Path = FILE) -> None:
    """Write the file, one layout a line, so that a change of few layouts is one of few lines."""
    head = json.dumps({name: value for name, value in plans.items() if name != "layouts"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in plans["layouts"])
    path.write_text(f'{head[:-2]},\n "layouts": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def html(plans: Mapping[str, Any]) -> str:
    """The page's planner: a place to draw in, and the plans as data that its script reads without a request.

    Args:
        plans: What `read` or `make` returned.
    """
    inside = json.dumps(plans, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<div id="memory-planner"><noscript>The planner is a script, and scripts are switched off here: '
        "lesson 06 has the same plans as pictures.</noscript></div>\n"
        f'<script type="application/json" id="memory-plans">{inside}</script>'
    )


if __name__ == "__main__":
    write(make())
    print(f"wrote {FILE}")

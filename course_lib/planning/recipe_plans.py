"""Every recipe that NVIDIA wrote for eight H100, planned: its bytes, and whether memory asks for the cuts that it makes.

`book.builder.recipes` writes the plans to `data/recipes_8gpu_h100.json`, which the book shows.
Everything is planned; nothing was run on a GPU.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["NOTES", "names", "plan", "verdict"]

RANKS = 8
TREES = ("recipes", "perf_recipes")
_IDS = 131_072  # of Nemotron's tokenizer, for the hybrids that leave their ids to it

NOTES = {
    "perf_recipes:llama3_8b_pretrain_8gpu_h100_bf16_config": "CP=2 beside bf16 gradients: both together fit, CP=2 beside fp32 "
    "gradients does not. It sends nothing that a layer waits for, so its ceiling is a tenth above TP=2. Take it as the second "
    "run, and hold its losses against the first",
    "perf_recipes:llama3_8b_pretrain_8gpu_h100_fp8cs_config": "FP8 and bf16 gradients; without its recomputed layers the "
    "plan would be a little too large; one would do by these lines, and NVIDIA takes five",
    "recipes:deepseek_v2_lite_pretrain_8gpu_h100_bf16_config": "EP=8 deals out the experts; every layer is recomputed, for which "
    "memory does not ask",
    "recipes:gemma2_9b_pretrain_8gpu_h100_bf16_config": "TP=8 without sequence parallelism: the course would take TP=4 with it, "
    "because every doubling of TP adds messages",
    "recipes:moonlight_16b_pretrain_8gpu_h100_bf16_config": "EP=8 deals out the experts; TP=2 is not asked for by memory, and "
    "bf16 gradients and moments are not, either",
    "recipes:nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config": "no cut, as the course takes for 3B; bf16 gradients; verified "
    "by NVIDIA on this node",
    "recipes:nemotron_3_nano_pretrain_8gpu_h100_bf16_config": "EP=8 is the only way in: experts are most of the weights. Their "
    "states leave no room for the logits of 8,192 tokens and what its Mamba layers keep, although it recomputes experts and "
    "norms; NVIDIA's card of it on this node is unverified",
    "recipes:nemotronh_47b_pretrain_8gpu_h100_bf16_config": "eight is the size of its TP group, not of a node on which it fits",
    "recipes:nemotronh_56b_pretrain_8gpu_h100_bf16_config": "eight is the size of its TP group, not of a node on which it fits",
    "recipes:olmoe_7b_pretrain_8gpu_h100_bf16_config": "EP=8 deals out the experts; nothing else is cut, as the course would",
    "recipes:qwen3_14b_pretrain_8gpu_h100_bf16_config": "TP=8 without sequence parallelism and two sequences at once: the course "
    "would stop at the smallest TP that fits, with sequence parallelism, because every doubling of TP adds messages",
    "recipes:qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config": "TP=4 PP=2 EP=4 with all layers recomputed and fp32 gradients and "
    "moments: the states leave no room for more",
    "recipes:wan_1_3b_pretrain_8gpu_h100_bf16_config": "a video model: its step is not planned",
    "recipes:wan_14b_pretrain_8gpu_h100_bf16_config": "a video model: its step is not planned",
}
"""Why a pretraining recipe is laid out as it is, beside the course's own choice."""


def names() -> Iterator[tuple[str, str, str]]:
    """Tree, module and function of every public recipe for eight H100 in the installed package."""
    import megatron.bridge

    root = Path(next(iter(megatron.bridge.__path__)))
    for tree in TREES:
        for path in sorted((root / tree).rglob("*.py")):
            module = ".".join(("megatron.bridge", *path.relative_to(root).with_suffix("").parts))
            for found in re.finditer(
                r"^def ([a-z]\w*_8gpu_h100_\w*config)\(", path.read_text(encoding="utf-8"), re.MULTILINE
            ):
                yield tree, module, found[1]


def plan(tree: str, module: str, name: str) -> dict[str, Any]:
    """Plan one recipe on eight GPUs.

    Returns:
        A row of the file.  `planned_bytes` is None where something cannot be counted; a model that cannot be built has no
        `states_bytes` at all; `refused` says why, and `left_out` what a plan does not hold.  Pretraining with
        a cut has `uncut_states_bytes`, the states at TP=1 PP=1, and `smallest_tp`, at which the whole plan fits with sequence
        parallelism and PP=1.
    """
    from course_lib import recipes
    from course_lib.planning import memory, meta_model, usable
    from course_lib.planning.activations import as_a_gpu_has_it

    row: dict[str, Any] = {"recipe": f"{tree}:{name}", "task": re.search(r"pretrain|sft|peft", name)[0]}
    try:
        with recipes.offline():
            cfg = getattr(importlib.import_module(module), name)()
    except recipes.UnknownModel as error:
        wanted = re.search(r"no values for '([^']+)'", str(error))[1]
        return row | {"refused": f"data/models has no shape of {wanted}"}
    model = cfg.model
    model.vocab_size = model.vocab_size or getattr(cfg.tokenizer, "vocab_size", None) or _IDS
    cfg.tokenizer.use_tokenizer_vocab_size = False
    sizes = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "ep": "expert_model"}
    row |= {short: getattr(model, f"{long}_parallel_size") for short, long in sizes.items()}
    settings = as_a_gpu_has_it(cfg)
    row |= {"seq_length": model.seq_length, "micro_batch_size": cfg.train.micro_batch_size}
    row |= {"fp8": bool(settings.model.fp8), "gradient_bytes": meta_model.precision(cfg).gradients}
    row |= {"vocab_size": model.vocab_size, "recompute": _recompute(model)}
    row |= {"usable_bytes": usable.of(cfg, ranks=RANKS).usable_bytes, "planned_bytes": None}
    if model.cuda_graph_impl != "none":
        row["left_out"] = "the pool of its CUDA graphs, a few GiB by NVIDIA's guide"
        model.cuda_graph_impl = "none"
    planned, refused = None, {}
    try:
        planned = memory.plan(cfg, ranks=RANKS)
        row["planned_bytes"] = planned.total_bytes
    except memory.NotPlanned as error:
        refused = {"refused": str(error).split(":")[0]}
    stages = [planned.states] if planned and row["pp"] == 1 else memory.states(cfg, ranks=RANKS)
    row |= {"states_bytes": max(stage.total_bytes for stage in stages)} | refused
    if row["task"] == "pretrain" and row["tp"] * row["pp"] > 1:
        row["uncut_states_bytes"] = memory.states(_cut(cfg, 1, row["ep"], row["cp"]), ranks=RANKS)[0].total_bytes
        row["smallest_tp"] = _smallest_tp(cfg, row) if row["planned_bytes"] else None
    return row


def _recompute(model: Any) -> str:
    """What is recomputed, in a few words."""
    if not model.recompute_granularity:
        return ""
    if model.recompute_granularity == "full":
        return "all layers" if model.recompute_method == "uniform" else f"{model.recompute_num_layers} layers"
    return ", ".join(model.recompute_modules or ["core_attn"])


def _cut(cfg: Any, tp: int, ep: int, cp: int) -> Any:
    """The configuration at another TP, without a pipeline."""
    from course_lib.planning import memory

    whole = {"virtual_pipeline_model_parallel_size": None, "pipeline_model_parallel_layout": None}
    cut = memory.with_layout(cfg, tp=tp, cp=cp, ep=ep, sequence_parallel=tp > 1, **whole)
    cut.train.global_batch_size = (
        RANKS * cfg.train.micro_batch_size
    )  # shared by any number of copies; no bytes depend on it
    return cut


def _smallest_tp(cfg: Any, row: Mapping[str, Any]) -> int | None:
    """The smallest TP whose plan fits without a pipeline."""
    from course_lib.planning import memory, usable
    from course_lib.planning.layout import LayoutError

    for tp in (1, 2, 4, 8):
        cut = _cut(cfg, tp, row["ep"], row["cp"])
        try:
            room = usable.of(cut, ranks=RANKS).usable_bytes
            least = row["uncut_states_bytes"] / tp  # TP cuts what is cut at all
            if least <= room and memory.plan(cut, ranks=RANKS).total_bytes <= room:
                return tp
        except LayoutError:
            continue
    return None


def verdict(row: Mapping[str, Any]) -> str:
    """What memory says about a recipe's layout, in one sentence."""
    from course_lib.common.units import gib

    if "states_bytes" not in row:
        return f"not planned: {row['refused']}"
    room, counted = gib(row["usable_bytes"]), row["planned_bytes"] or row["states_bytes"]
    what = "" if row["planned_bytes"] else "the states alone: "
    if gib(counted) > room:
        return f"{what}does not fit {room:.1f} GiB"
    said = f"{what}{room - gib(counted):.1f} GiB left" + (f" for {row['left_out']}" if "left_out" in row else "")
    if (uncut := row.get("uncut_states_bytes")) is None:
        return said
    need = "and do not fit" if gib(uncut) > room else "and fit"
    said += f"; at TP=1 PP=1 the states take {gib(uncut):.1f} GiB, {need}"
    smallest = row["smallest_tp"]
    if smallest:
        return f"{said}; TP={smallest} PP=1 would do"
    return f"{said}; no TP fits without a pipeline" if row["planned_bytes"] else said

"""Count the parameters of the model that a recipe really builds, by part, without its memory.

Megatron builds what each rank of a layout holds, on PyTorch's meta device, where a tensor has a shape and no bytes, and
in a process group that is made up (`course_lib.planning.meta_model`).  The ranks of a model with experts share the experts among
them, so the total is a sum over ranks.  All this happens in a child process, because a hybrid model asks for CUDA and
for the Mamba kernels while it is built; the notebook's kernel never fakes either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Census", "CensusFailed", "count", "part_of"]

_MARK = "census: "
_LIMIT_S = 300
_SHARED_OUT = "routed experts"


class CensusFailed(RuntimeError):
    """A model could not be built; the message ends with the child's last lines."""


@dataclass(frozen=True)
class Census:
    """The parameters of one built model.

    Attributes:
        recipe: The recipe's function.
        parts: Number of parameters by part, in the order of the model, each counted once.
        experts: Routed experts of a layer, 0 for a dense model.
        chosen: Routed experts that one token uses.
        ranks: Ranks of the layout that was built.
        on_rank: Parameters that one of these ranks holds.
    """

    recipe: str
    parts: dict[str, int]
    experts: int
    chosen: int
    ranks: int = 1
    on_rank: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        """Parameters that take part in computing one token: all but the routed experts that it does not choose.

        >>> Census("x", {"routed experts": 128, "attention": 10}, experts=128, chosen=6).active
        16
        """
        routed = self.parts.get(_SHARED_OUT, 0)
        return self.total - (routed // self.experts * (self.experts - self.chosen) if self.experts else 0)

    @property
    def active_without_input_embedding(self) -> int:
        """As `active`, without the table that looks the input ids up: a look-up multiplies nothing."""
        return self.active - self.parts["input embedding"]


def count(
    recipes: Iterable[str], *, vocab_size: int | None = None, ranks: int = 1, only_first: bool = False
) -> dict[str, Census]:
    """Build the models of some recipes in a child process and count.

    The layout is TP=1 PP=1, and EP=`ranks` for a model with experts: every rank holds its share of the experts and all
    the rest.

    Args:
        recipes: Functions as `module:function` below `megatron.bridge.recipes`.
        vocab_size: Rows of the embedding; those of the published model if None.
        ranks: World size of the process group that is made up.
        only_first: Build the first rank alone, and take its number of experts for that of the others.

    Returns:
        One census a recipe, by the name of its function.

    Raises:
        CensusFailed: If a recipe or its model cannot be built, or if two ranks disagree about what both hold.
    """
    names = list(recipes)
    asked = {"recipes": names, "vocab_size": vocab_size, "ranks": ranks, "only_first": only_first}
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise CensusFailed(f"{', '.join(names)} were not built within {_LIMIT_S} s") from None
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or len(lines) != len(names):
        tail = "\n".join(done.stderr.splitlines()[-5:])
        raise CensusFailed(f"of {', '.join(names)} only {len(lines)} could be built:\n{tail}")
    return {row["recipe"]: Census(**row) for row in map(json.loads, lines)}


def part_of(name: str) -> str:
    """To which part of a model a parameter belongs, by its name in Megatron Core.

    >>> part_of("decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight")
    'routed experts'
    >>> part_of("decoder.layers.0.mixer.A_log")
    'Mamba'
    """
    rules: Mapping[str, str] = {
        "word_embeddings": "input embedding",
        "output_layer": "output layer",
        ".mixer.": "Mamba",
        ".experts.": "routed experts",
        ".shared_experts.": "shared expert",
        ".router.": "router",
        ".self_attention.": "attention",
        "latent_proj": "latent projections",
        ".mlp.": "dense feed-forward",
        "eh_proj": "multi-token prediction",
        "norm": "norms",
    }
    return next((part for sign, part in rules.items() if sign in name), "other")


def _sum_over_ranks(held: Sequence[Mapping[str, int]], *, times: int = 1) -> dict[str, int]:
    """What a model has, from what its ranks hold: experts are shared among them, everything else is on each of them.

    >>> _sum_over_ranks([{"norms": 3, "routed experts": 8}, {"norms": 3, "routed experts": 8}])
    {'norms': 3, 'routed experts': 16}
    """
    rest = [{part: size for part, size in parts.items() if part != _SHARED_OUT} for parts in held]
    if any(parts != rest[0] for parts in rest):
        raise CensusFailed(f"the ranks hold different parts besides the experts: {rest}")
    experts = sum(parts.get(_SHARED_OUT, 0) for parts in held) * times
    return {part: experts if part == _SHARED_OUT else size for part, size in held[0].items()}


def _child(asked: Mapping[str, Any]) -> None:
    from course_lib import stack
    from course_lib.recipes import offline

    stack.prepare_imports()
    import importlib

    from course_lib.planning import meta_model

    for name in asked["recipes"]:
        module, function = name.split(":")
        with offline():
            cfg = getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), function)()
        _lay_out(cfg, asked["ranks"], asked["vocab_size"])
        experts, chosen = getattr(cfg.model, "num_moe_experts", None) or 0, getattr(cfg.model, "moe_router_topk", 0)
        alone = asked["only_first"] or not experts  # without experts every rank holds the same
        held: list[Counter[str]] = []
        for rank in range(1 if alone else asked["ranks"]):
            held.append(Counter())
            with meta_model.built(cfg, ranks=asked["ranks"], rank=rank, one_for_all=False) as (model,):
                for parameter, value in model.named_parameters():
                    held[-1][part_of(parameter)] += value.numel()
        row = {
            "recipe": function,
            "parts": _sum_over_ranks(held, times=asked["ranks"] if alone else 1),
            "experts": experts,
            "chosen": chosen if experts else 0,
            "ranks": asked["ranks"],
            "on_rank": held[0].total(),
        }
        print(_MARK + json.dumps(row), flush=True)


def _lay_out(cfg: Any, ranks: int, vocab_size: int | None) -> None:
    """TP=1 PP=1 and the experts over all ranks, of Megatron's own unfused layers: the same parameters."""
    model = cfg.model
    model.vocab_size = vocab_size or model.vocab_size
    if not model.vocab_size:
        raise CensusFailed("the recipe leaves its vocabulary to a tokenizer: give vocab_size")
    cfg.tokenizer.use_tokenizer_vocab_size = False  # the model as published, not the recipe's stand-in tokenizer
    for size in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
        setattr(model, f"{size}_parallel_size", 1)
    model.virtual_pipeline_model_parallel_size, model.pipeline_model_parallel_layout = None, None
    model.sequence_parallel, model.transformer_impl = False, "local"
    if getattr(model, "num_moe_experts", None):
        model.expert_model_parallel_size = ranks
        model.moe_token_dispatcher_type, model.moe_flex_dispatcher_backend = "allgather", None
        model.moe_shared_expert_overlap = False
    model.recompute_granularity = model.recompute_modules = None
    cfg.dataset.seq_length = model.seq_length
    cfg.train.micro_batch_size, cfg.train.global_batch_size = 1, ranks


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))

"""Count the parameters of the model that a recipe really builds, by part, without its memory.

Megatron builds what each rank of a layout holds, on PyTorch's meta device, where a tensor has a shape and no bytes, and
in a process group that is made up (`course_lib.planning.meta_model`).  The ranks of a model with experts share the experts among
them, so the total is a sum over ranks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Census", "CensusFailed", "count", "part_of"]

_SHARED_OUT = "routed experts"


class CensusFailed(RuntimeError):
    """A model could not be built; the message ends with the reason."""


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
    """Build the models of some recipes and count.

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
    from course_lib import stack

    stack.prepare_imports()
    names, found = list(recipes), {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # upstream's advice about a run, which this is not
                found[name.split(":")[1]] = _counted(name, vocab_size=vocab_size, ranks=ranks, only_first=only_first)
        except Exception as error:
            done = f"of {', '.join(names)} only {len(found)} could be built"
            raise CensusFailed(f"{done}: {name}: {type(error).__name__}: {error}") from error
    return found


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


def _counted(name: str, *, vocab_size: int | None, ranks: int, only_first: bool) -> Census:
    import importlib

    from course_lib.planning import meta_model
    from course_lib.recipes import offline

    module, function = name.split(":")
    with offline():
        cfg = getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), function)()
    _lay_out(cfg, ranks, vocab_size)
    experts, chosen = getattr(cfg.model, "num_moe_experts", None) or 0, getattr(cfg.model, "moe_router_topk", 0)
    alone = only_first or not experts  # without experts every rank holds the same
    held: list[Counter[str]] = []
    for rank in range(1 if alone else ranks):
        held.append(Counter())
        with meta_model.built(cfg, ranks=ranks, rank=rank, one_for_all=False) as (model,):
            for parameter, value in model.named_parameters():
                held[-1][part_of(parameter)] += value.numel()
    parts = _sum_over_ranks(held, times=ranks if alone else 1)
    return Census(function, parts, experts, chosen if experts else 0, ranks, held[0].total())


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

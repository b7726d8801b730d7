"""Bytes per rank, before the run: weights, gradients, optimizer states, activations and the loss.

States are counted on the model that Megatron really builds (:mod:`course_lib.meta_model`).  Activations are the tensors
that autograd keeps when a micro-batch really goes through that model, on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.layout import Layout
from course_lib.units import gib

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Activations",
    "Plan",
    "States",
    "activations",
    "bridge_estimate",
    "on_cpu",
    "plan",
    "states",
    "table",
    "with_layout",
]

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class States:
    """What one rank of a pipeline stage holds all the time.

    Attributes:
        stage: The pipeline stage.
        parameters: Parameters on the rank, those of its experts included.
        expert_parameters: Those of its experts.
        weights_bytes: The weights.
        gradients_bytes: The gradient buffers.
        optimizer_bytes: fp32 copies of 16-bit weights, and Adam's two moments, on this rank.
    """

    stage: int
    parameters: int
    expert_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All three."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Activations:
    """What one rank keeps for the backward pass.

    Attributes:
        per_microbatch_bytes: Kept tensors of one micro-batch, all layers of the stage, without the loss.
        loss_bytes: Kept tensors of the output layer's logits and the loss, and the logits' second copy while both live.
        in_flight: Micro-batches whose activations live at once (a fraction with an interleaved pipeline).
        recomputed_bytes: What full recomputation brings back while one layer goes backward.
        by_part: Kept bytes of one micro-batch by part of the model: ``embedding``, ``attention``, ``mlp``, ``norm``, ``other``.
    """

    per_microbatch_bytes: int
    loss_bytes: int
    in_flight: float
    recomputed_bytes: int
    by_part: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Everything but the loss."""
        return int(self.per_microbatch_bytes * self.in_flight) + self.recomputed_bytes


@dataclass(frozen=True)
class Plan:
    """Planned bytes of the rank that needs the most.

    Attributes:
        layout: The layout.
        states: Its states.
        activations: Its activations.
    """

    layout: Layout
    states: States
    activations: Activations

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component, in the order of `COMPONENTS`."""
        kept = self.activations
        values = (
            self.states.weights_bytes,
            self.states.gradients_bytes,
            self.states.optimizer_bytes,
            kept.total_bytes,
            kept.loss_bytes,
        )
        return dict(zip(COMPONENTS, values, strict=True))

    @property
    def total_bytes(self) -> int:
        """The sum; what NCCL, CUDA and the allocator take comes on top (`compute.Gpu`)."""
        return sum(self.components.values())


def states(cfg: Any, *, ranks: int) -> list[States]:
    """How many bytes of weights, gradients and optimizer states does a rank of each pipeline stage hold?

    All ranks of a stage hold the same number.  Without the distributed optimizer each rank keeps the states of all its
    parameters; with it, of one share: 1/(DP x CP), or one part in as many as hold the same expert.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Returns:
        One entry a stage.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.

    Source: megatron-core 0.19.2 ``distributed/param_and_grad_buffer.py``, ``optimizer/distrib_optimizer.py``.
    """
    from course_lib import meta_model

    layout, formats = Layout.from_config(cfg, ranks=ranks), meta_model.precision(cfg)
    sharded = cfg.ddp.use_distributed_optimizer or cfg.optimizer.use_distributed_optimizer
    shares = layout.data_parallel_size * layout.context_parallel_size if sharded else 1
    expert_shares = layout.expert_data_parallel_size if sharded else 1
    each = 8 + (4 if formats.weights < 4 else 0)  # two fp32 moments; fp32 weights are their own master copy
    found = []
    for stage in range(layout.pipeline_model_parallel_size):
        with meta_model.built(cfg, ranks=ranks, stage=stage) as chunks:
            parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        count = sum(parameter.numel() for parameter in parameters)
        expert = sum(parameter.numel() for parameter in parameters if not getattr(parameter, "allreduce", True))
        mine = (count - expert) / shares + expert / expert_shares
        found.append(
            States(stage, count, expert, count * formats.weights, count * formats.gradients, round(mine * each))
        )
    return found


def activations(cfg: Any, *, ranks: int, stage: int = 0) -> Activations:
    """How many bytes does a rank keep for the backward pass?

    One micro-batch goes through each chunk of the stage on the meta device; every tensor that autograd keeps is counted
    once, parameters are not.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.  ``transformer_impl="transformer_engine"`` counts what
            fused kernels keep, ``"local"`` what the layers of a CPU rank keep.
        ranks: World size.
        stage: Pipeline stage; the first has the most micro-batches in flight, the last has the loss.

    Returns:
        The kept bytes.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        ValueError: For parts whose activations are not planned: experts, and recomputing other modules than core_attn.
    """
    _refuse_what_is_not_planned(cfg)
    kept, loss = _kept(cfg, ranks=ranks, stage=stage)
    recomputed = 0
    if cfg.model.recompute_granularity == "full":
        import copy

        plain = copy.copy(cfg)
        plain.model = copy.copy(cfg.model)
        plain.model.recompute_granularity = plain.model.recompute_method = plain.model.recompute_num_layers = None
        layers, _ = _kept(plain, ranks=ranks, stage=stage)
        of_one = max(sum(parts.values()) for name, parts in layers.items() if name.startswith("layer"))
        block = cfg.model.recompute_num_layers if cfg.model.recompute_method == "uniform" else 1
        recomputed = of_one * (block or 1)
    by_part: dict[str, int] = {}
    for parts in kept.values():
        for part, size in parts.items():
            by_part[part] = by_part.get(part, 0) + size
    return Activations(sum(by_part.values()), loss, _in_flight(cfg, ranks=ranks, stage=stage), recomputed, by_part)


def plan(cfg: Any, *, ranks: int) -> Plan:
    """What does the rank that needs the most memory need?

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Returns:
        The plan of that rank: the first or the last stage, whichever needs more.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        ValueError: As `activations`.
    """
    every = states(cfg, ranks=ranks)
    layout = Layout.from_config(cfg, ranks=ranks)
    ends = {0, len(every) - 1}
    plans = [Plan(layout, every[stage], activations(cfg, ranks=ranks, stage=stage)) for stage in sorted(ends)]
    return max(plans, key=lambda one: one.total_bytes)


def with_layout(cfg: Any, *, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, **model_fields: Any) -> Any:
    """A copy of a configuration with another layout; other fields of the model can be given too.

    Args:
        cfg: A Bridge ``ConfigContainer``; it stays as it is.
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        cp: Context parallel size.
        ep: Expert parallel size.
        **model_fields: Fields of ``cfg.model``, such as ``sequence_parallel=True``.

    Returns:
        The copy.

    Raises:
        AttributeError: If the model has no such field.
    """
    import copy

    mine = copy.copy(cfg)
    mine.model, mine.train = copy.copy(cfg.model), copy.copy(cfg.train)
    sizes = {"tensor_model": tp, "pipeline_model": pp, "context": cp, "expert_model": ep}
    for name, value in ({f"{key}_parallel_size": size for key, size in sizes.items()} | model_fields).items():
        if not hasattr(mine.model, name):
            raise AttributeError(f"cfg.model has no field {name!r}")
        setattr(mine.model, name, value)
    return mine


def on_cpu(cfg: Any) -> Any:
    """A copy of a configuration with the fields that CPU ranks set (`course_lib.devices`), to plan what they hold."""
    import copy

    from course_lib import devices

    mine = copy.deepcopy(cfg)
    devices.apply(mine)
    return mine


def bridge_estimate(cfg: Any, *, ranks: int) -> dict[str, float]:
    """What Bridge's own formula says: bytes of ``states`` and ``activations`` on the fullest rank.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.
        ranks: World size.

    Source: megatron-bridge 0.6.2 ``training/utils/theoretical_memory_utils.py``.
    """
    import copy

    from megatron.bridge.training.utils.theoretical_memory_utils import estimate_training_memory

    layout, mine = Layout.from_config(cfg, ranks=ranks), copy.copy(cfg)
    mine.model = copy.copy(cfg.model)
    if mine.model.vocab_size is None or getattr(cfg.tokenizer, "use_tokenizer_vocab_size", False):
        mine.model.vocab_size, mine.model.should_pad_vocab = cfg.tokenizer.vocab_size, True
    mine.data_parallel_size = layout.data_parallel_size  # Bridge's validate() sets it when a run starts
    microbatches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * layout.data_parallel_size)
    found = estimate_training_memory(mine, num_microbatches=microbatches)
    return {"states": found.weight_and_optimizer_bytes, "activations": found.activation.memory_bytes}


def table(plans: dict[str, Plan]) -> pd.DataFrame:
    """Plans as a table: one row each, components in GiB."""
    import pandas as pd

    rows = {
        name: {part: gib(size) for part, size in one.components.items()} | {"total": gib(one.total_bytes)}
        for name, one in plans.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def _refuse_what_is_not_planned(cfg: Any) -> None:
    if getattr(cfg.model, "num_moe_experts", None):
        raise ValueError("activations of experts depend on what the router sends where: plan the states alone")
    modules = cfg.model.recompute_modules or []
    if cfg.model.recompute_granularity == "selective" and set(modules) != {"core_attn"}:
        raise ValueError(f"recompute_modules={modules}: only ['core_attn'] can be planned; measure the others")


def _kept(cfg: Any, *, ranks: int, stage: int) -> tuple[dict[str, dict[str, int]], int]:
    """Kept bytes of one micro-batch by layer and part, and those of the loss."""
    import torch

    from course_lib import meta_model

    kept: dict[str, dict[str, int]] = {}
    loss = 0
    with meta_model.built(cfg, ranks=ranks, stage=stage) as chunks:
        seen = {parameter.untyped_storage()._cdata: parameter for chunk in chunks for parameter in chunk.parameters()}
        for number, chunk in enumerate(chunks):
            inside: list[str] = []
            _follow(chunk, inside)

            def pack(tensor: torch.Tensor, inside: list[str] = inside, number: int = number) -> torch.Tensor:
                nonlocal loss
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen[storage._cdata] = storage  # held, so that no later storage gets its address
                    layer, part = _place(inside[-1] if inside else "", number)
                    if layer == "loss":
                        loss += storage.nbytes()
                    else:
                        parts = kept.setdefault(layer, {})
                        parts[part] = parts.get(part, 0) + storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = meta_model.forward(chunk, cfg, ranks=ranks)
            if chunk.post_process:
                loss += _second_copy(cfg, ranks=ranks, tokens=out.numel(), model=chunk)
    return kept, loss


def _follow(chunk: Any, inside: list[str]) -> None:
    """Keep the names of the modules whose forward is under way in a list, the innermost last."""

    def leave(*_: object) -> None:
        inside.pop()

    for name, module in chunk.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(leave)


def _second_copy(cfg: Any, *, ranks: int, tokens: int, model: Any) -> int:
    """16-bit logits live on while their fp32 copy is made; Transformer Engine's loss needs no copy."""
    from course_lib import meta_model

    fused = cfg.model.transformer_impl == "transformer_engine" and cfg.model.cross_entropy_loss_fusion
    size = meta_model.precision(cfg).weights
    if size == 4 or (fused and cfg.model.cross_entropy_fusion_impl == "te"):
        return 0
    rows = model.shared_embedding_or_output_weight().shape[0] if model.share_embeddings_and_output_weights else None
    return tokens * (rows or model.output_layer.weight.shape[0]) * size


def _place(name: str, chunk: int) -> tuple[str, str]:
    """The layer and the part of the model that a module belongs to."""
    words = name.split(".")
    if not name:
        return "loss", "loss"  # the model's own forward computes the loss
    if words[0] != "decoder":
        return words[0], "embedding" if words[0] in ("embedding", "rotary_pos_emb") else "output"
    if len(words) < 3:
        return "final", "norm" if "norm" in name else "other"
    part = words[3] if len(words) > 3 else ""
    names = {"self_attention": "attention", "mlp": "mlp", "input_layernorm": "norm", "pre_mlp_layernorm": "norm"}
    return f"layer {chunk}.{words[2]}", names.get(part, "other")


def _in_flight(cfg: Any, *, ranks: int, stage: int) -> float:
    """Micro-batches that have gone forward and not yet backward, at most.

    Source: megatron-core 0.19.2 ``pipeline_parallel/schedules.py``, ``get_pp_rank_microbatches``.
    """
    layout = Layout.from_config(cfg, ranks=ranks)
    stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    microbatches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * layout.data_parallel_size)
    if not chunks:
        return min(stages - stage, microbatches)
    group = cfg.model.microbatch_group_size_per_vp_stage or stages
    warm_up = (stages - stage - 1) * 2 + (chunks - 1) * group
    return min(warm_up + 1, microbatches * chunks) / chunks

"""What a rank keeps for the backward pass, counted while a micro-batch goes through the meta model.

Every tensor that autograd keeps is counted once, by the layer and the part of the model that keeps it.  Layers with
experts are run with **balanced routing**: each expert gets equally many tokens, which is what the router is trained to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["Activations", "activations"]


@dataclass(frozen=True)
class Activations:
    """What one rank keeps for the backward pass.

    Attributes:
        per_microbatch_bytes: Kept tensors of one micro-batch, all layers of the stage, without the loss.
        loss_bytes: Kept tensors of the output layer's logits and the loss, and the logits' second copy while both live.
        in_flight: Micro-batches whose activations live at once (a fraction with an interleaved pipeline).
        recomputed_bytes: What full recomputation brings back while one layer goes backward.
        by_part: Kept bytes of one micro-batch by part of the model: ``embedding``, ``attention``, ``mlp`` (experts too),
            ``norm``, ``output``, and ``other`` for the inputs of what is recomputed.
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


def activations(cfg: Any, *, ranks: int, stage: int = 0) -> Activations:
    """How many bytes does a rank keep for the backward pass?

    One micro-batch goes through each chunk of the stage on the meta device; every tensor that autograd keeps is counted
    once, parameters are not.

    Args:
        cfg: A Bridge ``ConfigContainer`` with its layout set.  ``transformer_impl="transformer_engine"`` counts what
            fused kernels keep, ``"local"`` what the layers of a CPU rank keep.  Routing is taken as balanced; the flex
            dispatcher is counted as the all-to-all that it sends.
        ranks: World size.
        stage: Pipeline stage; the first has the most micro-batches in flight, the last has the loss.

    Returns:
        The kept bytes.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        ValueError: For what cannot be counted without its kernel: Mamba layers, and modules recomputed inside one.
    """
    _refuse_what_cannot_be_counted(cfg)
    kept, loss = _kept(cfg, ranks=ranks, stage=stage)
    recomputed = 0
    if cfg.model.recompute_granularity:
        import copy

        plain = copy.copy(cfg)
        plain.model = copy.copy(cfg.model)
        plain.model.recompute_granularity = plain.model.recompute_method = plain.model.recompute_num_layers = None
        layers, _ = _kept(plain, ranks=ranks, stage=stage)
        together = cfg.model.recompute_num_layers if cfg.model.recompute_method == "uniform" else 1
        recomputed = together * max(
            sum(parts.values()) - sum(kept.get(name, {}).values())
            for name, parts in layers.items()
            if name.startswith("layer")
        )
    by_part: dict[str, int] = {}
    for parts in kept.values():
        for part, size in parts.items():
            by_part[part] = by_part.get(part, 0) + size
    return Activations(sum(by_part.values()), loss, _in_flight(cfg, ranks=ranks, stage=stage), recomputed, by_part)


def _refuse_what_cannot_be_counted(cfg: Any) -> None:
    pattern = getattr(cfg.model, "hybrid_layer_pattern", None) or getattr(cfg.model, "hybrid_override_pattern", None)
    if "M" in (pattern or ""):
        raise ValueError(
            "the activations of Mamba layers are what mamba-ssm's CUDA kernels keep, and those cannot run without a GPU: "
            "plan the states alone (memory.states), and measure the activations there"
        )
    if cfg.model.recompute_granularity != "selective":
        return
    inside = {
        "moe_act": "is recomputed inside Transformer Engine's grouped experts",
        "mla_up_proj": "belongs to multi-latent attention, which this plan does not cover",
        "gdn_norm_out": "belongs to gated delta networks, whose kernels need CUDA",
    }
    for module in cfg.model.recompute_modules or []:
        if module in inside:
            raise ValueError(
                f"recompute_modules: {module!r} {inside[module]}: leave it out of the plan, and measure it"
            )


def _kept(cfg: Any, *, ranks: int, stage: int) -> tuple[dict[str, dict[str, int]], int]:
    """Kept bytes of one micro-batch by layer and part, and those of the loss."""
    import torch

    from course_lib import meta_model

    found: list[tuple[str, str, torch.UntypedStorage]] = []
    copies = 0
    with meta_model.built(cfg, ranks=ranks, stage=stage) as chunks:
        seen = {parameter.untyped_storage()._cdata for chunk in chunks for parameter in chunk.parameters()}
        for number, chunk in enumerate(chunks):
            inside: list[str] = []
            _follow(chunk, inside)

            def pack(tensor: torch.Tensor, inside: list[str] = inside, number: int = number) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)  # and held in `found`, so that no later storage gets its address
                    found.append((*_place(inside[-1] if inside else "", number), storage))
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = meta_model.forward(chunk, cfg, ranks=ranks)
            if chunk.post_process:
                copies += _second_copy(cfg, tokens=out.numel(), model=chunk)
    kept: dict[str, dict[str, int]] = {}
    for layer, part, storage in found:  # only now: recomputation gives storages back after they were kept
        parts = kept.setdefault(layer, {})
        parts[part] = parts.get(part, 0) + storage.nbytes()
    return kept, sum(kept.pop("loss", {}).values()) + copies


def _follow(chunk: Any, inside: list[str]) -> None:
    """Keep the names of the modules whose forward is under way in a list, the innermost last."""

    def leave(*_: object) -> None:
        inside.pop()

    for name, module in chunk.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(leave)


def _second_copy(cfg: Any, *, tokens: int, model: Any) -> int:
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

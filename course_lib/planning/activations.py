"""What a rank keeps for the backward pass, counted while a micro-batch goes through the meta model.

Every tensor that autograd keeps is counted once, by the layer and the part of the model that keeps it.  Layers with
experts are run with **balanced routing**: each expert gets equally many tokens, which is what the router is trained to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields, changed
from course_lib.planning.alike import Layers
from course_lib.planning.layout import Layout
from course_lib.planning.layout.stages import hybrid_pattern

if TYPE_CHECKING:
    import torch

__all__ = [
    "Activations",
    "NotPlanned",
    "activations",
    "as_a_gpu_has_it",
    "built",
    "kept_by",
    "one_layer",
    "quantized",
    "refuse",
    "refuse_what_is_not_counted",
    "without_recomputation",
]


class NotPlanned(ValueError):
    """The bytes of a configuration are not counted; the message names the field, the reason and what to set instead."""


@dataclass(frozen=True)
class Activations:
    """What one rank keeps for the backward pass.

    Attributes:
        per_microbatch_bytes: Kept tensors of one micro-batch, all layers of the stage, without the loss.
        loss_bytes: Kept tensors of the output layer's logits and the loss, the logits' second copy while both live, and
            what waits for the output layer's weight gradient where `defer_embedding_wgrad_compute` puts it off.
        in_flight: Micro-batches whose activations live at once (a fraction with an interleaved pipeline).
        recomputed_bytes: What recomputation brings back while a layer, or several together, go backward.
        by_part: Kept bytes of one micro-batch by part of the model: ``embedding``, ``attention``, ``mamba``, ``mlp``
            (experts too), ``norm``, ``output``, and ``other`` for the inputs of what is recomputed.
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
        NotPlanned: For what cannot be counted without its kernel, such as sparse attention, and fields that are not counted.
    """
    refuse_what_is_not_counted(as_a_gpu_has_it(cfg))
    plain = without_recomputation(cfg, ranks=ranks, stage=stage)
    with built(cfg, ranks=ranks, stage=stage) as chunks:
        return kept_by(chunks, cfg, plain, ranks=ranks, stage=stage)


def without_recomputation(cfg: Any, *, ranks: int, stage: int) -> dict[str, dict[str, int]]:
    """What a stage would keep by layer and part if it recomputed nothing; empty if it does not."""
    if not cfg.model.recompute_granularity:
        return {}
    nothing = dict.fromkeys(("granularity", "method", "num_layers"))
    plain = changed(cfg, {f"model.recompute_{name}": value for name, value in nothing.items()})
    with built(plain, ranks=ranks, stage=stage) as chunks:
        return _kept(chunks, plain, ranks=ranks)[0]


def kept_by(
    chunks: list[torch.nn.Module], cfg: Any, plain: dict[str, dict[str, int]], *, ranks: int, stage: int
) -> Activations:
    """`activations` of a stage whose chunks were just built; `plain` is what `without_recomputation` says."""
    kept, loss = _kept(chunks, cfg, ranks=ranks)
    recomputed = _brought_back(plain, kept, cfg.model)
    by_part: dict[str, int] = {}
    for parts in kept.values():
        for part, size in parts.items():
            by_part[part] = by_part.get(part, 0) + size
    return Activations(sum(by_part.values()), loss, _in_flight(cfg, ranks=ranks, stage=stage), recomputed, by_part)


def _brought_back(plain: dict[str, dict[str, int]], kept: dict[str, dict[str, int]], model: Any) -> int:
    """Bytes that recomputation brings back at once, beside what is kept, when that is most.

    ``uniform`` brings back so many layers together, and no more than a chunk has.  By the time that a layer is brought
    back, the layers behind it have gone backward and keep nothing: ``block``, which recomputes the first layers of a chunk,
    needs room for one only if it recomputes the last one too.

    Args:
        plain: Bytes by layer and part without recomputation.
        kept: The same with it.
        model: The model's fields.
    """
    together = model.recompute_num_layers if model.recompute_method == "uniform" else 1
    chunks: dict[str, list[tuple[int, int]]] = {}
    for name, parts in plain.items():
        if name.startswith("layer"):
            now = sum(kept.get(name, {}).values())
            chunks.setdefault(name.split(".")[0], []).append((sum(parts.values()) - now, now))
    most = 0
    for layers in chunks.values():
        for first in range(0, len(layers), together):
            back = sum(max(0, spared) for spared, _ in layers[first : first + together])
            most = max(most, back - sum(now for _, now in layers[first + together :]))
    return most


def as_a_gpu_has_it(cfg: Any) -> Any:
    """A copy of a configuration after Bridge's own start: number formats and overlaps spread over its sections, one
    optimizer setting.

    Source: megatron-bridge 0.6.2 ``training/config.py`` ``runtime_config_update``, ``training/comm_overlap.py``.
    """
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    mine = changed(cfg, {})
    if cfg.mixed_precision:
        mixed = changed(get_mixed_precision_config(cfg.mixed_precision), {})
        mixed.finalize()
        mixed.setup(mine.model, mine.optimizer, mine.ddp)
    if cfg.comm_overlap is not None:  # it decides for the model's own fields, where it says nothing as well
        for name in _OVERLAPS:
            setattr(mine.model, name, getattr(cfg.comm_overlap, name) or 0)
    shared = mine.ddp.use_distributed_optimizer or mine.optimizer.use_distributed_optimizer
    mine.ddp.use_distributed_optimizer = mine.optimizer.use_distributed_optimizer = shared
    return mine


def refuse(cfg: Any, fields: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raise `NotPlanned` for the first field whose value is not among those that can be planned.

    Args:
        cfg: A Bridge ``ConfigContainer``; fields that it lacks are passed over.
        fields: Dotted names; for each the values that can be planned, and the reason against others.
    """
    for path, (planned, why) in fields.items():
        section, name = path.split(".")
        value = getattr(getattr(cfg, section, None), name, planned[0])
        if value not in planned:
            raise NotPlanned(
                f"{path}={value!r} is not planned: {why}. Set {path}={planned[0]!r} to plan without it, and measure the rest"
            )


@contextmanager
def built(cfg: Any, *, ranks: int, stage: int) -> Iterator[list[torch.nn.Module]]:
    """The chunks of a stage, as `meta_model.built` gives them; what cannot be built is refused by name.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        NotPlanned: If a layer cannot be built without Transformer Engine or a GPU.
    """
    from course_lib.planning import meta_model

    with ExitStack() as stack:
        try:
            chunks = stack.enter_context(meta_model.built(cfg, ranks=ranks, stage=stage))
        except _CANNOT as error:
            spec = getattr(cfg.model, "transformer_layer_spec", None) or getattr(cfg.model, "hybrid_stack_spec", None)
            raise NotPlanned(
                f"{type(cfg.model).__name__} with layers of {getattr(spec, '__name__', spec)!r} cannot be built without a GPU "
                f"({str(error)[:200]}): plan a model of other layers, and measure this one"
            ) from error
        yield chunks


_CANNOT = (TypeError, AttributeError, ImportError, NotImplementedError, RuntimeError, AssertionError, LookupError)
"""What upstream raises where a class or a device is missing."""


def quantized(chunk: Any, model: Any) -> set[str]:
    """Names of the linear layers of a chunk that multiply in 8 bits: all in the layers, but for those kept in 16 bits.

    Source: megatron-core 0.19.2 ``fp8_utils.py`` ``is_first_last_bf16_layer``.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    if not model.fp8:
        return set()
    kept = set()
    if model.first_last_layers_bf16:
        ends = (model.num_layers_at_start_in_bf16, model.num_layers - model.num_layers_at_end_in_bf16)
        for name, module in chunk.decoder.named_modules(prefix="decoder"):
            if (number := getattr(module, "layer_number", None)) and not ends[0] < number <= ends[1]:
                kept.add(f"{name}.")
    return {
        name
        for name, module in chunk.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        and ".layers." in name
        and not any(name.startswith(layer) for layer in kept)
    }


_EIGHT_BIT = "only per-tensor scaling in 8 bits is counted; others keep scales and second copies"
_OFFLOADED = "which tensors have left the GPU when memory is fullest depends on time"
_DELAYED = "inputs of delayed work live on, and for how long depends on time"
_GRAPHS = "a CUDA graph keeps a memory pool of its own, a few GiB"
_FUSED = "its fused kernel keeps other tensors than the layers that are counted"
_ROUTED = "buffers are as large as the router's choice, or a limit on it, makes them"
_SHARDED = "it cuts weights or sequences in a way that is not counted"
_OVERLAPS = (
    "defer_embedding_wgrad_compute",
    "wgrad_deferral_limit",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
)
"""Fields of `cfg.comm_overlap`, and of the model, that decide how long tensors live."""
_NOT_COUNTED = {
    "comm_overlap.overlap_moe_expert_parallel_comm": ((None, False), _DELAYED),
    "comm_overlap.delay_wgrad_compute": ((None, False), _DELAYED),
    "model.fp4": ((None,), _EIGHT_BIT),
    "model.fp8_dot_product_attention": ((False,), _EIGHT_BIT),
    "model.fp8_multi_head_attention": ((False,), _EIGHT_BIT),
    "model.fp8_output_proj": ((False,), _EIGHT_BIT),
    "model.activation_func_fp8_input_store": ((False,), _EIGHT_BIT),
    "model.use_kitchen": ((False,), _EIGHT_BIT),
    "model.quant_recipe": ((None,), _EIGHT_BIT),
    "model.cpu_offloading": ((False,), _OFFLOADED),
    "model.fine_grained_activation_offloading": ((False,), _OFFLOADED),
    "model.overlap_moe_expert_parallel_comm": ((False,), _DELAYED),
    "model.overlap_dispatch_backward_with_experts_wgrad": ((False,), _DELAYED),
    "model.ep_overlap_early_attn_memory_release": ((False,), _DELAYED),
    "model.delay_wgrad_compute": ((False,), _DELAYED),
    "ddp.delay_wgrad_compute": ((False,), _DELAYED),
    "model.num_microbatches_with_partial_activation_checkpoints": ((None,), "micro-batches keep different layers"),
    "model.distribute_saved_activations": ((False,), "the inputs of recomputed layers are cut among ranks"),
    "model.cuda_graph_impl": (("none",), _GRAPHS),
    "model.enable_cuda_graph": ((False,), _GRAPHS),
    "model.external_cuda_graph": ((False,), _GRAPHS),
    "optimizer.optimizer_cuda_graph": ((False,), _GRAPHS),
    "model.use_transformer_engine_op_fuser": ((False,), _FUSED),
    "model.use_transformer_engine_full_layer_spec": ((False,), _FUSED),
    "model.use_te_activation_func": ((False,), _FUSED),
    "model.fused_residual_rmsnorm": ((False,), _FUSED),
    "model.fused_single_qkv_rope": ((False,), _FUSED),
    "model.log_max_attention_logit": ((False,), _FUSED),
    "model.moe_paged_stash": ((False,), _ROUTED),
    "model.moe_expert_capacity_factor": ((None,), _ROUTED),
    "model.moe_expert_rank_capacity_factor": ((None,), _ROUTED),
    "model.moe_input_jitter_eps": ((None,), "the noise on the router's input is drawn on the GPU and kept"),
    "model.moe_router_padding_for_quantization": ((False,), _ROUTED),
    "model.moe_router_padding_for_fp8": ((False,), _ROUTED),
    "model.tensor_parallel_num_weight_shards": ((None, 1), _SHARDED),
    "model.expert_tensor_parallel_num_weight_shards": ((None, 1), _SHARDED),
    "model.gtp_weight_remat_size": ((1,), _SHARDED),
    "model.expert_gtp_weight_remat_size": ((1,), _SHARDED),
    "model.hybrid_context_parallel": ((False,), _SHARDED),
    "model.mtp_standalone": ((False,), _SHARDED),
}
"""Fields that change a rank's memory: the values that can be planned, and why others cannot."""
_NOT_COUNTED_IN_EIGHT_BITS = {
    "model.fp8_recipe": (("tensorwise", "delayed"), _EIGHT_BIT),
    "model.fp8_wgrad": ((True,), _EIGHT_BIT),
}
_NOT_COUNTED_IN_A_PIPELINE = {"model.deallocate_pipeline_outputs": ((True,), "every sent activation lives on")}


def refuse_what_is_not_counted(cfg: Any) -> None:
    """Raise `NotPlanned` for what changes a rank's activations and is not counted.

    Args:
        cfg: The configuration as `as_a_gpu_has_it` returns it.
    """
    fields = _NOT_COUNTED | (_NOT_COUNTED_IN_EIGHT_BITS if cfg.model.fp8 else {})
    refuse(cfg, fields | (_NOT_COUNTED_IN_A_PIPELINE if cfg.model.pipeline_model_parallel_size > 1 else {}))
    if cfg.model.transformer_impl == "local" and cfg.dist.distributed_backend != "gloo":
        raise NotPlanned(
            "transformer_impl='local' on GPUs: Megatron Core's own attention keeps every score there, which CPU ranks do "
            "not and this plan does not count: plan with 'transformer_engine', or what CPU ranks do (devices.applied(cfg))"
        )
    if cfg.dist.distributed_backend == "gloo" and cfg.model.context_parallel_size > 1:
        raise NotPlanned(
            f"CP={cfg.model.context_parallel_size} on CPU ranks: they gather all keys and keep every score, which GPUs do not "
            "and this plan does not count: plan what GPUs do (the configuration without devices.applied)"
        )
    groups = (getattr(cfg.model, "mamba_num_groups", None) or 1) // cfg.model.tensor_model_parallel_size
    if "M" in hybrid_pattern(Fields.of(cfg)) and cfg.model.context_parallel_size > groups:
        raise NotPlanned(
            f"CP={cfg.model.context_parallel_size} over {groups} Mamba state groups of a TP rank: each rank keeps copies of "
            f"what a group writes and reads, which is not counted: plan CP={groups} or less, and measure this one"
        )
    if cfg.model.recompute_granularity != "selective":
        return
    inside = {
        "moe_act": "is recomputed inside Transformer Engine's grouped experts",
        "mla_up_proj": "is recomputed inside multi-latent attention",
        "gdn_norm_out": "belongs to gated delta networks, whose kernels need CUDA",
    }
    for module in cfg.model.recompute_modules or []:
        if module in inside:
            raise NotPlanned(
                f"recompute_modules: {module!r} {inside[module]}: leave it out of the plan, and measure it"
            )


def one_layer(cfg: Any, *, ranks: int) -> dict[str, int]:
    """What the first layer keeps of one micro-batch, by the tensors' names in words, in the order of the forward pass.

    Args:
        cfg: As for `activations`; without recomputation, which keeps the layer's input and nothing else.
        ranks: World size.

    Returns:
        Bytes by tensor.

    Raises:
        LayoutError: As `activations`, like `NotPlanned`.

    Source: `_KEPT_BY` names the modules of megatron-core 0.19.2 that keep them.
    """
    refuse_what_is_not_counted(as_a_gpu_has_it(cfg))
    kept: dict[str, int] = {}
    with built(cfg, ranks=ranks, stage=0) as chunks:
        tensors, _ = _tensors(chunks, cfg, ranks=ranks)
    for name, chunk, size in tensors:
        words = name.split(".")
        if chunk == 0 and words[:2] == ["decoder", "layers"] and words[2] == "0":
            inner = ".".join(words[3:])
            label = _KEPT_BY.get(inner, inner)
            kept[label] = kept.get(label, 0) + size
    return kept


_KEPT_BY = {
    "input_layernorm": "input of the norm before attention",
    "self_attention.linear_qkv.norm": "input of the norm before attention",
    "self_attention.linear_qkv": "input of the q, k, v product",
    "self_attention": "rotary angles",
    "self_attention.core_attention": "q, k, v, and attention's output",
    "self_attention.linear_proj": "input of the output product",
    "pre_mlp_layernorm": "input of the norm before feed-forward",
    "mlp.linear_fc1.norm": "input of the norm before feed-forward",
    "mlp.linear_fc1": "input of the first product",
    "mlp": "both halves before the gate",
    "mlp.linear_fc2": "product of the halves",
}
"""Modules of a dense layer, and what they keep for their backward pass."""


def _kept(chunks: list[torch.nn.Module], cfg: Any, *, ranks: int) -> tuple[dict[str, dict[str, int]], int]:
    """Kept bytes of one micro-batch by layer and part, and those of the loss."""
    tensors, copies = _tensors(chunks, cfg, ranks=ranks)
    kept: dict[str, dict[str, int]] = {}
    for name, chunk, size in tensors:
        layer, part = _place(name, chunk)
        parts = kept.setdefault(layer, {})
        parts[part] = parts.get(part, 0) + size
    return kept, sum(kept.pop("loss", {}).values()) + copies


def _tensors(chunks: list[torch.nn.Module], cfg: Any, *, ranks: int) -> tuple[list[tuple[str, int, int]], int]:
    """Every kept tensor of one micro-batch as module, chunk and bytes, and the bytes of the logits' second copy."""
    import torch

    from course_lib.planning import meta_model

    settings, copies = as_a_gpu_has_it(cfg).model, 0
    found: list[tuple[str, int, torch.UntypedStorage, int | None]] = []
    weights = {(one.untyped_storage()._cdata, False) for chunk in chunks for one in chunk.parameters()}
    seen: set[tuple[int, bool]] = set()
    for number, chunk in enumerate(chunks):
        inside: list[str] = []
        _follow(chunk, inside)
        eight_bit = quantized(chunk, settings)

        def keep(
            tensor: torch.Tensor,
            inside: list[str] = inside,
            number: int = number,
            eight_bit: set[str] = eight_bit,
        ) -> torch.Tensor:
            storage, module = tensor.untyped_storage(), inside[-1] if inside else ""
            cast = module in eight_bit and tensor.is_floating_point()  # the layer keeps a copy of 8 bits of its input
            key = (storage._cdata, cast)
            if key not in seen and (storage._cdata, False) not in weights:
                seen.add(key)  # and held in `found`, so that no later storage gets its address
                found.append((module, number, storage, tensor.numel() if cast else None))
            return tensor

        layers = Layers(found, seen)
        try:
            for name, layer in chunk.decoder.layers.named_children():
                layers.watch(f"decoder.layers.{name}", layer, eight_bit)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = meta_model.forward(chunk, cfg, ranks=ranks)
        except (*_CANNOT, ValueError) as error:
            raise NotPlanned(
                f"what {inside[-1] if inside else 'the model'} keeps cannot be counted without a GPU ({str(error)[:200]}): "
                "plan the states alone (memory.states), and measure the activations there"
            ) from error
        if chunk.post_process:
            copies += _second_copy(cfg, tokens=out.numel(), model=chunk)
            copies += _deferred(cfg, settings, ranks=ranks, tokens=out.numel(), model=chunk)
    # Only now: recomputation gives storages back after they were kept.
    return [(name, chunk, storage.nbytes() if cast is None else cast) for name, chunk, storage, cast in found], copies


def _follow(chunk: Any, inside: list[str]) -> None:
    """Keep the names of the modules whose forward is under way in a list, the innermost last."""

    def leave(*_: object) -> None:
        inside.pop()

    for name, module in chunk.named_modules():
        fused = vars(module).get("norm")  # the norm inside a linear layer of Transformer Engine's is no child of it
        for inner, one in ((name, module), (f"{name}.norm", fused)):
            if one is not None:
                one.register_forward_pre_hook(lambda *_, inner=inner: inside.append(inner))
                one.register_forward_hook(leave)


def _second_copy(cfg: Any, *, tokens: int, model: Any) -> int:
    """16-bit logits live on while their fp32 copy is made; Transformer Engine's loss needs no copy."""
    from course_lib.planning import meta_model

    fused = cfg.model.transformer_impl == "transformer_engine" and cfg.model.cross_entropy_loss_fusion
    size = meta_model.precision(cfg).weights
    if size == 4 or (fused and cfg.model.cross_entropy_fusion_impl == "te"):
        return 0
    return tokens * _output_rows(model) * size


def _deferred(cfg: Any, settings: Any, *, ranks: int, tokens: int, model: Any) -> int:
    """What the last stage keeps of earlier micro-batches until their weight gradients of the output layer are computed: its
    inputs, which sequence parallelism cuts, and the gradients of its logits.

    Source: megatron-core 0.19.2 ``tensor_parallel/layers.py``; a limit of 0 is none.
    """
    from course_lib.planning import meta_model

    if not settings.defer_embedding_wgrad_compute:
        return 0
    layout = Layout.from_config(cfg, ranks=ranks)
    waiting = min(settings.wgrad_deferral_limit or math.inf, _microbatches(cfg, layout))
    inputs = settings.hidden_size // (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)
    return waiting * tokens * (inputs + _output_rows(model)) * meta_model.precision(cfg).weights


def _output_rows(model: Any) -> int:
    """Rows of the output layer on this rank."""
    shared = model.share_embeddings_and_output_weights
    return (model.shared_embedding_or_output_weight() if shared else model.output_layer.weight).shape[0]


def _microbatches(cfg: Any, layout: Layout) -> int:
    """Micro-batches of a step."""
    return cfg.train.global_batch_size // (cfg.train.micro_batch_size * layout.data_parallel_size)


def _place(name: str, chunk: int) -> tuple[str, str]:
    """The layer and the part of the model that a module belongs to."""
    words = name.split(".")
    if not name:
        return "loss", "loss"  # the model's own forward computes the loss
    if words[0] != "decoder":
        return words[0], "embedding" if words[0] in ("embedding", "rotary_pos_emb") else "output"
    if len(words) < 3:
        return "final", "norm" if "norm" in name else "other"
    inner = words[3:]
    part = "norm" if inner[-1:] == ["norm"] and inner != ["mixer", "norm"] else inner[0] if inner else ""
    names = {"self_attention": "attention", "mixer": "mamba", "mlp": "mlp"}
    names |= dict.fromkeys(("norm", "input_layernorm", "pre_mlp_layernorm"), "norm")
    return f"layer {chunk}.{words[2]}", names.get(part, "other")


def _in_flight(cfg: Any, *, ranks: int, stage: int) -> float:
    """Micro-batches that have gone forward and not yet backward, at most.

    Source: megatron-core 0.19.2 ``pipeline_parallel/schedules.py``, ``get_pp_rank_microbatches``.
    """
    layout = Layout.from_config(cfg, ranks=ranks)
    stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    microbatches = _microbatches(cfg, layout)
    if not chunks:
        return min(stages - stage, microbatches)
    group = cfg.model.microbatch_group_size_per_vp_stage or stages
    warm_up = (stages - stage - 1) * 2 + (chunks - 1) * group
    return min(warm_up + 1, microbatches * chunks) / chunks

"""What a run's configuration becomes in the ranks: a table of fields for each device.

The file `config.yaml` of a run is the same for both devices.  A rank applies the fields of its device after reading it:
a CPU rank many, a GPU rank only what its installation lacks.  Every entry has its reason, and a test holds the table
complete: what a rank really used differs from `config.yaml` in exactly these fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from course_lib.common.config import Fields, assign, changed, has, value
from course_lib.common.project import untested_allowed

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Field:
    """One configuration field that a rank sets.

    Attributes:
        becomes: The value in the rank, or a function of the configuration that returns it.
    """

    path: str
    becomes: object
    why: str


@dataclass(frozen=True)
class Difference:
    """One field of one configuration that the ranks change."""

    field: str
    in_cfg: object
    in_ranks: object
    why: str


def _float32(_: object) -> object:
    import torch

    return torch.float32


_NO_TE = "Transformer Engine's layers need CUDA"
_NO_FUSION = "the fused kernel needs CUDA"
_FP32 = "a CPU emulates bf16, about six times slower than fp32"
_NO_GRAPH = "a CPU has no CUDA graphs"

FIELDS: tuple[Field, ...] = (
    Field("dist.distributed_backend", "gloo", "NCCL needs GPUs"),
    Field("model.attention_backend", lambda cfg: _local_attention(), "flash and fused attention need CUDA"),
    Field("model.cp_comm_type", lambda cfg: _context(cfg), "the ring is inside Transformer Engine; keys are gathered"),
    Field("model.gradient_accumulation_fusion", False, _NO_FUSION),
    Field("model.defer_embedding_wgrad_compute", False, "as model.gradient_accumulation_fusion"),
    Field("model.masked_softmax_fusion", False, _NO_FUSION),
    Field("model.bias_dropout_fusion", False, _NO_FUSION),
    Field("model.apply_rope_fusion", False, _NO_FUSION),
    Field("model.fused_single_qkv_rope", False, "as model.apply_rope_fusion"),
    Field("model.persist_layer_norm", False, _NO_FUSION),
    Field(
        "model.cross_entropy_loss_fusion", False, "the recipes' kernel of the loss, Transformer Engine's, needs CUDA"
    ),
    Field("model.moe_permute_fusion", False, _NO_FUSION),
    Field("model.moe_router_fusion", False, _NO_FUSION),
    Field("model.moe_grouped_gemm", False, _NO_FUSION),
    Field("model.moe_single_grouped_weight", False, "as model.moe_grouped_gemm"),
    Field("model.moe_single_grouped_bias", False, "as model.moe_grouped_gemm"),
    Field(
        "model.recompute_modules", lambda cfg: _recomputed(cfg), "recomputing moe_act is a part of the grouped kernel"
    ),
    Field("model.moe_token_dispatcher_type", lambda cfg: _dispatcher(cfg), "DeepEP's and HybridEP's kernels need CUDA"),
    Field("model.moe_flex_dispatcher_backend", lambda cfg: _backend(cfg), "as model.moe_token_dispatcher_type"),
    Field("model.moe_enable_deepep", False, "as model.moe_token_dispatcher_type"),
    Field("model.use_transformer_engine_op_fuser", False, _NO_TE),
    Field("model.use_transformer_engine_full_layer_spec", False, _NO_TE),
    Field("model.use_te_activation_func", False, _NO_TE),
    Field("model.log_max_attention_logit", False, "only Transformer Engine's attention tells its largest score"),
    Field("model.cpu_offloading", False, "moves to the CPU what is there already"),
    Field("model.dense_grouped_gemm", False, _NO_TE),
    Field("model.fused_residual_rmsnorm", False, _NO_FUSION),
    Field("model.use_te_rng_tracker", False, _NO_TE),
    Field("rng.te_rng_tracker", False, _NO_TE),
    Field("model.dsa_kernel_backend", "none", _NO_FUSION),
    Field("model.tp_comm_overlap", False, "overlaps inside Transformer Engine"),
    Field("model.cuda_graph_impl", "none", _NO_GRAPH),
    Field("model.enable_cuda_graph", False, _NO_GRAPH),
    Field("model.external_cuda_graph", False, _NO_GRAPH),
    Field("model.fp8", None, "FP8 needs Transformer Engine"),
    Field("model.moe_router_padding_for_quantization", False, "as model.fp8"),
    Field("model.moe_router_padding_for_fp8", False, "as model.fp8"),
    Field("model.bf16", False, _FP32),
    Field("model.fp16", False, _FP32),
    Field("model.params_dtype", _float32, _FP32),
    Field("model.pipeline_dtype", _float32, _FP32),
    Field("model.autocast_dtype", _float32, _FP32),
    Field("mixed_precision", None, _FP32),
    Field("optimizer.bf16", False, _FP32),
    Field("optimizer.fp16", False, _FP32),
    Field("optimizer.params_dtype", _float32, _FP32),
    Field("optimizer.use_precision_aware_optimizer", False, "needs Transformer Engine's Adam"),
    *(
        Field(f"optimizer.{name}_dtype", _float32, "as optimizer.use_precision_aware_optimizer")
        for name in ("main_grads", "main_params", "exp_avg", "exp_avg_sq")
    ),
    Field("optimizer.optimizer_cpu_offload", False, "as model.cpu_offloading"),
    Field("ddp.nccl_ub", False, "as dist.distributed_backend"),
    Field("ddp.overlap_grad_reduce", False, "gloo's threads would fight the ranks for the same cores"),
    Field("ddp.overlap_param_gather", False, "gloo's threads would fight the ranks for the same cores"),
    Field("optimizer.overlap_param_gather", False, "as ddp.overlap_param_gather"),
    Field("optimizer.overlap_param_gather_with_optimizer_step", False, "as ddp.overlap_param_gather"),
    Field("comm_overlap", None, "overlaps inside Transformer Engine"),
    *(
        Field(f"model.{name}", False, "overlaps on streams of a GPU, and upstream refuses it without bf16 or fp16")
        for name in (
            "overlap_moe_expert_parallel_comm",
            "delay_wgrad_compute",
            "ep_overlap_early_attn_memory_release",
        )
    ),
    Field("dataset.num_workers", 0, "worker processes would fight the ranks for the same cores"),
    Field("dataset.pin_memory", False, "pinned memory speeds up copies to a GPU"),
    Field("dataset.persistent_workers", False, "there are no workers"),
    Field(
        "checkpoint.async_strategy",
        lambda cfg: "mcore" if cfg.checkpoint.async_save else cfg.checkpoint.async_strategy,
        "nvidia-resiliency-ext, which writes while the training goes on, is for GPU clusters; Core's own does so, too",
    ),
)


GPU_FIELDS: tuple[Field, ...] = (
    Field(
        "model.gradient_accumulation_fusion",
        lambda cfg: cfg.model.gradient_accumulation_fusion and _installed("fused_weight_gradient_mlp_cuda"),
        "Megatron Core's output layer needs Apex' fused_weight_gradient_mlp_cuda for it, which is not installed",
    ),
    Field(
        "model.defer_embedding_wgrad_compute",
        lambda cfg: cfg.model.defer_embedding_wgrad_compute and _installed("fused_weight_gradient_mlp_cuda"),
        "as model.gradient_accumulation_fusion",
    ),
)
"""What a GPU rank sets.

Source: megatron-core tensor_parallel/layers.py @ 0.19.2 `ColumnParallelLinear` raises without Apex; megatron-bridge
utils/fusions.py @ 0.6.2 switches the fusion on as soon as Transformer Engine, or a stand-in for it, can be imported.
"""


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _recomputed(cfg: object) -> object:
    modules = cfg.model.recompute_modules
    return [name for name in modules if name != "moe_act"] if modules else modules


def _dispatcher(cfg: object) -> str:
    return "alltoall" if cfg.model.moe_token_dispatcher_type == "flex" else cfg.model.moe_token_dispatcher_type


def _backend(cfg: object) -> str | None:
    return None if cfg.model.moe_token_dispatcher_type == "flex" else cfg.model.moe_flex_dispatcher_backend


def _local_attention() -> object:
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend.unfused


def _context(cfg: object) -> object:
    """How context-parallel ranks share keys and values; without context parallelism it does not matter."""
    return "all_gather" if (cfg.model.context_parallel_size or 1) > 1 else cfg.model.cp_comm_type


def differences(cfg: object, device: str = "cpu") -> list[Difference]:
    """Which fields of this configuration the ranks change.

    Args:
        cfg: Bridge's `ConfigContainer`, or what has some of its sections; it is not changed.
        device: Where the ranks are, `"cpu"` or `"cuda"`; a GPU rank changes what its installation lacks.

    Returns:
        One entry for each field whose value differs; fields that the configuration does not have are left out.
    """
    found = []
    for field in GPU_FIELDS if device == "cuda" else FIELDS:
        if not has(cfg, field.path):
            continue
        now = value(cfg, field.path)
        then = field.becomes(cfg) if isinstance(field.becomes, Callable) else field.becomes
        if now is not then and now != then:
            found.append(Difference(field.path, now, then, field.why))
    return found


def refuse_what_is_missing(device: str) -> None:
    """Stop a run that would need Transformer Engine where GPU ranks do not have it.

    The recipes' layers and their fused loss are its.  A configuration of Megatron Core's own layers would start: but its
    attention keeps every score, which no plan of this course counts, and with torch's AdamW the distributed optimizer
    saves what it cannot resume.  COURSE_ALLOW_UNTESTED=1 goes on all the same.

    Raises:
        ConfigError: If it is not installed in this environment.

    Source: megatron-core optimizer/distrib_optimizer.py, transformer/dot_product_attention.py @ 0.19.2
    """
    from course_lib import stack
    from course_lib.common.config import ConfigError

    if device == "cuda" and "transformer_engine" in stack.missing_modules() and not untested_allowed():
        raise ConfigError(
            "the ranks have GPUs, and Transformer Engine is not installed here: the recipe's layers and loss are its, and "
            f"without its Adam the distributed optimizer does not resume. {stack.GPU_SET_UP}"
        )


def refuse_what_cannot_train(cfg: object, device: str) -> None:
    """Stop a run of a model that the ranks cannot train, and name one that they can.

    Raises:
        ConfigError: Names the family, the reason and what would run instead.
    """
    from course_lib.common.config import ConfigError

    fields = Fields.of(cfg)
    kinds = {part: fields.get(part, "_target_") or _name(getattr(cfg, part, None)) for part in ("model", "dataset")}
    family = kinds["model"].rpartition(".")[2]
    optimizer = fields.get("optimizer", "optimizer", "adam")
    reason = None
    if ".diffusion." in kinds["model"]:
        reason = (
            "it is a diffusion model, and a run hands its model text: take one of the recipe families llama to qwen"
        )
    elif "vlm" in kinds["dataset"] or fields.model("vision_config") is not None:
        reason = "it reads images, and a run hands its model text: take the family's text model, as qwen for qwen_vl"
    elif device == "cpu":
        if "FalconH1" in family:
            reason = "each of its layers has a Mamba half, whose kernels need CUDA: take a dense family such as llama"
        elif fields.model("experimental_attention_variant", "gated_delta_net") not in ("gated_delta_net", "dsa"):
            reason = (
                f"experimental_attention_variant={fields.model('experimental_attention_variant')!r} has settings that no "
                "config.yaml keeps, and kernels that need CUDA: take DeepSeek V3, whose attention is latent, too"
            )
        elif fields.model("qk_clip"):
            reason = "qk_clip needs the largest score, which only Transformer Engine's attention tells: set it to False"
        elif optimizer not in ("adam", "sgd") and not _installed("emerging_optimizers"):
            reason = (
                f"optimizer.optimizer={optimizer!r} needs the package emerging-optimizers, which is not installed: set it to "
                "'adam'"
            )
    if reason:
        raise ConfigError(f"{fields.model('hf_model_id') or family or 'this model'} cannot train here: {reason}")


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def apply(cfg: object, device: str = "cpu") -> list[Difference]:
    """Set the values of a device's ranks in place and return what changed, as `differences()` would say it."""
    found = differences(cfg, device)
    assign(cfg, {each.field: each.in_ranks for each in found})
    return found


def applied(cfg: object, device: str = "cpu") -> object:
    """A copy of the configuration as ranks see it; `cfg` itself stays as it is.

    Of a file's content, only the backend is set: the ranks set the rest when they have read it.
    """
    if isinstance(cfg, dict):
        return cfg | ({"dist": (cfg.get("dist") or {}) | {"distributed_backend": "gloo"}} if device == "cpu" else {})
    return changed(cfg, {each.field: each.in_ranks for each in differences(cfg, device)})


def table(cfg: object, device: str = "cpu") -> pd.DataFrame:
    """The differences as a table for people: `field, in cfg, in the ranks, why`."""
    import pandas as pd

    def short(value: object) -> str:
        return getattr(value, "__name__", None) or str(value)

    rows = [(d.field, short(d.in_cfg), short(d.in_ranks), d.why) for d in differences(cfg, device)]
    return pd.DataFrame(rows, columns=["field", "in cfg", "in the ranks", "why"]).set_index("field")

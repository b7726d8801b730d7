"""The real Megatron model of one rank, without its memory: on torch's meta device, in a process group that is made up.

A layout of 8B parameters is built this way in a few hundredths of a second.  Nothing is estimated: the modules are
Megatron Core's, cut for that rank, and every tensor has its true shape and dtype.  Only the numbers in it are missing.

Transformer Engine has no meta device, so a model that asks for it is built from Megatron's local layers, which hold the
same parameters under the same names (:mod:`course_lib.stack.local_layers`); :mod:`.meta_kernels` replaces its kernels
by functions that keep what the fused kernel keeps.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from course_lib import stack
from course_lib.planning.layout import Layout, embedding_rows, require
from course_lib.planning.layout.stages import has_implicit_chunks

if TYPE_CHECKING:
    import torch


class Precision:
    """The number formats of a run, in bytes a number: ``weights`` and ``gradients``; moments are always fp32."""

    def __init__(self, cfg: Any) -> None:
        import torch
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        mixed = get_mixed_precision_config(cfg.mixed_precision) if cfg.mixed_precision else None
        source, reduce = (mixed, mixed) if mixed else (cfg.model, cfg.ddp)
        self.dtype = torch.bfloat16 if source.bf16 else torch.float16 if source.fp16 else torch.float32
        self.weights = self.dtype.itemsize
        self.gradients = 4 if reduce.grad_reduce_in_fp32 else self.weights


def precision(cfg: Any) -> Precision:
    """The number formats of a configuration.

    Source: megatron-bridge 0.6.2 ``training/mixed_precision.py``.
    """
    return Precision(cfg)


@contextmanager
def built(
    cfg: Any, *, ranks: int, stage: int = 0, rank: int | None = None, one_for_all: bool = True
) -> Iterator[list[torch.nn.Module]]:
    """Build what one rank of a pipeline stage would hold, and forget it at the end of the block.

    Args:
        cfg: A Bridge ``ConfigContainer``; it is not changed.
        ranks: World size.
        stage: Pipeline stage, from 0.
        rank: Which rank to be; the first of the stage if None.
        one_for_all: Build one of a rank's experts, whose parameters say in `stands_for` how many they stand for; it
            saves most of the time.  A count of the whole model builds every one.

    Yields:
        The rank's model chunks: one, or VPP of them.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        ValueError: If its pipeline plan interleaves without saying so in a field.
        RuntimeError: If this process trains already.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from course_lib.planning import meta_kernels

    if dist.is_initialized():
        raise RuntimeError("this process has a process group already: plan in another process than the one that trains")
    layout = require(cfg, ranks)
    if has_implicit_chunks(cfg):
        raise ValueError("the pipeline plan interleaves: set virtual_pipeline_model_parallel_size as well, to plan it")
    model = _without_devices(cfg)
    excepthook = sys.excepthook  # each process group would put its rank before every line of a traceback
    me = stage * ranks // layout.pipeline_model_parallel_size if rank is None else rank
    dist.init_process_group("fake", store=FakeStore(), rank=me, world_size=ranks)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.resolved_expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        with meta_kernels.standing_in(
            fused=_fused(cfg),
            experts=getattr(model, "num_moe_experts", None) or 0,
            chosen=getattr(model, "moe_router_topk", None) or 0,
            one_for_all=one_for_all,
        ):
            if hasattr(model, "hybrid_stack_spec"):
                model.hybrid_stack_spec = get_hybrid_stack_modelopt_spec(
                    local_core_attention=True, use_default_te_spec=_fused(cfg), moe_grouped_gemm=False
                )
            with _without_advice(), _choosing_no_attention():
                model.finalize()
                chunks = layout.virtual_pipeline_model_parallel_size
                made = [model.provide(vp_stage=chunk) for chunk in range(chunks)] if chunks else [model.provide()]
                if getattr(cfg, "peft", None) is not None:
                    made = copy.copy(cfg.peft)(made, training=True)
            yield made
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = excepthook


@contextmanager
def _choosing_no_attention() -> Iterator[None]:
    """Keep Megatron's choice of Transformer Engine's attention from ranks that this process launches later.

    A model that is built writes the choice of its `attention_backend` into the environment, which ranks inherit: they
    would stop at another choice of their own, or train with this one where they have none.

    Source: megatron-core 0.19.2 ``models/common/language_module/language_module.py``, ``_set_attention_backend``.
    """

    def chosen() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("NVTE_") and "_ATTN" in name}

    before = chosen()
    for name in before:
        del os.environ[name]  # building would stop at a choice that is not its own
    try:
        yield
    finally:
        for name in chosen():
            del os.environ[name]
        os.environ.update(before)


def forward(chunk: torch.nn.Module, cfg: Any, *, ranks: int) -> torch.Tensor:
    """Send one micro-batch through a chunk that `built` made; call it inside that block.

    Args:
        chunk: The chunk.
        cfg: The configuration that it was built from.
        ranks: World size.

    Returns:
        Losses of shape [batch, sequence] from the last stage, else hidden states [sequence, batch, hidden].

    Raises:
        ValueError: For attention whose kernels keep what only a GPU can tell.
    """
    import torch

    variant = getattr(cfg.model, "experimental_attention_variant", None)
    if variant is not None:
        raise ValueError(
            f"experimental_attention_variant={variant!r}: its activations are what its CUDA kernels keep, and those cannot run "
            "without a GPU: plan the states alone (memory.states), and measure the activations there"
        )
    layout, batch = Layout.from_config(cfg, ranks=ranks), cfg.train.micro_batch_size
    tokens = cfg.model.seq_length // layout.context_parallel_size
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    if not chunk.pre_process:
        share = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        shape = (tokens // share, batch, cfg.model.hidden_size)
        chunk.set_input_tensor(torch.empty(shape, dtype=precision(cfg).dtype, device="meta", requires_grad=True))
    with _without_advice():
        return chunk(ids, ids, None, labels=ids if chunk.post_process else None)


def _without_devices(cfg: Any) -> Any:
    """A copy of the model's configuration that builds on the meta device, with the vocabulary that Bridge would use."""
    from course_lib.stack import devices

    mine, fused, mixed = devices.applied(cfg), _fused(cfg), precision(cfg)
    model = mine.model
    model.vocab_size, model.should_pad_vocab = embedding_rows(cfg), False
    model.params_dtype = model.pipeline_dtype = model.autocast_dtype = mixed.dtype
    model.bf16, model.fp16 = mixed.dtype.itemsize == 2 and cfg.mixed_precision is not None, False
    model.cross_entropy_loss_fusion = fused and cfg.model.cross_entropy_loss_fusion
    model.context_parallel_size = 1  # it cuts sequences, not weights, and the local layers refuse it
    for name in _HOW_IT_RUNS:  # they decide how layers run, not what they hold, and ask for a GPU while they are built
        if hasattr(model, name):
            setattr(model, name, False)
    model.config_logger_dir = ""
    if getattr(model, "num_moe_experts", None):
        model.moe_shared_expert_overlap = False  # a second CUDA stream; the tensors are the same
        if model.moe_token_dispatcher_type == "flex":  # DeepEP's kernels; what they send is an all-to-all
            model.moe_token_dispatcher_type, model.moe_flex_dispatcher_backend = "alltoall", None
    model.init_model_with_meta_device, model.use_cpu_initialization, model.perform_initialization = True, True, False
    return model


_HOW_IT_RUNS = (
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "overlap_moe_expert_parallel_comm",
    "ep_overlap_early_attn_memory_release",
    "delay_wgrad_compute",
    "enable_cuda_graph",
    "external_cuda_graph",
    "fp8_param",
)


def _without_advice() -> AbstractContextManager[None]:
    """Upstream repeats a few pieces of advice for each model that is built; a table of layouts builds dozens."""
    return stack.quietly(
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.models.hybrid.hybrid_layer_allocation",
        *(f"megatron.bridge.peft.{kind}" for kind in ("lora", "canonical_lora", "dora")),
        below=logging.CRITICAL + 1,
        messages=(
            "full scope is deprecated",
            "Transformer Engine cross entropy loss fusion",
            "If you are using transformer_engine as the transformer implementation, the core_attn",
            ".*torch.distributed.* is deprecated",
            "When using sequence parallelism it is recommended to set the environment variable",
            "moe_hybridep_num_sms is deprecated",
            "moe_ffn_hidden_size is not set",
            "MLP requires ffn_hidden_size",
            "Warning: tp_group is None",
            "cuda_graph_scope is deprecated",
            'The fp8 argument in "get_gpt_layer',
        ),
    )


def _fused(cfg: Any) -> bool:
    """Whether layers keep what Transformer Engine's kernels keep; a CPU rank runs Core's own under the same names."""
    from megatron.core.transformer.enums import AttnBackend

    return cfg.model.transformer_impl == "transformer_engine" and cfg.model.attention_backend != AttnBackend.unfused

"""The real Megatron model of one rank, without its memory: on torch's meta device, in a process group that is made up.

A layout of 8B parameters is built this way in a few hundredths of a second.  Nothing is estimated: the modules are
Megatron Core's, cut for that rank, and every tensor has its true shape and dtype.  Only the numbers in it are missing.

Transformer Engine has no meta device, so a model that asks for it is built from Megatron's local layers, which hold the
same parameters; three of its kernels are replaced by functions that keep what the fused kernel keeps.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from course_lib.layout import Layout, padded_vocab_size, require

if TYPE_CHECKING:
    import torch

__all__ = ["Precision", "built", "forward", "precision"]


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
def built(cfg: Any, *, ranks: int, stage: int = 0, rank: int | None = None) -> Iterator[list[torch.nn.Module]]:
    """Build what one rank of a pipeline stage would hold, and forget it at the end of the block.

    Args:
        cfg: A Bridge ``ConfigContainer``; it is not changed.
        ranks: World size.
        stage: Pipeline stage, from 0.
        rank: Which rank to be; the first of the stage if None.

    Yields:
        The rank's model chunks: one, or VPP of them.

    Raises:
        LayoutError: If the configuration cannot run on so many ranks.
        RuntimeError: If this process trains already.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process has a process group already: plan in another process than the one that trains")
    layout = require(cfg, ranks)
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
        with _on_meta(cfg):
            with _without_advice():
                model.finalize()
                chunks = layout.virtual_pipeline_model_parallel_size
                made = [model.provide(vp_stage=chunk) for chunk in range(chunks)] if chunks else [model.provide()]
            yield made
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = excepthook


def forward(chunk: torch.nn.Module, cfg: Any, *, ranks: int) -> torch.Tensor:
    """Send one micro-batch through a chunk that `built` made; call it inside that block.

    Args:
        chunk: The chunk.
        cfg: The configuration that it was built from.
        ranks: World size.

    Returns:
        Losses of shape [batch, sequence] from the last stage, else hidden states [sequence, batch, hidden].
    """
    import torch

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
    from course_lib import devices

    mine = copy.copy(cfg)
    for part in ("model", "dist", "optimizer", "ddp", "dataset", "checkpoint"):
        setattr(mine, part, copy.copy(getattr(cfg, part)))
    fused, mixed = _fused(cfg), precision(cfg)
    devices.apply(mine)
    model = mine.model
    # What Bridge's _validate_and_set_vocab_size does: ids of the tokenizer are padded, a model's own are taken as given.
    if model.vocab_size is None or getattr(cfg.tokenizer, "use_tokenizer_vocab_size", False):
        model.vocab_size = padded_vocab_size(
            cfg.tokenizer.vocab_size,
            tensor_model_parallel_size=model.tensor_model_parallel_size,
            divisible_by=model.make_vocab_size_divisible_by,
        )
    model.should_pad_vocab = False
    model.params_dtype = model.pipeline_dtype = model.autocast_dtype = mixed.dtype
    model.bf16, model.fp16 = mixed.dtype.itemsize == 2 and cfg.mixed_precision is not None, False
    model.bias_activation_fusion = fused
    model.cross_entropy_loss_fusion = fused and cfg.model.cross_entropy_loss_fusion
    model.context_parallel_size = 1  # it cuts sequences, not weights, and the local layers refuse it
    model.init_model_with_meta_device, model.use_cpu_initialization, model.perform_initialization = True, True, False
    return model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Upstream repeats a few pieces of advice for each model that is built; a table of layouts builds dozens."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            for message in (
                "full scope is deprecated",
                "Transformer Engine cross entropy loss fusion",
                "If you are using transformer_engine as the transformer implementation, the core_attn",
                ".*torch.distributed.* is deprecated",
                "When using sequence parallelism it is recommended to set the environment variable",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.disabled = before


def _fused(cfg: Any) -> bool:
    return cfg.model.transformer_impl == "transformer_engine"


@contextmanager
def _on_meta(cfg: Any) -> Iterator[None]:
    """Answer the five questions that Megatron asks a device, and let kernels keep what the fused ones keep."""
    import torch

    def device() -> torch.device:
        return torch.device("meta")

    def no_fork(self: object, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
        return _norm(config, hidden_size, eps=eps, fused=_fused(cfg))

    random = "megatron.core.tensor_parallel.random"
    answers = {
        "torch.cuda.current_device": device,
        f"{random}.CudaRNGStatesTracker.fork": no_fork,
        f"{random}._get_all_rng_states": lambda: (),
        "megatron.core.transformer.dot_product_attention.DotProductAttention.forward": _attention,
        "megatron.core.transformer.attention.Attention._checkpointed_attention_forward": _recomputed_attention,
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__": norm,
        "megatron.core.models.common.language_module.language_module.te_parallel_cross_entropy": _loss,
    }
    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch(name, answer))
        patches.enter_context(torch.device("meta"))
        yield


def _keeping(keep: Any, shape: Any) -> Any:
    """A function for autograd that computes nothing and keeps the tensors that a fused kernel keeps."""
    import torch

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            out = shape(*inputs)
            ctx.inputs = len(inputs)
            ctx.save_for_backward(*keep(out, *inputs))
            ctx.like = [tensor.shape for tensor in inputs]
            return out

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(grad.new_empty(size) for size in ctx.like)

    return Kernel.apply


def _attention(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Flash attention keeps its inputs, its output and one fp32 number for each row of scores."""
    import torch

    rows = query.shape[0] * query.shape[1] * query.shape[2]
    with torch.no_grad():  # the two products, so that a counter of operations sees them; on meta they cost nothing
        heads = [tensor.movedim(0, 2) for tensor in (query, key, value)]
        heads[1:] = [tensor.repeat_interleave(query.shape[2] // key.shape[2], dim=1) for tensor in heads[1:]]
        torch.matmul(torch.matmul(heads[0], heads[1].transpose(2, 3)), heads[2])
    return _keeping(
        lambda out, *inputs: (*inputs, out, query.new_empty(rows, dtype=torch.float32)),
        lambda *_: query.new_empty(*query.shape[:2], query.shape[2] * value.shape[3]),
    )(query, key, value)


def _recomputed_attention(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Attention that is computed again in the backward pass keeps its inputs only."""
    return _keeping(
        lambda _, *inputs: inputs, lambda *_: query.new_empty(*query.shape[:2], query.shape[2] * value.shape[3])
    )(query, key, value)


def _loss(logits: Any, labels: Any, *_: Any, **__: Any) -> Any:
    """Transformer Engine's loss keeps the logits in the model's dtype, and writes their gradient over them."""
    import torch

    return _keeping(
        lambda _, logits: (logits,),
        lambda logits: logits.new_empty(logits.shape[:2], dtype=torch.float32),
    )(logits)


def _norm(config: Any, hidden_size: int, *, eps: float, fused: bool) -> Any:
    """A fused norm keeps its input and one fp32 number for each token."""
    import torch

    if not fused:  # what a CPU rank uses, where upstream's wrapper refuses it
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        return kind(hidden_size, eps=eps, dtype=config.params_dtype)

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
            if config.normalization == "LayerNorm":
                self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            numbers = x.new_empty(x.shape[:-1], dtype=torch.float32)
            return _keeping(lambda _, x, weight: (x, numbers), lambda x, _: torch.empty_like(x))(x, self.weight)

    return Norm()

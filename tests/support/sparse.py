"""A small model with experts: Qwen3's MoE recipe, as CPU ranks have it."""

from __future__ import annotations

from typing import Any

from support import families


def config(*, fields: dict[str, Any] | None = None, **layout: int) -> Any:
    """Two layers of 8 experts, of which a token chooses 2; a sequence of 32 tokens a microbatch, 4 a step."""
    cfg = families.shrink(families.build("qwen.qwen3_moe:qwen3_30b_a3b_pretrain_config"), **layout)
    cfg.model.recompute_method = cfg.model.recompute_num_layers = cfg.model.recompute_granularity = None
    cfg.model.moe_ffn_hidden_size, cfg.model.expert_tensor_parallel_size = 32, 1
    cfg.model.cuda_graph_impl, cfg.train.micro_batch_size = "none", 1
    cfg.model.moe_token_dispatcher_type = "alltoall"
    for name, value in (fields or {}).items():
        setattr(cfg.model, name, value)
    return cfg

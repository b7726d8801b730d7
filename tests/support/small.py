"""The small model of the tests: Bridge's vanilla GPT recipe with every number shrunk."""

from __future__ import annotations

from typing import Any

from course_lib.common.config import assign


def config(*, tp: int = 2, pp: int = 1, train_iters: int = 3, **fields: Any) -> Any:
    """A configuration of about 0.8 million parameters on mock data; `fields` are dotted names with `__` for dots."""
    import torch.nn.functional as F
    from megatron.bridge.recipes.gpt.vanilla_gpt import vanilla_gpt_pretrain_config

    cfg = vanilla_gpt_pretrain_config()
    m = cfg.model
    m.num_layers, m.hidden_size, m.num_attention_heads, m.ffn_hidden_size = 4, 128, 8, 256
    m.activation_func, m.gated_linear_unit, m.normalization, m.position_embedding_type = F.silu, True, "RMSNorm", "rope"
    m.add_bias_linear = False
    m.hidden_dropout = m.attention_dropout = 0.0
    m.seq_length = cfg.dataset.seq_length = 64
    m.tensor_model_parallel_size, m.pipeline_model_parallel_size = tp, pp
    cfg.tokenizer.vocab_size = 1024
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = train_iters, 8, 1
    cfg.validation.eval_interval, cfg.validation.eval_iters = 1000, 0
    cfg.logger.log_interval = 1
    cfg.optimizer.lr, cfg.scheduler.lr_warmup_iters = 1e-3, 1
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = False
    assign(cfg, {name.replace("__", "."): value for name, value in fields.items()})
    return cfg

"""One pretraining recipe of each family of Megatron-Bridge, with shapes small enough for a CPU rank.

A recipe that asks the Hub for a model's shape is answered from `SHAPES`: the shape class of transformers, or plain
values where transformers has none, with every size made small.  Nothing else of the recipe is changed.
"""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
LATENT = {  # attention with latent keys and values
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
UNGROUPED = {"n_group": 1, "topk_group": 1}
DEEPSEEK = {**LATENT, **ROUTED, **UNGROUPED}
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2}
WIDTHS = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size")
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def shape(architecture: str, model_type: str, **sizes: Any) -> dict[str, Any]:
    """Values of a small `config.json`."""
    return {"architectures": [architecture], "model_type": model_type, "head_dim": 16, **SMALL, **sizes}


SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V2-Lite": shape(
        "DeepseekV2ForCausalLM", "deepseek_v2", **DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2}
    ),
    "deepseek-ai/DeepSeek-V3": shape("DeepseekV3ForCausalLM", "deepseek_v3", **DEEPSEEK),
    "moonshotai/Moonlight-16B-A3B": shape("DeepseekV3ForCausalLM", "deepseek_v3", **DEEPSEEK | {"q_lora_rank": None}),
    "moonshotai/Kimi-K2-Instruct": shape("KimiK2ForCausalLM", "deepseek_v3", **DEEPSEEK, scoring_func="sigmoid"),
    "google/gemma-2-2b": shape("Gemma2ForCausalLM", "gemma2", query_pre_attn_scalar=24, sliding_window=8),
    "google/gemma-4-E4B-it": shape(
        "Gemma4ForCausalLM",
        "gemma4_text",
        **{"sliding_window": 8, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16},
    ),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": shape("Exaone4ForCausalLM", "exaone4", sliding_window=8),
    "LGAI-EXAONE/K-EXAONE-236B-A23B": shape(
        "ExaoneMoeForCausalLM",
        "exaone_moe",
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        sliding_window=8,
    ),
    "zai-org/GLM-4.5-Air": shape("Glm4MoeForCausalLM", "glm4_moe", **ROUTED, **UNGROUPED),
    "zai-org/GLM-5.2": shape(
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        **DEEPSEEK,
        **{"index_topk": 16, "index_head_dim": 16, "index_n_heads": 4, "indexer_rope_interleave": True},
    ),
    "MiniMaxAI/MiniMax-M3": {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "text_config": shape("MiniMaxM3SparseForCausalLM", "minimax_m3_vl_text", **EXPERTS, rotary_dim=8),
    },
    "stepfun-ai/Step-3.5-Flash": shape("Step3p5ForCausalLM", "step3p5", moe_num_experts=4, moe_top_k=2),
    "deepseek-ai/DeepSeek-V4-Flash": shape(
        "DeepseekV4ForCausalLM",
        "deepseek_v4",
        **ROUTED | {"head_dim": 24, "qk_rope_head_dim": 8, "num_key_value_heads": 1},
        **{
            "q_lora_rank": 24,
            "o_lora_rank": 16,
            "o_groups": 2,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 8,
        },
        sliding_window=8,
        rope_parameters={
            kind: {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 64}
            for kind in ("main", "compress")
        },
    ),
    "Qwen/Qwen3-VL-8B-Instruct": {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"},
    "Qwen/Qwen3-Next-80B-A3B-Instruct": shape(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        num_hidden_layers=4,
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        **{"shared_expert_intermediate_size": 48, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "openai/gpt-oss-20b": shape("GptOssForCausalLM", "gpt_oss", **EXPERTS, sliding_window=8),
}


def build(path: str) -> Any:
    """Call a recipe, `module:function` below `megatron.bridge.recipes`, without the Hub."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from course_lib import recipes

    def facts(model_id: str, known: dict[str, Any]) -> Any:
        if model_id not in SHAPES:
            return original(model_id, known)
        return recipes.ModelFacts(model_id, SHAPES[model_id], {}, None)

    original, for_model = recipes._facts, transformers.AutoConfig.for_model

    def made(model_type: str, **values: Any) -> Any:
        known = model_type in CONFIG_MAPPING_NAMES
        return for_model(model_type, **values) if known else transformers.PretrainedConfig(**values)

    module, name = path.split(":")
    with (
        recipes.offline(),
        mock.patch.object(recipes, "_facts", facts),
        mock.patch.object(transformers.AutoConfig, "for_model", made),
    ):
        return getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), name)()


def shrink(cfg: Any, *, layers: int = 2, pattern: str | None = None, **layout: int) -> Any:
    """Two steps of a few short sequences, on as many ranks as `layout` needs."""
    from course_lib import recipes

    model = cfg.model
    if not 0 < model.hidden_size <= 64:
        recipes.shrink(
            cfg,
            num_layers=None if pattern else layers,
            hybrid_layer_pattern=pattern,
            hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2 if (model.num_query_groups or 64) < model.num_attention_heads else 4,
            ffn_hidden_size=96,
            **{"num_moe_experts": 8, "moe_router_topk": 2} if model.num_moe_experts else {},
            **MAMBA if "M" in (pattern or "") else {},
            **{name: 48 for name in WIDTHS if getattr(model, name, None)} if pattern else {},
        )
    elif model.num_moe_experts:
        model.moe_router_topk = 2
    recipes.shrink(cfg, num_layers=None if pattern else model.num_layers, seq_length=32, vocab_size=512)
    for name in ("tensor", "pipeline", "context", "expert"):
        setattr(
            model, f"{name}_model_parallel_size" if name != "context" else "context_parallel_size", layout.get(name, 1)
        )
    model.expert_tensor_parallel_size = None
    model.virtual_pipeline_model_parallel_size = None
    model.sequence_parallel = layout.get("tensor", 1) > 1
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 2, 4, 2
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_decay_iters = 0, 2
    model.make_vocab_size_divisible_by = 128
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "NullTokenizer", None
    cfg.logger.log_interval, cfg.validation.eval_iters = 1, 0
    return cfg


NANO = "nemotronh.h100.nemotron_3_nano:nemotron_3_nano_pretrain_8gpu_h100_bf16_config"
HYBRID = {  # two chunks a sequence
    "model__mamba_chunk_size": 16,
    "train__global_batch_size": 8,
    "train__micro_batch_size": 1,
    "scheduler__lr_decay_iters": 10,
    "checkpoint__load_rng": False,
    "checkpoint__load_optim": False,
}


def hybrid(*, pattern: str = "MEM*E", layout: dict[str, int] | None = None, **fields: Any) -> Any:
    """Nemotron 3 Nano's own recipe in small, after some fields were changed; `fields` are dotted names with `__` for dots."""
    from course_lib.common.config import assign

    cfg = shrink(build(NANO), pattern=pattern, **(layout or {}))
    assign(cfg, {name.replace("__", "."): value for name, value in (HYBRID | fields).items()})
    return cfg

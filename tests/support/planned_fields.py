"""What each field of the model, the optimizer and the gradient buffers does to a plan, as data.

`COUNTED` and `REFUSED` give a value to try and the fields that it needs beside it; `NO_EFFECT` gives the reason, and the
fields that share it.  `test_planned_fields.py` tries every value, and fails when an upgrade adds a field.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 64,
    "model.sequence_parallel": True,
    "model.moe_token_dispatcher_type": "alltoall",
}
STAGES = {"model.pipeline_model_parallel_size": 2}
WAITING = STAGES | {"model.seq_length": 256, "dataset.seq_length": 256}
UNBATCHED = {"model.overlap_p2p_comm": True, "model.batch_p2p_comm": False}
SELECTED = {"model.recompute_granularity": "selective"}
FULL = {"model.recompute_granularity": "full", "model.recompute_method": "block", "model.recompute_num_layers": 2}
AWARE = {"optimizer.use_precision_aware_optimizer": True}
EIGHT_BIT = {"model.fp8": "hybrid", "model.fp8_recipe": "tensorwise"}
UNSHARDED = {"ddp.use_distributed_optimizer": False, "optimizer.use_distributed_optimizer": False}
BY_ADAM = AWARE | {"optimizer.main_params_dtype": "float16"}
REMAINDERS = AWARE | {"optimizer.fp8_recipe": "delayed"}
OFFLOADED = {"optimizer.optimizer_cpu_offload": True}
MLA = {"model.multi_latent_attention": True}

COUNTED: dict[str, tuple[Any, dict[str, Any]]] = {
    # the layout
    "model.tensor_model_parallel_size": (4, {}),
    "model.pipeline_model_parallel_size": (2, {}),
    "model.virtual_pipeline_model_parallel_size": (2, STAGES | UNBATCHED),
    "model.microbatch_group_size_per_vp_stage": (
        4,
        STAGES | UNBATCHED | {"model.virtual_pipeline_model_parallel_size": 2},
    ),
    "model.sequence_parallel": (True, {}),
    "model.context_parallel_size": (2, {}),
    "model.expert_model_parallel_size": (2, EXPERTS),
    "model.expert_tensor_parallel_size": (1, EXPERTS),
    "model.num_layers_in_first_pipeline_stage": (1, STAGES),
    "model.num_layers_in_last_pipeline_stage": (1, STAGES),
    "model.pipeline_model_parallel_layout": ("Ettt|tL", STAGES),
    "model.account_for_embedding_in_pipeline_split": (True, STAGES | {"model.num_layers": 5}),
    "model.account_for_loss_in_pipeline_split": (True, STAGES | {"model.num_layers": 5}),
    "model.scatter_embedding_sequence_parallel": (False, {"model.sequence_parallel": True}),
    "model.defer_embedding_wgrad_compute": (True, WAITING),
    "model.wgrad_deferral_limit": (1, WAITING | {"model.defer_embedding_wgrad_compute": True}),
    "comm_overlap.defer_embedding_wgrad_compute": (True, WAITING),
    "comm_overlap.wgrad_deferral_limit": (1, WAITING | {"comm_overlap.defer_embedding_wgrad_compute": True}),
    # number formats
    "model.bf16": (False, {"model.params_dtype": "float32"}),
    "model.fp16": (True, {"model.bf16": False, "optimizer.bf16": False, "optimizer.fp16": True} | UNSHARDED),
    "model.fp8": ("hybrid", {}),
    "model.fp8_param": (True, EIGHT_BIT),
    "model.disable_parameter_transpose_cache": (True, EIGHT_BIT),
    "model.first_last_layers_bf16": (True, EIGHT_BIT),
    "model.num_layers_at_start_in_bf16": (2, EIGHT_BIT | {"model.first_last_layers_bf16": True}),
    "model.num_layers_at_end_in_bf16": (2, EIGHT_BIT | {"model.first_last_layers_bf16": True}),
    "model.fp32_residual_connection": (True, {}),
    # the shape
    "model.num_layers": (5, {}),
    "model.hidden_size": (256, {}),
    "model.ffn_hidden_size": (512, {}),
    "model.num_attention_heads": (4, {}),
    "model.num_query_groups": (2, {}),
    "model.kv_channels": (32, {}),
    "model.seq_length": (128, {"dataset.seq_length": 128}),
    "model.vocab_size": (2048, {}),
    "model.make_vocab_size_divisible_by": (1000, {}),
    "model.share_embeddings_and_output_weights": (False, {}),
    "model.rotary_percent": (0.5, {}),
    "model.position_embedding_type": ("learned_absolute", {}),
    "model.normalization": ("LayerNorm", {}),
    "model.add_bias_linear": (True, {}),
    "model.add_qkv_bias": (True, {}),
    "model.gated_linear_unit": (False, {}),
    "model.activation_func": ("relu", {}),
    "model.activation_func_clamp_value": (0.5, {}),
    "model.qk_layernorm": (True, {}),
    "model.multi_latent_attention": (True, {}),
    "model.attention_output_gate": (True, {}),
    "model.no_rope_freq": (2, {}),
    "model.softmax_type": ("learnable", {}),
    "model.hidden_dropout": (0.5, {}),
    "model.mtp_num_layers": (1, {}),
    "model.mtp_use_repeated_layer": (True, {"model.mtp_num_layers": 2}),
    # kernels
    "model.transformer_impl": ("local", {"dist.distributed_backend": "gloo"}),
    "model.attention_backend": ("unfused", {}),
    "model.bias_activation_fusion": (True, {}),
    "model.cross_entropy_loss_fusion": (False, {"model.cross_entropy_fusion_impl": "te"}),
    "model.cross_entropy_fusion_impl": ("te", {}),
    "model.parallel_output": (False, {}),
    # recomputation
    "model.recompute_granularity": ("full", {"model.recompute_method": "uniform", "model.recompute_num_layers": 1}),
    "model.recompute_method": ("uniform", FULL),
    "model.recompute_num_layers": (1, FULL),
    "model.recompute_modules": (["mlp"], SELECTED),
    "model.moe_layer_recompute": (True, EXPERTS),
    # experts
    "model.num_moe_experts": (4, EXPERTS),
    "model.moe_ffn_hidden_size": (128, EXPERTS),
    "model.moe_layer_freq": (2, EXPERTS | {"model.transformer_layer_spec": "decoder block"}),
    "model.moe_router_topk": (3, EXPERTS),
    "model.moe_router_dtype": ("fp32", EXPERTS),
    "model.moe_router_score_function": ("sigmoid", EXPERTS),
    "model.moe_token_dispatcher_type": ("allgather", EXPERTS),
    "model.moe_shared_expert_intermediate_size": (64, EXPERTS),
    "model.moe_shared_expert_gate": (True, EXPERTS | {"model.moe_shared_expert_intermediate_size": 64}),
    "model.moe_latent_size": (32, EXPERTS),
    "model.moe_aux_loss_coeff": (0.5, EXPERTS),
    "model.moe_z_loss_coeff": (0.5, EXPERTS),
    "model.moe_router_pre_softmax": (True, EXPERTS),
    "model.moe_router_group_topk": (1, EXPERTS | {"model.moe_router_num_groups": 2}),
    "model.moe_router_topk_limited_devices": (1, EXPERTS),
    "model.moe_apply_probs_on_input": (
        True,
        EXPERTS | {"model.moe_router_topk": 1, "model.moe_router_pre_softmax": True},
    ),
    # the optimizer
    "optimizer.optimizer": ("sgd", {}),
    "optimizer.bf16": (False, UNSHARDED),
    "optimizer.fp16": (True, UNSHARDED | {"optimizer.bf16": False}),
    "optimizer.use_distributed_optimizer": (False, UNSHARDED),
    "optimizer.use_precision_aware_optimizer": (True, {}),
    "optimizer.fp8_recipe": ("tensorwise", AWARE),
    "optimizer.store_param_remainders": (False, REMAINDERS),
    "optimizer.main_params_dtype": ("float16", AWARE | {"optimizer.fp8_recipe": "tensorwise"}),
    "optimizer.exp_avg_dtype": ("bfloat16", AWARE),
    "optimizer.exp_avg_sq_dtype": ("uint8", AWARE),
    "optimizer.optimizer_cpu_offload": (True, {"optimizer.optimizer_offload_fraction": 0.5}),
    "optimizer.optimizer_offload_fraction": (0.5, OFFLOADED),
    # gradients
    "ddp.grad_reduce_in_fp32": (False, {}),
    "ddp.use_distributed_optimizer": (False, UNSHARDED),
    "ddp.num_distributed_optimizer_instances": (2, {}),
    "ddp.param_name_patterns_for_fp32_local_accumulation": (("all",), {"ddp.grad_reduce_in_fp32": False}),
}

REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            "model.activation_func_fp8_input_store",
            "model.batch_invariant_mode",
            "model.cpu_offloading",
            "model.delay_wgrad_compute",
            "model.distribute_saved_activations",
            "model.enable_cuda_graph",
            "model.ep_overlap_early_attn_memory_release",
            "model.external_cuda_graph",
            "model.fine_grained_activation_offloading",
            "model.fp8_dot_product_attention",
            "model.fp8_multi_head_attention",
            "model.fp8_output_proj",
            "model.fused_residual_rmsnorm",
            "model.fused_single_qkv_rope",
            "model.heterogeneous_block_specs",
            "model.hybrid_context_parallel",
            "model.inference_disable_triton_nvls_kernels",
            "model.inference_fuse_tp_communication",
            "model.log_max_attention_logit",
            "model.moe_paged_stash",
            "model.moe_router_padding_for_fp8",
            "model.moe_router_padding_for_quantization",
            "model.mtp_standalone",
            "model.overlap_dispatch_backward_with_experts_wgrad",
            "model.overlap_moe_expert_parallel_comm",
            "model.qk_clip",
            "model.use_kitchen",
            "model.use_te_activation_func",
            "model.use_transformer_engine_full_layer_spec",
            "model.use_transformer_engine_op_fuser",
            "optimizer.optimizer_cuda_graph",
            "optimizer.use_layer_wise_distributed_optimizer",
            "ddp.delay_wgrad_compute",
            "ddp.use_custom_fsdp",
            "ddp.use_megatron_fsdp",
            "comm_overlap.delay_wgrad_compute",
            "comm_overlap.overlap_moe_expert_parallel_comm",
        ),
        (True, {}),
    ),
    "model.deallocate_pipeline_outputs": (False, STAGES),
    "model.fp8_wgrad": (False, EIGHT_BIT),
    "model.fp8_recipe": ("mxfp8", {"model.fp8": "hybrid"}),
    "model.fp4": ("e2m1", {}),
    "model.quant_recipe": ("x", {}),
    "model.cuda_graph_impl": ("transformer_engine", {}),
    "model.experimental_attention_variant": ("gated_delta_net", {}),
    "model.num_microbatches_with_partial_activation_checkpoints": (1, {}),
    "model.tensor_parallel_num_weight_shards": (2, {}),
    "model.expert_tensor_parallel_num_weight_shards": (2, {}),
    "model.gtp_weight_remat_size": (2, {}),
    "model.expert_gtp_weight_remat_size": (2, {}),
    "model.moe_input_jitter_eps": (0.5, EXPERTS),
    "model.moe_expert_capacity_factor": (1.0, EXPERTS),
    "model.moe_expert_rank_capacity_factor": (1.0, EXPERTS),
}

IN_A_HYBRID: dict[str, Any] = {
    "mamba_state_dim": 32,
    "mamba_head_dim": 32,
    "mamba_num_groups": 4,
    "mamba_num_heads": 16,
    "use_mamba_mem_eff_path": False,
    "hybrid_layer_pattern": "ME**E",
}
"""Fields that a hybrid's layers read, each with a value that changes its plan."""

VALUES: dict[str, Any] = {
    "model.params_dtype": "float16",
    "model.activation_offload_fraction": 0.5,
    "model.cp_comm_type": "a2a",
    "model.cuda_graph_modules": [],
    "model.cuda_graph_scope": [],
    "model.window_size": (8, 0),
    "model.timers": MagicMock(),
    "model.flash_attention_version": 2,
    "model.transformer_layer_spec": "decoder block",
    "model.inference_cuda_graph_scope": "none",
    "model.mtp_hybrid_override_pattern": "*-",
    "model.moe_router_load_balancing_type": "none",
    "model.moe_token_drop_policy": "position",
    "model.hierarchical_context_parallel_sizes": [1, 1],
    "model.offload_modules": ["core_attn"],
    "model.mrope_section": [4, 2, 2],
    "model.tp_comm_overlap_cfg": {},
    "optimizer.timers": MagicMock(),
    "optimizer.grad_norm_skip_threshold": 5.0,
    "ddp.data_parallel_sharding_strategy": "optim",
    "ddp.outer_dp_sharding_strategy": "optim",
}
"""Values to try where another of the same type would not do."""

NO_EFFECT: dict[str, str] = {
    "a function, or an object, that a run or a recipe puts there": """model.timers model.finalize_model_grads_func
        model.grad_scale_func model.moe_grad_scale_func model.mtp_grad_scale_func model.no_sync_func model.grad_sync_func
        model.param_sync_func model._cpu_offloading_context model.experimental_attention_variant_loss_scale_func
        model.init_method model.output_layer_init_method model.embedding_init_method model._pg_collection
        model.transformer_layer_spec optimizer.timers""",
    "first values, names and files": """model.perform_initialization model.use_cpu_initialization model.init_method_std
        model.embedding_init_method_std model.init_model_with_meta_device model.hf_model_id model.hf_model_revision
        model.restore_modelopt_state model.config_logger_dir model.hetereogenous_dist_checkpoint model.should_pad_vocab
        optimizer.config_logger_dir""",
    "arithmetic on tensors that are there anyway": """model.softmax_scale model.attention_dropout model.layernorm_epsilon
        model.layernorm_zero_centered_gamma model.glu_linear_offset model.rotary_interleaved
        model.apply_residual_connection_post_layernorm model.qk_clip_alpha model.qk_clip_threshold
        model.calculate_per_token_loss model.use_mup model.mup_width_mult model.mup_base_hidden_size
        model.mup_embedding_mult model.mup_output_mult model.mup_base_head_dim model.mup_attn_scale_power
        model.apply_query_key_layer_scaling model.attention_softmax_in_fp32 model.disable_bf16_reduced_precision_matmul
        model.fp16_lm_cross_entropy model.rotary_base  model.rope_scaling model.rope_scaling_factor
        model.rotary_scaling_factor model.seq_len_interpolation_factor model.yarn_rotary_scaling_factor
        model.yarn_original_max_position_embeddings model.yarn_beta_fast model.yarn_beta_slow model.yarn_mscale
        model.yarn_mscale_all_dim model.yarn_correction_range_round_to_int model.mrope_section model.mtp_loss_scaling_factor
        model.mtp_detach_heads model.moe_router_topk_scaling_factor model.moe_router_bias_update_rate
        model.moe_router_quantile_balancing_ema """,
    "flash attention keeps no scores, whatever it masks": """model.window_size model.window_attn_skip_freq
        model.flash_attention_version model.use_arbitrary_attention_mask model.masked_softmax_fusion""",
    "which kernel does it, and when": """model.deterministic_mode model.enable_autocast model.autocast_dtype
        model.gradient_accumulation_fusion model.use_te_rng_tracker model.persist_layer_norm
        model.memory_efficient_layer_norm model.bias_dropout_fusion model.apply_rope_fusion
        model.use_fused_weighted_squared_relu model.clone_scatter_output_in_embedding model.test_mode
        model.mlp_chunks_for_training model.barrier_with_L1_time model.use_grouped_gemm_for_dense_mlp
        model.dense_grouped_gemm optimizer.barrier_with_L1_time""",
    "set by the number formats: the weights of a run follow bf16 and fp16": """model.params_dtype model.pipeline_dtype
        optimizer.params_dtype""",
    "messages between ranks: their buffers are as large as one message, and NCCL's own": """
        model.pipeline_model_parallel_comm_backend model.tp_comm_overlap model.tp_comm_bulk_wgrad model.tp_comm_bulk_dgrad
        model.tp_comm_overlap_ag model.tp_comm_overlap_rs model.tp_comm_overlap_rs_dgrad model.tp_comm_split_ag
        model.tp_comm_atomic_ag model.tp_comm_split_rs model.tp_comm_atomic_rs model.tp_comm_overlap_disable_qkv
        model.tp_comm_overlap_disable_fc1 model.tp_comm_bootstrap_backend model.tp_comm_overlap_cfg
        model.overlap_p2p_comm model.overlap_p2p_comm_warmup_flush model.batch_p2p_comm model.batch_p2p_sync
        model.use_ring_exchange_p2p model.cp_comm_type model.hierarchical_context_parallel_sizes
        model.high_priority_a2a_comm_stream model.symmetric_ar_type model.variable_seq_lengths
        model.max_seqlen_per_dp_cp_rank
        ddp.overlap_grad_reduce ddp.overlap_param_gather ddp.align_param_gather ddp.check_for_nan_in_grad
        ddp.check_for_large_grads ddp.bucket_size ddp.num_buckets ddp.pad_buckets_for_high_nccl_busbw
        ddp.reduce_scatter_with_fp32_accumulation ddp.average_in_collective ddp.gradient_reduce_div_fusion ddp.nccl_ub
        ddp.disable_symmetric_registration optimizer.overlap_param_gather
        optimizer.overlap_param_gather_with_optimizer_step
        comm_overlap.tp_comm_overlap comm_overlap.tp_comm_overlap_cfg comm_overlap.tp_comm_bootstrap_backend
        comm_overlap.overlap_p2p_comm comm_overlap.batch_p2p_comm comm_overlap.overlap_grad_reduce
        comm_overlap.overlap_param_gather comm_overlap.overlap_param_gather_with_optimizer_step
        comm_overlap.align_param_gather comm_overlap.bucket_size comm_overlap.data_parallel_size""",
    "read only beside a field that is refused": """model.cpu_offloading_num_layers
        model.cpu_offloading_activations model.cpu_offloading_weights model.cpu_offloading_double_buffering
        model.cpu_offloading_retain_pinned_cpu_buffers model.offload_modules model.min_offloaded_tensor_size
        model.delay_offload_until_cuda_graph model.delta_offload_bytes_across_pp_ranks model.activation_offload_fraction
        model.fine_grained_offloading_max_inflight_offloads model.moe_paged_stash_page_size
        model.moe_paged_stash_buffer_size_factor_cuda model.moe_paged_stash_buffer_size_factor_cpu
        model.cuda_graph_use_single_mempool model.cuda_graph_retain_backward_graph model.cuda_graph_warmup_steps
        model.cuda_graph_modules model.cuda_graph_scope model.fp4_recipe model.fp4_param model.fp4_quantizer_factory
        model.fp8_quantizer_factory model.use_kitchen_attention model.kitchen_attention_backend
        model.moe_token_dropping model.moe_pad_expert_input_to_capacity model.moe_token_drop_policy
        model.dsa_indexer_n_heads model.dsa_indexer_head_dim model.dsa_indexer_topk model.dsa_indexer_topk_freq
        model.dsa_indexer_skip_topk_offset model.dsa_indexer_loss_coeff model.dsa_indexer_use_sparse_loss
        model.dsa_kernel_backend model.dsa_indexer_rope_interleaved model.dsa_indexer_rotate_activation
        model.dsa_indexer_scoring_relu model.dsa_indexer_k_norm_epsilon model.dsa_indexer_k_norm_fp32
        model.linear_attention_freq model.linear_conv_kernel_dim model.linear_key_head_dim model.linear_value_head_dim
        model.linear_num_key_heads model.linear_num_value_heads
        ddp.data_parallel_sharding_strategy ddp.suggested_communication_unit_size ddp.keep_fp8_transpose_cache
        ddp.fsdp_double_buffer ddp.fsdp_db_use_persist_buf_on_alloc_fail ddp.fsdp_all_gather_in_start_param_sync
        ddp.outer_dp_sharding_strategy ddp.fsdp_manual_registration ddp.megatron_fsdp_main_params_dtype
        ddp.megatron_fsdp_main_grads_dtype ddp.megatron_fsdp_grad_comm_dtype ddp.megatron_fsdp_use_decoupled_grad
        ddp.megatron_fsdp_cuda_graph_mode ddp.megatron_fsdp_enable_fine_grained_param_gather
        ddp.megatron_fsdp_max_pool_double_buffer ddp.reuse_grad_buf_for_mxfp8_param_ag ddp.fp4_param_gather
        optimizer.reuse_grad_buf_for_mxfp8_param_ag optimizer.muon_momentum optimizer.muon_split_qkv
        optimizer.muon_nesterov optimizer.muon_scale_mode optimizer.muon_fp32_matmul_prec optimizer.muon_coefficient_type
        optimizer.muon_num_ns_steps optimizer.muon_tp_mode optimizer.muon_extra_scale_factor
        optimizer.muon_scalar_optimizer optimizer.soap_shampoo_beta optimizer.soap_precondition_frequency
        optimizer.soap_use_kl_shampoo optimizer.adaptive_muon_moment2_method optimizer.adaptive_muon_beta2
        optimizer.adaptive_muon_eps""",
    "scales of 8-bit tensors, a number for each": """model.fp8_margin model.fp8_interval model.fp8_amax_history_len
        model.fp8_amax_compute_algo model.tp_only_amax_red""",
    "follows model.fp8_param, which decides": "ddp.fp8_param_gather",
    "hybrids only, whose layers read it; `IN_A_HYBRID` counts it there": """model.is_hybrid_model
        model.mamba_state_dim model.mamba_head_dim model.mamba_num_groups model.mamba_num_heads
        model.use_mamba_mem_eff_path model.mamba_training_ssm_states_dtype model.mtp_hybrid_override_pattern""",
    "the plan takes every expert to get equally many tokens, and experts in groups keep what single ones keep": """
        model.moe_router_load_balancing_type model.moe_router_enable_expert_bias
         model.moe_router_num_groups
          model.moe_router_force_load_balancing
        model.moe_router_force_biased model.moe_enable_routing_replay model.moe_grouped_gemm
        model.moe_single_grouped_weight model.moe_single_grouped_bias  
        model.moe_enable_deepep model.moe_flex_dispatcher_backend model.moe_permute_fusion_into_hybridep
        model.moe_hybridep_pad_uneven_dispatch_inputs model.moe_per_layer_logging
        model.moe_pad_experts_for_cuda_graph_inference model.moe_permute_fusion model.moe_router_fusion
        model.moe_shared_expert_overlap model.use_grouped_gemm_for_shared_expert
        model.moe_shared_expert_glu_interleave_size model.moe_mlp_glu_interleave_size model.moe_flex_dispatcher_num_sms
        model.moe_deepep_num_sms model.moe_hybridep_num_sms model.moe_hybridep_num_blocks_permute
        model.moe_hybridep_num_blocks_unpermute model.moe_hybridep_num_sms_preprocessing model.moe_ncclep_static_shape
        model.moe_ncclep_zero_copy""",
    "inference only": """model.flash_decode model.inference_rng_tracker model.inference_sampling_seed
        model.nccl_all_reduce_for_prefill model.use_inference_optimized_layers 
         model.inference_grouped_gemm_backend
        model.inference_moe_disable_fused_quant_kernels model.inference_moe_token_dispatcher_type
        model.inference_cuda_graph_scope model.mlp_chunks_for_prefill""",
    "Bridge's layer specs do not read it": "model.qk_l2_norm",
    "a flag that Bridge derives": "model.mtp_enabled",
    "how far and when the optimizer steps": """optimizer.lr optimizer.min_lr optimizer.decoupled_lr
        optimizer.decoupled_min_lr optimizer.weight_decay optimizer.apply_wd_to_qk_layernorm optimizer.loss_scale
        optimizer.initial_loss_scale optimizer.min_loss_scale optimizer.loss_scale_window optimizer.hysteresis
        optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adam_eps optimizer.decoupled_weight_decay
        optimizer.sgd_momentum optimizer.lion_beta1 optimizer.lion_beta2 optimizer.clip_grad
        optimizer.grad_norm_skip_threshold optimizer.log_num_zeros_in_grad""",
    "memory of the host": """optimizer.use_torch_optimizer_for_cpu_offload optimizer.overlap_cpu_optimizer_d2h_h2d
        optimizer.pin_cpu_grads optimizer.pin_cpu_params""",
    "Core checks it and nothing reads it: gradients follow ddp.grad_reduce_in_fp32": "optimizer.main_grads_dtype",
}

BESIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.overlap_p2p_comm_warmup_flush": (
        True,
        STAGES | UNBATCHED | {"model.virtual_pipeline_model_parallel_size": 2},
    ),
    "model.variable_seq_lengths": (True, STAGES | {"model.moe_token_dispatcher_type": "alltoall"}),
    "model.moe_router_enable_expert_bias": (True, EXPERTS | {"model.moe_router_score_function": "sigmoid"}),
    "model.moe_single_grouped_weight": (
        True,
        EXPERTS | {"model.moe_grouped_gemm": True, "model.use_transformer_engine_op_fuser": True},
    ),
    "model.moe_single_grouped_bias": (
        True,
        EXPERTS
        | {"model.moe_grouped_gemm": True, "model.add_bias_linear": True, "model.expert_tensor_parallel_size": 1},
    ),
    "model.fp4_param": (True, {"model.fp4": "e2m1"}),
    "model.moe_pad_expert_input_to_capacity": (True, EXPERTS | {"model.moe_expert_capacity_factor": 1.0}),
}
"""Fields without effect that upstream takes only with others beside them, which may be refused."""

"""The classes of `local_layers`: each has the arguments, parameters and results of Transformer Engine's of that name.

Source: megatron-core extensions/transformer_engine.py @ 0.19.2
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none


class TENorm:
    """The norm that the configuration names."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, has_residual: bool = False) -> Any:
        return WrappedTorchNorm(config=config, hidden_size=hidden_size, eps=eps)


class TELinear(torch.nn.Module):
    """A linear layer whose weight every tensor-parallel rank holds whole."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool = False,
        is_expert: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        if parallel_mode != "duplicated" or skip_weight_param_allocation or is_expert:
            raise NotImplementedError(
                f"TELinear(parallel_mode={parallel_mode!r}, is_expert={is_expert}) has no local form; "
                "TEColumnParallelLinear and TERowParallelLinear have"
            )
        self.config, self.te_return_bias = config, skip_bias_add and bias
        self.in_features, self.out_features = input_size, output_size
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))
        else:
            self.register_parameter("bias", None)
        if config.perform_initialization:
            init_method(self.weight)
        for parameter in self.parameters():
            parameter.allreduce, parameter.tensor_model_parallel = True, False
            parameter.sequence_parallel = config.sequence_parallel  # its gradient is one of a part of the sequence

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None if self.te_return_bias else self.bias
        return torch.nn.functional.linear(x, self.weight, bias), self.bias if self.te_return_bias else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group_if_none(None),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def backward_dw(self) -> None:
        """Nothing: the gradient of the weight is not delayed."""


class TEColumnParallelLinear(ColumnParallelLinear):
    """Core's own, whose output stays with its rank."""

    def __init__(self, *args: Any, gather_output: bool = False, **options: Any) -> None:
        if gather_output:
            raise ValueError("Transformer Engine linear layers do not support gather_output = True")
        super().__init__(*args, gather_output=False, **options)
        self.in_features, self.out_features = self.input_size, self.output_size_per_partition

    def backward_dw(self) -> None:
        """Nothing: the gradient of the weight is not delayed."""


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    """A norm and a column-parallel layer; the norm's parameters are called `layer_norm_weight` and `_bias`."""

    def __init__(self, *args: Any, config: Any, **options: Any) -> None:
        super().__init__(*args, config=config, **options)
        norm = TENorm(config, self.input_size, config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight
        self.register_parameter("layer_norm_bias", getattr(norm, "bias", None))
        self.return_layernorm_output = False  # LoRA asks for it, because its own layers come after the norm
        self.return_layernorm_output_gathered = False
        self.__dict__["norm"] = norm  # no child: its parameters stand in a checkpoint under this layer's names

    def forward(self, x: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        parameters = self.norm._parameters
        parameters["weight"] = self.layer_norm_weight
        if self.layer_norm_bias is not None:
            parameters["bias"] = self.layer_norm_bias
        normal = self.norm(x)
        out, bias = super().forward(normal)
        if self.return_layernorm_output_gathered:
            normal = gather_from_sequence_parallel_region(normal, group=self.tp_group)
        return ((out, normal) if self.return_layernorm_output else out), bias


class TERowParallelLinear(RowParallelLinear):
    """Core's own, whose input is each rank's part."""

    def __init__(self, *args: Any, input_is_parallel: bool = True, **options: Any) -> None:
        if not input_is_parallel:
            raise ValueError("Transformer Engine linear layers do not support input_is_parallel = False")
        super().__init__(*args, input_is_parallel=True, **options)
        self.in_features, self.out_features = self.input_size_per_partition, self.output_size

    def backward_dw(self) -> None:
        """Nothing: the gradient of the weight is not delayed."""


class TEDotProductAttention(DotProductAttention):
    """Core's own, for heads whose values are not as wide as their keys, too."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        if softmax_scale is None and k_channels is not None:
            softmax_scale = k_channels**-0.5
        if getattr(config, "qk_clip", False) or getattr(config, "log_max_attention_logit", False):
            raise NotImplementedError(
                "qk_clip and log_max_attention_logit need the largest score of Transformer Engine's attention, "
                "which Core's own does not tell: set both to False"
            )
        super().__init__(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout,
            softmax_scale,
            cp_comm_type,
            pg_collection,
        )
        if isinstance(self.softmax_offset, torch.nn.Parameter):  # each rank has those of its heads
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        # latent attention widens the values of packed sequences
        self.hidden_size_per_partition = value.size(-1) * self.num_attention_heads_per_partition
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        kind = attn_mask_type or self.attn_mask_type
        hidden = _other_sequences(packed_seq_params, len(query), len(key), causal="causal" in kind.name)
        packed = (part.unsqueeze(1) for part in (query, key, value))  # [tokens, heads, width]: a batch of one
        return super().forward(*packed, hidden[None, None], attn_mask_type, attention_bias).squeeze(1)


class TECudaRNGStatesTracker(CudaRNGStatesTracker):
    """Core's own, whose states are generators."""

    def __init__(self, is_inference_rng_tracker: bool = False) -> None:
        super().__init__(use_cudagraphable_rng=True, is_inference_rng_tracker=is_inference_rng_tracker)


def _other_sequences(packed: Any, queries: int, keys: int, *, causal: bool) -> torch.Tensor:
    """What a query of a packed batch must not see: other sequences, the padding behind its own, and what comes later.

    Returns:
        A mask [queries, keys], True where a key is hidden.
    """

    def places(tokens: int, ends: torch.Tensor, padded: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Of each token: its sequence, its place there, and whether it is padding."""
        begins = ends if padded is None else padded
        where = torch.arange(tokens, device=begins.device)
        sequence = torch.searchsorted(begins[1:].contiguous(), where, right=True).clamp(max=len(begins) - 2)
        place = where - begins[sequence]
        return sequence, place, place >= ends.diff()[sequence]

    of_query, at_query, _ = places(queries, packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
    of_key, at_key, nothing = places(keys, packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded)
    hidden = (of_query[:, None] != of_key) | nothing
    return hidden | (at_query[:, None] < at_key) if causal else hidden

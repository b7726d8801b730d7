"""Core attention on a CPU rank equals a plain computation, for every feature that a layer spec can ask of it; so do layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SEQUENCE, BATCH, HEADS, GROUPS, WIDTH = 12, 2, 4, 2, 8

# Fields of the model's configuration, arguments of the layer, and whether a mask is given.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "causal": ({}, {}, False),
    "window": ({"window_size": (3, 0)}, {}, False),
    "window, open at the left": ({"window_size": (-1, 0)}, {}, False),
    "window, and a mask": ({"window_size": (3, 0)}, {}, True),
    "window on other layers": ({"window_size": (3, 0), "window_attn_skip_freq": 1}, {}, False),
    "window on this layer": ({"window_size": (3, 0), "window_attn_skip_freq": [1, 0]}, {}, False),
    "mask": ({}, {}, True),
    "scale": ({}, {"softmax_scale": 0.7}, False),
    "scale by layer": ({"apply_query_key_layer_scaling": True}, {"layer_number": 2}, False),
    "one is added to the sum": ({"softmax_type": "off-by-one"}, {}, False),
    "a sink to learn": ({"softmax_type": "learnable"}, {}, False),
    "a sink to learn, in a window": ({"softmax_type": "learnable", "window_size": (3, 0)}, {}, False),
    "narrow values": ({}, {"k_channels": WIDTH, "v_channels": 6}, False),
    "narrow values in a window": ({"window_size": (3, 0)}, {"k_channels": WIDTH, "v_channels": 6}, False),
}


def plain(query, key, value, *, scale, window, sink, mask):
    """Scores, mask, softmax and sum, written out; tensors are [sequence, batch, heads, width], mask True hides."""
    import torch

    key, value = (part.repeat_interleave(HEADS // GROUPS, dim=2) for part in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    distance = torch.arange(SEQUENCE)[:, None] - torch.arange(SEQUENCE)[None, :]
    seen = (distance >= 0) & (distance <= (window if window is not None else SEQUENCE))
    seen = seen if mask is None else seen & ~mask
    scores = scores.masked_fill(~seen, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink.view(1, -1, 1, 1) - largest).exp()
    return torch.einsum("bhqk,kbhd->qbhd", weights / total, value).flatten(2)


def rank_attention(_: str) -> None:
    """In each of one or two ranks, which then share the sequence: values and all gradients of every case."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.experimental_attention_variant import dsa_layout

    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(1)
    mine = dsa_layout.build_zigzag_cp_local_positions(SEQUENCE, size, rank, torch.device("cpu"))
    for name, (fields, arguments, masked) in CASES.items():
        if masked and size > 1:
            continue
        torch.manual_seed(2)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=HEADS * WIDTH,
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            attention_dropout=0.0,
            context_parallel_size=size,
            **fields,
        )
        layer = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self", **arguments}
        attention = TEDotProductAttention(config=config, **layer)
        values = arguments.get("v_channels", WIDTH)
        shapes = [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, values)]
        whole = [torch.randn(SEQUENCE, BATCH, *shape, requires_grad=True) for shape in shapes]
        back = torch.randn(SEQUENCE, BATCH, HEADS * values)
        sink = {"off-by-one": torch.zeros(HEADS), "learnable": torch.randn(HEADS)}.get(config.softmax_type)
        leaves = list(whole)
        if config.softmax_type == "learnable":
            attention.softmax_offset.data.copy_(sink)
            sink.requires_grad_()
            leaves.append(sink)
        mask = torch.tensor([row >= 6 > column for row in range(SEQUENCE) for column in range(SEQUENCE)])
        mask = mask.view(SEQUENCE, SEQUENCE) if masked else None  # the second document does not see the first
        scale = arguments.get("softmax_scale", WIDTH**-0.5)
        everywhere = name == "window on other layers" or fields.get("window_size", (-1, 0))[0] < 0
        expected = plain(*whole, scale=scale, window=None if everywhere else 3, sink=sink, mask=mask)
        expected_gradients = torch.autograd.grad(expected, leaves, back)

        given = None
        if mask is not None:  # upstream wants a whole mask: the later keys are hidden, too
            given = (mask | torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1))[None, None]
        inputs = [part.detach()[mine].requires_grad_() for part in whole]
        own = [*inputs, *([attention.softmax_offset] if len(leaves) == 4 else [])]
        out = attention(*inputs, given, AttnMaskType.causal)
        gradients = list(torch.autograd.grad(out, own, back[mine]))
        wanted = [part[mine] for part in expected_gradients[:3]] + list(expected_gradients[3:])
        if len(leaves) == 4:
            dist.all_reduce(gradients[3])
        for got, right in zip([out, *gradients], [expected[mine], *wanted], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    dist.destroy_process_group()


def test_attention_equals_a_plain_computation(in_ranks, tmp_path: Path) -> None:
    """Windows, masks, scales, sinks and values of another width: nothing is left out without a word."""
    in_ranks(rank_attention, tmp_path)


def test_attention_of_a_shared_sequence_equals_a_plain_computation(in_ranks, tmp_path: Path) -> None:
    """The same where two ranks hold half of the sequence each."""
    in_ranks(rank_attention, tmp_path, ranks=2)


def rank_packed(_: str) -> None:
    """In one rank: sequences of 5, 1 and 4 tokens in a row, with and without padding behind each."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    ends = [0, 5, 6, 10]
    for begins in (ends, [0, 6, 8, SEQUENCE]):
        for window in (None, (2, 0)):
            for kind in (AttnMaskType.causal, AttnMaskType.no_mask):
                config = TransformerConfig(
                    num_layers=1,
                    hidden_size=HEADS * WIDTH,
                    num_attention_heads=HEADS,
                    num_query_groups=GROUPS,
                    attention_dropout=0.0,
                    window_size=window,
                )
                attention = TEDotProductAttention(config, 1, kind, "self")
                tokens, widths = begins[-1], [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, WIDTH + 2)]
                whole = [torch.randn(tokens, heads, width, requires_grad=True) for heads, width in widths]
                real = [slice(begins[n], begins[n] + ends[n + 1] - ends[n]) for n in range(3)]
                alone = [attention(*(part[s][:, None] for part in whole), None, kind)[:, 0] for s in real]
                lengths, padded = torch.tensor(ends, dtype=torch.int32), torch.tensor(begins, dtype=torch.int32)
                packed = PackedSeqParams("thd", lengths, lengths, *([padded, padded] if begins != ends else []))
                out = attention(*whole, None, kind, packed_seq_params=packed)
                back = torch.randn(tokens, HEADS * (WIDTH + 2))
                together = torch.autograd.grad(sum((out[s] * back[s]).sum() for s in real), whole)
                apart = torch.autograd.grad(sum((a * back[s]).sum() for a, s in zip(alone, real, strict=True)), whole)
                for got, right in zip([*(out[s] for s in real), *together], [*alone, *apart], strict=True):
                    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


def test_packed_sequences_do_not_see_each_other(in_ranks, tmp_path: Path) -> None:
    """Values and gradients of each sequence are those that it has alone, whatever stands beside it as padding."""
    in_ranks(rank_packed, tmp_path)


def rank_layers(_: str) -> None:
    """In one rank: a norm inside a layer, what LoRA is given of it, and the convolution of a gated delta net."""
    import torch
    import torch.distributed as dist
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.lora_layers import LoRALinear
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.ssm.gated_delta_net import gdn
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    for normalization, zero_centred in (("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", True)):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            normalization=normalization,
            layernorm_zero_centered_gamma=zero_centred,
        )
        options = {"gather_output": False, "bias": False, "skip_bias_add": True, "is_expert": False}
        layer = TELayerNormColumnParallelLinear(8, 6, config=config, init_method=torch.nn.init.normal_, **options)
        x = torch.randn(5, 2, 8, requires_grad=True)
        with torch.no_grad():
            layer.layer_norm_weight.add_(0.3)
        plain = torch.nn.functional.rms_norm if normalization == "RMSNorm" else torch.nn.functional.layer_norm
        others = () if normalization == "RMSNorm" else (layer.layer_norm_bias,)
        weight = layer.layer_norm_weight + 1 if zero_centred else layer.layer_norm_weight
        assert abs(float(weight[0].detach()) - 1.3) < 1e-6  # a new norm changes nothing
        normal = plain(x, (8,), weight, *others, eps=config.layernorm_epsilon)
        torch.testing.assert_close(layer(x)[0], normal @ layer.weight.T)
        leaves = [x, layer.layer_norm_weight]
        gradients = (torch.autograd.grad(out.sum(), leaves) for out in (layer(x)[0], normal @ layer.weight.T))
        for got, right in zip(*gradients, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
        assert set(dict(layer.named_parameters())) >= {"weight", "layer_norm_weight"}

        attributes = utils.get_adapter_attributes_from_linear(layer)
        assert (attributes.in_features, attributes.out_features, attributes.input_is_parallel) == (8, 6, False)
        adapter = torch.nn.Linear(8, 6, bias=False)
        out, _ = LoRALinear(layer, adapter)(x)
        torch.testing.assert_close(out, normal @ layer.weight.T + adapter(normal))

    x, weight = torch.randn(2, 7, 3), torch.randn(3, 4)  # [batch, sequence, channels], [channels, width]
    out, _ = gdn.causal_conv1d(x=x, weight=weight, bias=None, activation="silu")
    past = torch.cat([torch.zeros(2, 3, 3), x], dim=1)
    right = sum(past[:, shift : shift + 7] * weight[:, shift] for shift in range(4))
    torch.testing.assert_close(out, torch.nn.functional.silu(right))
    dist.destroy_process_group()


def test_layers_with_a_norm_inside_are_a_norm_and_a_layer(in_ranks, tmp_path: Path) -> None:
    """Values, gradients and names; an adapter of LoRA, which comes after the norm, gets the norm's output."""
    in_ranks(rank_layers, tmp_path)

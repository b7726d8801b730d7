"""Mamba layers of a CPU rank: the chunks give the recurrence, the layer gives transformers' and its own step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BATCH, HEADS, WIDTH, GROUPS, STATES = 2, 8, 16, 2, 16


def recurrence(x, dt, A, B, C, *, document, state):
    """One token after the other, as the definition says; shapes as in `state_space.scan`."""
    import torch

    B, C = (tensor.repeat_interleave(HEADS // GROUPS, 2) for tensor in (B, C))
    state = x.new_zeros(BATCH, HEADS, WIDTH, STATES) if state is None else state
    out = []
    for t in range(x.shape[1]):
        keep = (dt[:, t] * A).exp()
        if document is not None and t:
            keep = keep * (document[:, t] == document[:, t - 1])[:, None]
        write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = keep[..., None, None] * state + write
        out.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(out, 1), state


def inputs(length: int, dtype: Any) -> list[Any]:
    """Tokens, steps between 0.001 and 0.1, decays from 1 to 16 a step, so that a state lives on beyond a chunk."""
    import torch

    torch.manual_seed(1)
    shapes = (HEADS, WIDTH), (GROUPS, STATES), (GROUPS, STATES)
    x, B, C = (torch.randn(BATCH, length, *shape, dtype=dtype) for shape in shapes)
    dt = torch.exp(torch.rand(BATCH, length, HEADS, dtype=dtype) * 4.6 - 6.9)
    return [tensor.requires_grad_() for tensor in (x, dt, -torch.rand(HEADS, dtype=dtype) * 15 - 1, B, C)]


@pytest.mark.parametrize("given", ["nothing", "documents", "state", "documents and state"])
@pytest.mark.parametrize(("name", "largest"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("length", [20, 64, 75])
def test_chunks_give_the_recurrence(bridge: Any, name: str, largest: float, given: str, length: int) -> None:
    """Outputs, last state and all gradients, shorter than a chunk of 32, of two whole ones, and beyond."""
    import torch

    from course_lib.stack import state_space

    dtype, found = getattr(torch, name), []
    document = torch.arange(length).ge(7).int() + torch.arange(length).ge(41) if "documents" in given else None
    document = None if document is None else document.expand(BATCH, -1)
    for function in (
        lambda *them, state: recurrence(*them, document=document, state=state),
        lambda *them, state: state_space.scan(*them, 32, seq_idx=document, initial_states=state),
    ):
        leaves = inputs(length, dtype)
        state = torch.randn(BATCH, HEADS, WIDTH, STATES, dtype=dtype).requires_grad_() if "state" in given else None
        y, last = function(*leaves, state=state)
        (y.sin().sum() + last.cos().sum()).backward()
        found.append([y, last, *(leaf.grad for leaf in leaves), *([] if state is None else [state.grad])])
    for mine, right in zip(found[1], found[0], strict=True):
        assert float((mine - right).detach().abs().max() / right.detach().abs().max()) < largest


def test_a_document_in_a_row_is_as_if_it_stood_alone(bridge: Any) -> None:
    """The whole function with its convolution: a row of three documents against three rows, values and gradients."""
    import torch

    from course_lib.stack import state_space

    inner, mixed = HEADS * WIDTH, HEADS * WIDTH + 2 * GROUPS * STATES
    torch.manual_seed(2)
    weights = (
        torch.randn(mixed, 4),
        torch.randn(mixed),
        torch.rand(HEADS) - 4,
        -torch.rand(HEADS) * 4,
        torch.ones(HEADS),
    )
    row = torch.randn(1, 50, inner + mixed + HEADS).requires_grad_()
    document = torch.tensor([0] * 21 + [1] * 2 + [2] * 27)[None]
    options = {"chunk_size": 16, "headdim": WIDTH, "ngroups": GROUPS}
    whole = state_space.mamba_split_conv1d_scan_combined(row, *weights, seq_idx=document, **options)
    parts = [
        state_space.mamba_split_conv1d_scan_combined(part, *weights, **options) for part in row.split([21, 2, 27], 1)
    ]
    alone = torch.cat(parts, 1)
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.sin().sum(), row)[0] for out in (whole, alone)), rtol=1e-4, atol=1e-4
    )


def test_the_layer_gives_transformers_numbers(bridge: Any) -> None:
    """transformers' Mamba 2 and its grouped norm, written by other people: values and gradients, beyond three chunks."""
    import torch
    from torch.nn import functional
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    from course_lib.stack import state_space

    torch.manual_seed(3)
    config = Mamba2Config(
        **{"hidden_size": 64, "num_heads": HEADS, "head_dim": WIDTH, "state_size": STATES, "n_groups": GROUPS},
        **{"chunk_size": 16, "expand": 2, "num_hidden_layers": 1, "vocab_size": 8},
    )
    theirs, inner = Mamba2Mixer(config, layer_idx=0), HEADS * WIDTH
    with torch.no_grad():
        theirs.dt_bias.copy_(torch.rand(HEADS) * 4.6 - 6.9)
    norm = Zamba2RMSNormGated(inner, inner // GROUPS, eps=1e-5)
    mine = state_space.GatedRMSNorm(inner, group_size=inner // GROUPS, norm_before_gate=False)
    for one in (norm, mine):
        one.weight.data.copy_(torch.linspace(0.5, 2, inner))
    y, gate = torch.randn(2, 5, inner), torch.randn(2, 5, inner)
    torch.testing.assert_close(mine(y, gate), norm(y, gate))
    torch.testing.assert_close(mine(y * functional.silu(gate)), norm(y, gate))

    theirs.norm = norm
    tokens = torch.randn(BATCH, 55, 64).requires_grad_()
    right = theirs.torch_forward(tokens)
    out = state_space.mamba_split_conv1d_scan_combined(
        theirs.in_proj(tokens),
        theirs.conv1d.weight[:, 0],
        theirs.conv1d.bias,
        theirs.dt_bias,
        -theirs.A_log.exp(),
        theirs.D,
        chunk_size=16,
        headdim=WIDTH,
        ngroups=GROUPS,
    )
    ours = theirs.out_proj(mine(out))
    torch.testing.assert_close(ours, right)
    leaves = [tokens, theirs.A_log, theirs.dt_bias, theirs.D, *theirs.conv1d.parameters(), *theirs.in_proj.parameters()]
    for got, wanted in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (ours, right)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def rank_step_by_step(_: str) -> None:
    """Core's own mixer in inference: a prompt at once and tokens one by one give what training gives for all at once."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mamba_mixer import MambaMixer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    mamba = {"mamba_num_heads": HEADS, "mamba_head_dim": WIDTH, "mamba_state_dim": STATES}
    submodules = hybrid_stack_spec.submodules.mamba_layer.submodules.mixer.submodules
    for groups in (1, GROUPS):
        torch.manual_seed(4)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=64,
            num_attention_heads=4,
            normalization="RMSNorm",
            mamba_num_groups=groups,
            **mamba,
        )
        mixer = MambaMixer(
            config, submodules, 64, chunk_size=8, layer_number=1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ).eval()  # fmt: skip
        tokens = torch.randn(20, 1, 64)  # upstream takes several rows, of one token each, for a sequence
        with torch.no_grad():
            whole, _ = mixer(tokens)
            context = StaticInferenceContext(1, 20)
            context.seqlen_offset = 0
            with InferenceMode.active():
                parts = [mixer(tokens[:13], inference_context=context)[0]]
                for place in range(13, 20):
                    context.sequence_len_offset = context.seqlen_offset = place  # as HybridStack sets it
                    parts.append(mixer(tokens[place : place + 1], inference_context=context)[0])
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
        mixer.use_mem_eff_path = False  # Nemotron-H's recipes train so
        torch.testing.assert_close(mixer(tokens)[0], whole, rtol=1e-4, atol=1e-5)


def test_a_state_takes_tokens_one_by_one(in_ranks: Any, tmp_path: Path) -> None:
    """As in generation, where nothing but the state and the last four tokens is kept."""
    in_ranks(rank_step_by_step, tmp_path)


def rank_continue_with_a_cache(_: str) -> None:
    """A whole hybrid continues a prompt greedily: states, keys and values give what the whole text from its begin gives."""
    import torch
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from course_lib.stack import devices
    from support import families

    cfg = devices.applied(families.hybrid(model__vocab_size=512, model__mamba_chunk_size=8))
    provider = cfg.model
    provider.should_pad_vocab = False
    provider.finalize()
    torch.manual_seed(7)
    with temporary_distributed_context(backend="gloo"):
        model = provider.provide_distributed_model(wrap_with_ddp=False)[0].eval()
        assert isinstance(model, HybridModel)
        ids, cached = torch.randint(0, 512, (1, 13)), []

        def logits(tokens: Any, places: Any, context: Any = None) -> Any:
            return model(tokens, places, None, inference_context=context, runtime_gather_output=True)[0, -1]

        with torch.no_grad():
            whole, texts = [], ids
            for _ in range(9):
                whole.append(logits(texts, torch.arange(texts.shape[1])[None]))
                texts = torch.cat([texts, whole[-1].argmax().view(1, 1)], 1)
            context, begun, part = StaticInferenceContext(1, 32), ids, 0
            with InferenceMode.active():
                for _ in range(9):
                    new = begun[:, part:]
                    cached.append(logits(new, torch.arange(part, begun.shape[1])[None], context))
                    context.increment_sequence_len_offset(new.shape[1])
                    part = begun.shape[1]
                    begun = torch.cat([begun, cached[-1].argmax().view(1, 1)], 1)
    assert begun.tolist() == texts.tolist()
    torch.testing.assert_close(torch.stack(cached), torch.stack(whole), rtol=1e-4, atol=1e-5)


def test_a_hybrid_generates_with_a_cache_what_it_generates_without(in_ranks: Any, tmp_path: Path) -> None:
    """Prompt at once, then one token at a time: the same tokens and logits as from the whole text each time."""
    in_ranks(rank_continue_with_a_cache, tmp_path)


def test_what_a_hybrid_keeps_while_it_generates(bridge: Any) -> None:
    """Nemotron 3 Nano 4B: states and four inputs of the convolution of 21 layers, keys and values of four, in bf16."""
    from megatron.bridge.recipes.nemotronh.nemotron_3_nano_4b import nemotron_3_nano_4b_pretrain_config

    from course_lib.experiments import state_spaces

    cfg = nemotron_3_nano_4b_pretrain_config()
    cfg.tokenizer.vocab_size = cfg.model.vocab_size
    state = 21 * 2 * (96 * 80 * 128 + (96 * 80 + 2 * 8 * 128) * 4)
    assert state_spaces.cache(cfg) == {"state": state, "a token": 4 * 2 * 2 * 8 * 128}

"""A state-space layer beside its definition, beside attention, and beside transformers' fallback; for lesson 17.

Import it after `stack.prepare_imports()`, because it imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from course_lib.stack import state_space

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Chunks", "cache", "chunks", "cost", "decays", "fallback", "recurrence", "sample", "scan"]

scan = state_space.scan


def recurrence(x, dt, A, B, C):
    """Token after token: what was known decays, what comes is written, and what is asked for is read."""
    batch, length, heads, size = x.shape
    states = B.shape[-1]
    state = torch.zeros(batch, heads, size, states, dtype=x.dtype)
    outputs = []
    for t in range(length):
        step = dt[:, t, :, None, None]  # how far this token moves the clock of each head
        kept = (step * A[:, None, None]).exp()  # between 0 and 1, because A is negative
        written = x[:, t, :, :, None] * B[:, t, :, None, :]
        state = kept * state + step * written
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def sample(length: int, *, heads: int = 4, size: int = 16, states: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a scan: steps from 0.001 to 0.1 and decays of up to 16 a step, as fresh Mamba layers have them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, heads, size, generator=draw)
    B, C = (torch.randn(1, length, heads, states, generator=draw) for _ in range(2))
    dt = torch.exp(torch.rand(1, length, heads, generator=draw) * 4.6 - 6.9)
    return {"x": x, "dt": dt, "A": -1 - 15 * torch.rand(heads, generator=draw), "B": B, "C": C}


def decays(dt: torch.Tensor, A: torch.Tensor, *, head: int) -> torch.Tensor:
    """What is left at each token (row) of what an earlier one (column) wrote into a head's state; 0 for later ones."""
    clock = (dt[0, :, head] * A[head]).cumsum(0)
    return (clock[:, None] - clock[None, :]).exp().tril()


def cost(lengths: Iterable[int], *, width: int = 256, repeats: int = 2) -> pd.DataFrame:
    """What causal attention and a scan of one width cost by length: processor time, and the operations of their products.

    Attention has heads of 32 channels and never holds its scores, as in a CPU rank.  The scan has as many channels, heads
    of 32 with 32 states each, and chunks of 128 tokens.  Both work in one thread.

    Returns:
        Columns `length`; `attention ms` and `scan ms`, forward and backward, the shortest of the repeats; `attention GFLOP`
        and `scan GFLOP`, forward, as torch counts them.
    """
    import pandas as pd

    threads, heads, rows = torch.get_num_threads(), width // 32, []
    torch.set_num_threads(1)
    try:
        for length in lengths:
            qkv = torch.randn(3, 1, heads, length, 32, requires_grad=True)
            given = sample(length, heads=heads, size=32, states=32)
            B, C = (given.pop(name)[:, :, :1] for name in "BC")
            x, dt, A = (tensor.requires_grad_() for tensor in given.values())
            attend = partial(functional.scaled_dot_product_attention, *qkv, is_causal=True)
            mix = partial(state_space.mamba_chunk_scan_combined, x, dt, A, B, C, 128)
            row = {"length": length, "attention ms": _ms(attend, repeats), "scan ms": _ms(mix, repeats)}
            q, k, v = qkv.detach().to("meta")
            row |= {"attention GFLOP": _gflop(lambda q=q, k=k, v=v: q @ k.mT @ v), "scan GFLOP": _gflop(mix)}
            rows.append(row)
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def _ms(function: Callable[[], torch.Tensor], repeats: int) -> float:
    def once() -> float:
        begin = time.process_time()
        function().sum().backward(retain_graph=True)
        return 1000 * (time.process_time() - begin)

    return min(once() for _ in range(repeats))


def _gflop(function: Callable[[], torch.Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def cache(cfg: Any) -> dict[str, int]:
    """What a model keeps of one sequence while it generates, read off its real layers without their memory.

    Args:
        cfg: A Bridge ``ConfigContainer`` of a hybrid model.

    Returns:
        Bytes in the format of the weights: `state`, of all Mamba layers, and `a token`, keys and values of all attention
        layers for each token.

    Source: megatron-core ssm/mamba_mixer.py `mamba_state_shapes_per_request` @ 0.19.2.
    """
    from math import prod

    from megatron.core.ssm.mamba_mixer import MambaMixer

    from course_lib.planning import memory, meta_model

    each, state, token = meta_model.precision(cfg).weights, 0, 0
    with meta_model.built(memory.with_layout(cfg), ranks=1) as (model,):
        for module in model.modules():
            if isinstance(module, MambaMixer):  # the layer and the stack around it give its answer, too
                state += each * sum(map(prod, module.mamba_state_shapes_per_request()))
            elif hasattr(module, "core_attention"):
                heads, size = module.num_query_groups_per_partition, module.hidden_size_per_attention_head
                token += each * 2 * heads * size
    return {"state": state, "a token": token}


def fallback(length: int, *, chunk: int = 16) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The scan in transformers' Nemotron-H layer without CUDA.

    Returns:
        What `recurrence` takes, as the layer computes it from random tokens, and what the layer's scan gave
        [1, length, heads, head size].
    """
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMamba2Mixer

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
    config = NemotronHConfig(**sizes, chunk_size=chunk, use_mamba_kernels=False, time_step_min=0.0)
    mixer, tokens = NemotronHMamba2Mixer(config, layer_idx=0), torch.randn(1, length, 64)
    scanned = []
    mixer.norm.register_forward_pre_hook(lambda _, given: scanned.append(given[0]))
    with torch.no_grad():
        mixer.dt_bias.copy_(torch.linspace(-5.0, -3.0, 8))
        mixer.D.zero_()  # what goes around the scan
        mixer.torch_forward(tokens)
        return _scanned(mixer, tokens), scanned[0].unflatten(-1, (8, 16))


def _scanned(mixer: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layer scans: its own projection and convolution of the tokens."""
    heads, groups = mixer.num_heads, mixer.n_groups
    _, mixed, dt = mixer.in_proj(tokens).split([mixer.intermediate_size, mixer.conv_dim, heads], -1)
    mixed = state_space.convolution(mixed, mixer.conv1d.weight[:, 0], mixer.conv1d.bias)
    written = groups * mixer.ssm_state_size
    x, B, C = mixed.split([mixer.intermediate_size, written, written], -1)
    B, C = (part.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for part in (B, C))
    dt = functional.softplus(dt + mixer.dt_bias)
    return {"x": x.unflatten(-1, (heads, -1)), "dt": dt, "A": -mixer.A_log.exp(), "B": B, "C": C}


@dataclass(frozen=True)
class Chunks:
    """States at the ends of chunks, for who hands them on.

    Attributes:
        decay: What is left at the begin of a chunk of the state that another one left [batch, heads, chunk, from chunk].
        left: The state that each chunk leaves [batch, heads, from chunk, head size, states]; the first is the empty one.
        begins: The state before each chunk, by the definition [batch, heads, chunk, head size, states].
    """

    decay: torch.Tensor
    left: torch.Tensor
    begins: torch.Tensor


def chunks(number: int = 5) -> Chunks:
    """A few chunks with random states, in double precision."""
    draw = torch.Generator().manual_seed(2)
    left = torch.randn(1, 3, number, 4, 6, generator=draw, dtype=torch.float64)
    left[:, :, 0] = 0
    rates = torch.rand(1, 3, number, generator=draw, dtype=torch.float64)
    clock = -rates.cumsum(-1)
    begins, state = [], left[:, :, 0]
    for one in range(number):
        state = state if one == 0 else (-rates[:, :, one]).exp()[..., None, None] * state + left[:, :, one]
        begins.append(state)
    decay = (clock[..., :, None] - clock[..., None, :]).exp().tril()
    return Chunks(decay, left, torch.stack(begins, 2))

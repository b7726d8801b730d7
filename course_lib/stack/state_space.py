"""Mamba 2 layers without CUDA: what mamba-ssm and causal-conv1d do for Core's `MambaMixer`, by torch's matrix products.

A state-space layer is a recurrence: for each head, state = exp(dt A) state + dt x B', and y = state C + D x.  Token after
token that is one small product each.  Cut into chunks, what tokens of one chunk give each other is a masked product of
matrices, as in attention, and only one state a chunk is handed on: a chunk's cost is quadratic, the sequence's linear.

Source: Dao and Gu, "Transformers are SSMs", 2024, section 6, for the chunks; megatron-core ssm/mamba_mixer.py @ 0.19.2
for the calls.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional


class _Again(torch.autograd.Function):
    """Keeps the inputs of a function and computes it again for the backward pass, as the kernels do inside a chunk."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: torch.Tensor | None) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        inputs = [kept if kept is None else kept.detach().requires_grad_(needed) for kept, needed in pairs]
        with torch.enable_grad():
            made = ctx.function(*inputs)
        needed = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = dict(zip(map(id, needed), torch.autograd.grad(made, needed, grads, allow_unused=True), strict=True))
        return None, *(found.get(id(tensor)) for tensor in inputs)


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, seq_idx: Any = None) -> torch.Tensor:
    """Each channel of `x` [batch, sequence, channels] with its own past, by `weight` [channels, width], then SiLU.

    Args:
        seq_idx: Number of each token's document [batch, sequence]; documents in one row do not look into each other.
    """
    length, width = x.shape[1], weight.shape[1]
    if seq_idx is None:
        past = functional.pad(x.transpose(1, 2), (width - 1, 0))
        return functional.silu(functional.conv1d(past, weight[:, None], bias, groups=len(weight))).transpose(1, 2)
    out = bias
    for back in range(width):
        tokens = functional.pad(x, (0, 0, back, 0))[:, :length]
        same = functional.pad(seq_idx, (back, 0), value=-1)[:, :length] == seq_idx
        out = out + tokens * same.unsqueeze(-1) * weight[:, width - 1 - back]
    return functional.silu(out)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence without its skip, from a state of zeros or a given one, in chunks.

    Args:
        x: Inputs [batch, sequence, heads, head size].
        dt: Step sizes [batch, sequence, heads], above 0.
        A: Decay of each head [heads], below 0.
        B: What a token writes [batch, sequence, groups, states]; a group's heads share it.
        C: What a token reads, as `B`.
        chunk_size: Tokens of a chunk.
        initial_states: State before the first token [batch, heads, head size, states].
        seq_idx: Number of each token's document [batch, sequence]; a document begins with a state of zeros.

    Returns:
        The outputs in the shape of `x`, and the state after the last token.
    """
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    chunk, share = min(chunk_size, length), heads // groups
    if rest := -length % chunk:  # with dt=0 a token writes nothing, and nothing decays
        x, B, C = (functional.pad(tensor, (0, 0, 0, 0, 0, rest)) for tensor in (x, B, C))
        dt = functional.pad(dt, (0, 0, 0, rest))
        seq_idx = None if seq_idx is None else torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, rest)], 1)
    cut = (batch, (length + rest) // chunk, chunk, groups)
    written = (x * dt.unsqueeze(-1)).view(*cut, share, width).permute(0, 1, 3, 4, 2, 5)  # [b, c, g, heads, tokens, p]
    B, C = (tensor.view(*cut, states).transpose(2, 3) for tensor in (B, C))  # [b, c, g, tokens, n]
    decay = (dt * A).view(*cut, share).permute(0, 1, 3, 4, 2).cumsum(-1)  # log of what is left since a chunk's begin
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    to_end, from_begin, across = (decay[..., -1:] - decay).exp(), decay.exp(), decay[..., -1].exp()
    if seq_idx is not None:
        own = seq_idx.view(cut[:3])
        before = torch.cat([own[:, :1, 0] if initial_states is not None else own[:, :1, 0] - 1, own[:, :-1, -1]], 1)
        seen = seen & (own.unsqueeze(-1) == own.unsqueeze(-2))[:, :, None, None]
        to_end = to_end * (own == own[..., -1:])[:, :, None, None]
        from_begin = from_begin * (own == before.unsqueeze(-1))[:, :, None, None]
        across = across * (own[..., -1] == before)[..., None, None]
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~seen, -torch.inf).exp()
    y = ((C @ B.transpose(-1, -2)).unsqueeze(3) * between) @ written
    left = (written * to_end.unsqueeze(-1)).transpose(-1, -2).flatten(3, 4) @ B  # what a chunk adds to the state
    left = left.unflatten(3, (share, width))
    state = torch.zeros_like(left[:, 0]) if initial_states is None else initial_states.view_as(left[:, 0])
    begins = []
    for number in range(cut[1]):
        begins.append(state)
        state = across[:, number, ..., None, None] * state + left[:, number]
    read = C @ torch.stack(begins, 1).flatten(3, 4).transpose(-1, -2)  # [b, c, g, tokens, heads p]
    y = y + read.unflatten(-1, (share, width)).transpose(3, 4) * from_begin.unsqueeze(-1)
    return y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length], state.flatten(1, 2)


def _layer(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, *, chunk_size, softplus=True):
    """The scan with what stands around it: step sizes from numbers of any sign, the skip, and the gate."""
    kind = torch.promote_types(x.dtype, torch.float32)
    steps = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias
    steps = functional.softplus(steps) if softplus else steps
    inputs = (tensor.to(kind) for tensor in (x, B, C))
    wide, B, C = inputs
    y, state = scan(wide, steps, A, B, C, chunk_size, initial_states=initial_states, seq_idx=seq_idx)
    if D is not None:
        y = y + wide * (D if D.dim() == 2 else D.unsqueeze(-1))
    return (y if z is None else y * functional.silu(z.to(kind))).to(x.dtype), state


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    return_final_states=False,
):  # fmt: skip
    """mamba-ssm's function of this name; shapes as in `scan`, `D` [heads] or [heads, head size], `z` as `x`."""
    function = functools.partial(_layer, chunk_size=chunk_size, softplus=dt_softplus)
    y, state = _Again.apply(function, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, seq_idx=None, activation="silu", headdim=None,
    ngroups=1, norm_before_gate=True,
):  # fmt: skip
    """mamba-ssm's function of this name without its norm and its output layer, which `MambaMixer` does not ask for."""
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"activation={activation!r}: a Mamba layer's is 'silu'")

    def function(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, seq_idx):
        heads = len(A)
        inner = heads * (headdim or D.shape[1])
        z, mixed, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - inner - heads, heads], -1)
        mixed = convolution(mixed, conv1d_weight, conv1d_bias, seq_idx=seq_idx)
        x, B, C = mixed.split([inner, *2 * [(mixed.shape[-1] - inner) // 2]], -1)
        z, x = (tensor.unflatten(-1, (heads, -1)) for tensor in (z, x))
        B, C = (tensor.unflatten(-1, (ngroups, -1)) for tensor in (B, C))
        y, _ = _layer(x, dt, A, B, C, D, z, dt_bias, None, seq_idx, chunk_size=chunk_size)
        return y.flatten(2)

    return _Again.apply(function, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, seq_idx)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """causal-conv1d's function of this name; `x` is [batch, channels, sequence]."""
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"activation={activation!r}: a Mamba layer's is 'silu'")
    return convolution(x.transpose(1, 2), weight, bias, seq_idx=seq_idx).transpose(1, 2)


class GatedRMSNorm(torch.nn.Module):
    """Core's `ExtendedRMSNorm`: each group of channels by its own root mean square, after the gate if there is one."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        if norm_before_gate:
            raise NotImplementedError("norm_before_gate=True: MambaMixer gates first")
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        gated = x if z is None else x * functional.silu(z)
        groups = gated.unflatten(-1, (-1, self.group_size))
        return functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * self.weight

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Cut among the tensor-parallel ranks, as the channels are."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

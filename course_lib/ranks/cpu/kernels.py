"""What kernels do on a GPU, by torch's own operations: fewer passes over memory, and what only a kernel can do there.

A step of a small model spends as long on norms, rotations and activations as on its matrix products, because each of
them walks through memory many times.  The functions here walk as seldom as torch allows, forward and backward, and give
the same numbers to the last few bits; wrappers that do nothing in fp32 are left out.

Source: megatron-core ssm/gated_delta_net/common.py and gdn.py @ 0.19.2, of gated delta nets (the linear attention of
Qwen3-Next), for which Core has a form in plain torch that it uses for deterministic runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from course_lib.stack.patches import Patches

PATCHES = Patches()
CORE = "megatron.core"
LINEAR = f"{CORE}.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication"
DELTA_NET = f"{CORE}.ssm.gated_delta_net"
PASSES = "fewer passes over memory, as TE's fused kernel on a GPU"
NEEDS_CUDA = "flash-linear-attention needs CUDA"
IN_CACHE = 2**17
"""So many numbers stay in a core's own cache from one operation to the next."""


def _count_steps(states: Any, groups: list[dict]) -> None:
    """Give a state that Megatron made its step: TE keeps one for a group, torch one for each parameter."""
    for group in groups:
        for parameter in group["params"]:
            if state := states.get(parameter):
                state.setdefault("step", torch.tensor(float(group.get("step") or 0)))


@PATCHES.makes("torch.optim.AdamW", why="as TE's FusedAdam on a GPU")
def fused_adam(original):
    """Updates a parameter in one pass over memory: fused=True by default."""

    class FusedAdamW(original):
        def __init__(self, params: object, lr: object = 1e-3, *args: object, **kwargs: object) -> None:
            kwargs.setdefault("fused", True)
            super().__init__(params, 0.0 if lr is None else lr, *args, **kwargs)
            if lr is None:  # Megatron leaves it to the scheduler, and TE asks for it at the first step only
                for group in self.param_groups:
                    group["lr"] = None

        def step(self, closure: object = None) -> object:
            _count_steps(self.state, self.param_groups)
            return super().step(closure)

        def state_dict(self) -> dict:
            _count_steps(self.state, self.param_groups)
            return super().state_dict()

        def __setstate__(self, state: dict) -> None:
            _count_steps(state["state"], state["param_groups"])
            super().__setstate__(state)

    return FusedAdamW


@PATCHES.makes(
    f"{LINEAR}.forward",
    f"{LINEAR}.backward",
    why="`torch.amp.custom_fwd` and `custom_bwd` enter autocast to switch it off: as dear as a small matrix product",
)
def without_autocast(original):
    """Direct unless autocast is on."""
    raw, autocast_is_on = original.__wrapped__, torch.is_autocast_enabled
    forward = raw.__name__ == "forward"

    @functools.wraps(original)
    def direct(ctx, *args, **kwargs):
        if forward:
            if autocast_is_on("cpu"):
                return original(ctx, *args, **kwargs)
            ctx._fwd_used_autocast = False
            ctx._dtype = None
        elif ctx._fwd_used_autocast or autocast_is_on("cpu"):
            return original(ctx, *args, **kwargs)
        return raw(ctx, *args, **kwargs)

    return direct


class RMSNorm(torch.autograd.Function):
    """Five passes backward instead of fifteen, and one tensor kept, not two."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        size = weight.numel()
        product = (grad * normal).reshape(-1, size)  # any strides: a head's norm gets a transposed gradient
        grad_weight = product.sum(0)
        along = torch.mv(product, weight).div_(size).view_as(scale)
        return (grad * weight).addcmul_(normal, along, value=-1).mul_(scale), grad_weight, None


@PATCHES.replaces("torch.nn.functional.rms_norm", why=PASSES)
def rms_norm(original, input, normalized_shape, weight=None, eps=None):
    """One autograd function for a whole row in fp32."""
    plain = (
        weight is not None
        and eps is not None
        and tuple(normalized_shape) == input.shape[-1:]
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
    return RMSNorm.apply(input, weight, eps) if plain else original(input, normalized_shape, weight, eps)


class Rotation(torch.autograd.Function):
    """Three passes each way instead of six forward and ten backward; the sines have their signs."""

    @staticmethod
    def forward(ctx, t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, back)
        return _turned(t, cos, sin)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _turned(grad, *ctx.saved_tensors), None, None, None


def _turned(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (t * cos).addcmul_(t.roll(t.shape[-1] // 2, -1), sin)


@PATCHES.replaces(f"{CORE}.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd", why=PASSES)
def rotate(original, t, freqs, rotary_interleaved=False, mla_rotary_interleaved=False, mscale=1.0, **options):
    """One autograd function for whole heads in two halves."""
    if rotary_interleaved or mla_rotary_interleaved or options or freqs.shape[-1] != t.shape[-1]:
        return original(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **options)
    turns = getattr(freqs, "turns", {})  # the same angles turn queries and keys in every layer
    if (t.dtype, mscale) not in turns:
        cos, sin = (freqs.cos() * mscale).to(t.dtype), (freqs.sin() * mscale).to(t.dtype)
        half = sin.shape[-1] // 2
        sin[..., :half].neg_()
        freqs.turns = turns | {(t.dtype, mscale): (cos, sin, sin.roll(half, -1))}
    return Rotation.apply(t, *freqs.turns[t.dtype, mscale])


@PATCHES.replaces(f"{CORE}.fusions.fused_bias_swiglu.swiglu_back", why=PASSES)
def swiglu_back(original, g, y):
    """torch's own gradient of SiLU, written straight to its place."""
    if g.dtype != y.dtype:  # a router's weights may be finer than the activations: upstream keeps the finer format
        return original(g, y)
    gate, value = y.chunk(2, -1)
    out = torch.empty_like(y)
    to_gate, to_value = out.chunk(2, -1)
    torch.ops.aten.silu_backward.grad_input(g * value, gate, grad_input=to_gate)
    torch.mul(g, torch.nn.functional.silu(gate), out=to_value)
    return out


@PATCHES.replaces(
    f"{CORE}.tensor_parallel.cross_entropy.VocabParallelCrossEntropy.calculate_logits_max",
    why="torch's max also looks for the place, which nobody asks for, eight times slower",
)
def calculate_logits_max(_, vocab_parallel_logits):
    """The largest logit by amax instead of max."""
    logits = vocab_parallel_logits.float()
    return logits, logits.amax(dim=-1)


@PATCHES.makes(f"{CORE}.tensor_parallel.cross_entropy._VocabParallelCrossEntropy", why=PASSES)
def cross_entropy(original):
    """Three passes over the logits instead of six, where no labels are smoothed."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    class _VocabParallelCrossEntropy(original):  # the name that traces show
        """The same messages and numbers; a softmax is divided by its sum together with its gradient, in backward."""

        @staticmethod
        def forward(ctx, logits, target, label_smoothing=0.0, tp_group=None):
            ctx.smooths = label_smoothing > 0
            if ctx.smooths:
                return original.forward(ctx, logits, target, label_smoothing, tp_group)
            group, size = tp_group or get_tensor_model_parallel_group(), logits.shape[-1]
            powers, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            place = target - group.rank() * size
            elsewhere = (place < 0) | (place >= size)
            place = place.masked_fill_(elsewhere, 0).unsqueeze(-1)
            chosen = powers.gather(-1, place).squeeze(-1).sub_(largest).masked_fill_(elsewhere, 0)
            dist.all_reduce(chosen, group=group)
            total, at_once = torch.empty_like(largest), max(1, IN_CACHE // size)
            for row, top, out in zip(
                powers.view(-1, size).split(at_once),
                largest.view(-1, 1).split(at_once),
                total.view(-1).split(at_once),
                strict=True,
            ):
                torch.sum(row.sub_(top).exp_(), -1, out=out)
            dist.all_reduce(total, group=group)
            ctx.save_for_backward(powers, total, place, elsewhere)
            return total.log() - chosen

        @staticmethod
        def backward(ctx, grad):
            if ctx.smooths:
                return original.backward(ctx, grad)
            powers, total, place, elsewhere = ctx.saved_tensors
            powers.scatter_add_(-1, place, total.masked_fill(elsewhere, 0).neg_().unsqueeze(-1))
            return powers.mul_((grad / total).unsqueeze(-1)), None, None, None

    return _VocabParallelCrossEntropy


PATCHES.sets(True, f"{DELTA_NET}.common.HAVE_FLA", why=NEEDS_CUDA, late=f"{DELTA_NET}.common")


@PATCHES.makes(f"{DELTA_NET}.gdn.chunk_gated_delta_rule", why=NEEDS_CUDA, late=f"{DELTA_NET}.gdn")
def chunk_gated_delta_rule(_):
    """Core's own form of the rule in torch."""
    from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


@PATCHES.makes(f"{DELTA_NET}.common.l2norm", why=NEEDS_CUDA, late=f"{DELTA_NET}.common")
def l2norm(_):
    """torch's operations."""
    return lambda x, eps=1e-6: x * (x * x).sum(-1, keepdim=True).add(eps).rsqrt()


@PATCHES.makes(f"{DELTA_NET}.gdn.causal_conv1d", why=NEEDS_CUDA, late=f"{DELTA_NET}.gdn")
def causal_conv1d(_):
    """torch's convolution of each channel with its own past; `x` is [batch, sequence, channels]."""

    def causal_conv1d(
        x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        if initial_state is not None or output_final_state or cu_seqlens is not None:
            raise NotImplementedError("packed sequences and states of a gated delta net need flash-linear-attention")
        padded = torch.nn.functional.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
        out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
        return torch.nn.functional.silu(out) if activation in ("silu", "swish") else out, None

    return causal_conv1d

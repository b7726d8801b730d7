"""Several passes over memory become few: what fused kernels do on a GPU, with torch's own operations.

A step of a small model spends as long on norms, rotations and activations as on its matrix products, because each of
them walks through memory many times.  The functions here walk as seldom as torch allows, forward and backward, and give
the same numbers to the last few bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from course_lib.stack.redirection import Redirection

__all__ = ["redirections"]


def _rms_norm(original: Callable) -> Callable:
    """Wrap `torch.nn.functional.rms_norm`: five passes backward instead of fifteen, and one tensor kept, not two."""
    import torch

    class RMSNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            size = x.shape[-1]
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
            normal = x * scale
            ctx.save_for_backward(normal, scale, weight)
            return normal * weight

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            normal, scale, weight = ctx.saved_tensors
            size = weight.numel()
            product = (grad * normal).reshape(-1, size)  # any strides: a head's norm gets a transposed gradient
            grad_weight = product.sum(0)
            along = torch.mv(product, weight).div_(size).view_as(scale)
            return (grad * weight).addcmul_(normal, along, value=-1).mul_(scale), grad_weight, None

    @functools.wraps(original)
    def rms_norm(
        input: torch.Tensor,
        normalized_shape: list[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        plain = (
            weight is not None
            and eps is not None
            and tuple(normalized_shape) == input.shape[-1:]
            and input.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )
        if not plain:
            return original(input, normalized_shape, weight, eps)
        return RMSNorm.apply(input, weight, eps)

    return rms_norm


def _rotate(original: Callable) -> Callable:
    """Wrap Megatron's rotary embedding: three passes each way instead of six forward and ten backward."""
    import torch

    def turned(t: torch.Tensor, cos: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        half = t.shape[-1] // 2
        out = t * cos
        out[..., :half].addcmul_(t[..., half:], first)
        out[..., half:].addcmul_(t[..., :half], second)
        return out

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(cos, sin)
            half = t.shape[-1] // 2
            return turned(t, cos, -sin[..., :half], sin[..., half:])

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            cos, sin = ctx.saved_tensors
            half = grad.shape[-1] // 2
            return turned(grad, cos, sin[..., half:], -sin[..., :half]), None, None

    @functools.wraps(original)
    def rotate(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        **options: object,
    ) -> torch.Tensor:
        if rotary_interleaved or mla_rotary_interleaved or options or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **options)
        cos, sin = (freqs.cos() * mscale).to(t.dtype), (freqs.sin() * mscale).to(t.dtype)
        return Rotation.apply(t, cos, sin)

    return rotate


def _swiglu_back(original: Callable) -> Callable:
    """Wrap the gradient of SwiGLU: torch's own gradient of SiLU, written straight to its place."""

    @functools.wraps(original)
    def swiglu_back(g: object, y: object) -> object:
        import torch

        if g.dtype != y.dtype:  # a router's weights may be finer than the activations: upstream keeps the finer format
            return original(g, y)
        gate, value = y.chunk(2, -1)
        out = torch.empty_like(y)
        to_gate, to_value = out.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(g * value, gate, grad_input=to_gate)
        torch.mul(g, torch.nn.functional.silu(gate), out=to_value)
        return out

    return swiglu_back


def _logits_max(original: Callable) -> Callable:
    """Wrap the first step of the loss: the largest logit without its place, which nobody asks for."""

    @functools.wraps(original)
    def calculate_logits_max(vocab_parallel_logits: object) -> tuple:
        logits = vocab_parallel_logits.float()
        return logits, logits.amax(dim=-1)

    return staticmethod(calculate_logits_max)


def redirections() -> list[Redirection]:
    """What needs fewer passes over memory and otherwise is the same, in the order in which it is applied."""
    passes = "fewer passes over memory, as TE's fused kernel on a GPU"
    core = "megatron.core"
    rotary = f"{core}.models.common.embeddings.rope_utils._apply_rotary_pos_emb_bshd"
    return [
        Redirection("torch.nn.functional.rms_norm", _rms_norm, "one autograd function", passes),
        Redirection(rotary, _rotate, "one autograd function", passes, ("t", "freqs", "rotary_interleaved")),
        Redirection(f"{core}.fusions.fused_bias_swiglu.swiglu_back", _swiglu_back, "torch's own gradient", passes),
        Redirection(
            f"{core}.tensor_parallel.cross_entropy.VocabParallelCrossEntropy.calculate_logits_max",
            _logits_max,
            "amax instead of max",
            "torch's max also looks for the place, eight times slower",
        ),
    ]

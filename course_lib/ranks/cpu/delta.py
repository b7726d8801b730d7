"""Gated delta nets (the linear attention of Qwen3-Next) without flash-linear-attention, whose kernels need CUDA.

Core has a form of the rule in plain torch, which it uses for deterministic runs.  Two small functions of the package
that stand beside it are written here in torch's own operations.

Source: megatron-core ssm/gated_delta_net/common.py and gdn.py @ 0.19.2
"""

from __future__ import annotations

from collections.abc import Callable

from course_lib.stack.redirection import Redirection

__all__ = ["redirections"]


def _torch_rule(_: object) -> Callable:
    from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


def _l2norm(_: object) -> Callable:
    def l2norm(x: object, eps: float = 1e-6) -> object:
        return x * (x * x).sum(-1, keepdim=True).add(eps).rsqrt()

    return l2norm


def _causal_conv1d(_: object) -> Callable:
    def causal_conv1d(
        x: object,
        weight: object,
        bias: object = None,
        activation: str | None = None,
        initial_state: object = None,
        output_final_state: bool = False,
        cu_seqlens: object = None,
    ) -> tuple:
        """Each channel's convolution with its own past; `x` is [batch, sequence, channels], `weight` [channels, width]."""
        import torch

        if initial_state is not None or output_final_state or cu_seqlens is not None:
            raise NotImplementedError("packed sequences and states of a gated delta net need flash-linear-attention")
        padded = torch.nn.functional.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
        out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
        return torch.nn.functional.silu(out) if activation in ("silu", "swish") else out, None

    return causal_conv1d


def redirections() -> list[Redirection]:
    """What lets a CPU rank train a gated delta net."""
    package, reason = "megatron.core.ssm.gated_delta_net", "flash-linear-attention needs CUDA"
    return [
        Redirection(f"{package}.common.HAVE_FLA", lambda _: True, "True", reason, late=True),
        Redirection(f"{package}.common.l2norm", _l2norm, "torch's operations", reason, late=True),
        Redirection(f"{package}.gdn.causal_conv1d", _causal_conv1d, "torch's convolution", reason, late=True),
        Redirection(
            f"{package}.gdn.chunk_gated_delta_rule", _torch_rule, "Core's own form in torch", reason, late=True
        ),
    ]

"""Redirections that only save time: the same results, by the path that suits a CPU.

A GPU rank has fused kernels for attention and Adam; without Transformer Engine upstream falls back to code that was
written for clarity.  torch's own fused CPU kernels take their place here, and wrappers that do nothing in fp32 are left
out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from course_lib.ranks.cpu import context
from course_lib.stack.redirection import Redirection

__all__ = ["Done", "redirections"]


def _fused_adam(original: type) -> type:
    """AdamW that updates a parameter in one pass over memory, as Transformer Engine's FusedAdam does on a GPU."""

    class FusedAdamW(original):
        def __init__(self, params: object, lr: object = 1e-3, *args: object, **kwargs: object) -> None:
            kwargs.setdefault("fused", True)
            super().__init__(params, 0.0 if lr is None else lr, *args, **kwargs)
            if lr is None:  # Megatron leaves it to the scheduler, and TE asks for it at the first step only
                for group in self.param_groups:
                    group["lr"] = None

    return FusedAdamW


def _flash_attention(original: Callable) -> Callable:
    """Plain causal attention by torch's scaled_dot_product_attention, which never holds the matrix of scores."""

    @functools.wraps(original)
    def forward(
        self: object,
        query: object,
        key: object,
        value: object,
        attention_mask: object,
        attn_mask_type: object = None,
        attention_bias: object = None,
        packed_seq_params: object = None,
    ) -> object:
        import torch

        softmax = self.scale_mask_softmax
        plain = (
            softmax.attn_mask_type.name == "causal"
            and attention_mask is None
            and attention_bias is None
            and packed_seq_params is None
            and softmax.scale is None
            and self.softmax_offset is None
            and not (self.training and self.attention_dropout.p)
            and query.shape[0] == key.shape[0]
            and self.config.context_parallel_size == 1
        )
        if not plain:
            return original(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        mask = None
        if softmax.window_size is not None:
            mine = torch.arange(query.shape[0], device=query.device)
            mask = ~context.hidden(mine, key.shape[0], softmax.window_size, causal=True)
        # Megatron has [sequence, batch, heads, head size], torch wants [batch, heads, sequence, head size].
        out = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], self.hidden_size_per_partition)

    return forward


def _without_autocast(original: Callable) -> Callable:
    """Skip `torch.amp.custom_fwd` and `custom_bwd` while autocast is off: they enter and leave a context to do nothing."""
    import torch

    raw = original.__wrapped__
    forward = raw.__name__ == "forward"
    autocast_is_on = torch.is_autocast_enabled

    @functools.wraps(original)
    def direct(ctx: object, *args: object, **kwargs: object) -> object:
        if forward:
            if autocast_is_on("cpu"):
                return original(ctx, *args, **kwargs)
            ctx._fwd_used_autocast = False
            ctx._dtype = None
        elif ctx._fwd_used_autocast or autocast_is_on("cpu"):
            return original(ctx, *args, **kwargs)
        return raw(ctx, *args, **kwargs)

    return staticmethod(direct)


class Done:
    """The handle of a collective that had nothing to do."""

    def wait(self, *_: object) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """True: it is."""
        return True


def _alone(original: Callable) -> Callable:
    """A reduction over a group of one rank is that rank's tensor; gloo would send it through its threads."""

    @functools.wraps(original)
    def all_reduce(tensor: object, op: object = None, group: object = None, async_op: bool = False) -> object:
        if group is not None and group.size() == 1:
            return Done() if async_op else None
        if op is None:
            return original(tensor, group=group, async_op=async_op)
        return original(tensor, op, group, async_op)

    return all_reduce


def _one_device(original: Callable) -> Callable:
    """Let all groups of this process share a device of gloo's, whose thread looks a hundred times a second for news."""
    device = None

    @functools.wraps(original)
    def init(self: object, store: object, rank: int, size: int, *args: object, **named: object) -> None:
        nonlocal device
        from torch.distributed import ProcessGroupGloo

        if args or set(named) != {"timeout"}:
            return original(self, store, rank, size, *args, **named)
        device = device or ProcessGroupGloo.create_default_device()
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [device], named["timeout"]
        return original(self, store, rank, size, options)

    return init


def redirections() -> list[Redirection]:
    """What is faster on a CPU and otherwise the same, in the order in which it is applied."""
    layers = "megatron.core.tensor_parallel.layers"
    linear = f"{layers}.LinearWithGradAccumulationAndAsyncCommunication"
    autocast = "entering autocast to switch it off costs as much as a small matrix product"
    return [
        Redirection("torch.optim.AdamW", _fused_adam, "fused=True by default", "as TE's FusedAdam on a GPU"),
        Redirection(
            "megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
            _flash_attention,
            "torch's flash attention where it is plain and causal",
            "as flash attention on a GPU: the scores are never kept",
            ("query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
        ),
        Redirection(f"{linear}.forward", _without_autocast, "direct unless autocast is on", autocast),
        Redirection(f"{linear}.backward", _without_autocast, "direct unless autocast is on", autocast),
        Redirection(
            "torch.distributed.ProcessGroupGloo.__init__",
            _one_device,
            "all groups share one device",
            "a thread for each of some twenty groups wakes up all the time, and eight ranks have two cores",
        ),
        Redirection("torch.distributed.all_reduce", _alone, "nothing, in a group of one", "there is nobody to add to"),
    ]

"""Context parallelism and windows for Megatron Core's own attention, which leaves them to Transformer Engine.

Core cuts the sequence, gives each rank its positions and rotary angles, and adds up the gradients for any attention.
Only `DotProductAttention` itself refuses: it knows no keys but its own.  So the keys and values of the other ranks are
gathered before it, as Transformer Engine does it with `cp_comm_type="all_gather"`, and the mask says which of them come
later than a query.  Gathering, its gradient and the order of positions are Core's own functions, which its sparse
attention uses for the same purpose.

Source: megatron-core transformer/dot_product_attention.py, experimental_attention_variant/dsa.py and dsa_layout.py
@ 0.19.2
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from course_lib.stack.redirection import Redirection

if TYPE_CHECKING:
    import torch

__all__ = ["hidden", "redirections"]


def _any_size(original: Callable) -> Callable:
    """Wrap `DotProductAttention.__init__`: it is built as for CP=1, and remembers its group."""

    @functools.wraps(original)
    def init(self: object, config: object, *args: object, **kwargs: object) -> None:
        size = config.context_parallel_size
        config.context_parallel_size = 1
        try:
            original(self, config, *args, **kwargs)
        finally:
            config.context_parallel_size = size

    return init


def hidden(mine: torch.Tensor, total: int, window: tuple[int, int] | None, *, causal: bool) -> torch.Tensor:
    """Which keys a query must not see.

    Args:
        mine: Position of each query in the whole sequence.
        total: Number of keys, at positions 0 and up.
        window: How many keys before and after its own position a query sees; -1 for all of them, None for no limit.
        causal: Whether all keys after a query are hidden, whatever the window says, as in Transformer Engine.

    Returns:
        A mask [queries, keys], True where a key is hidden.
    """
    import torch

    before, after = window or (-1, -1)
    after = 0 if causal else after
    distance = torch.arange(total, device=mine.device) - mine[:, None]
    mask = torch.zeros_like(distance, dtype=torch.bool)
    if before >= 0:
        mask |= distance < -before
    if after >= 0:
        mask |= distance > after
    return mask


def _right_keys(original: Callable) -> Callable:
    """Wrap `DotProductAttention.forward`: queries of this rank, the keys and values that each of them may see.

    Upstream's own mask of a window forgets the mask that it is given, and where in the sequence this rank's queries are.
    """

    @functools.wraps(original)
    def forward(
        self: object, query: object, key: object, value: object, attention_mask: object, *args: object, **kwargs: object
    ) -> object:
        softmax, size = self.scale_mask_softmax, self.config.context_parallel_size
        window = softmax.window_size
        if size == 1 and window is None:
            return original(self, query, key, value, attention_mask, *args, **kwargs)
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.experimental_attention_variant import dsa_layout

        causal = self.attn_mask_type == AttnMaskType.causal
        mine = torch.arange(query.size(0), device=query.device) + key.size(0) - query.size(0)
        if size > 1:
            if not causal or attention_mask is not None:
                raise NotImplementedError(
                    "context parallelism on a CPU rank knows causal attention without a mask only"
                )
            group = parallel_state.get_context_parallel_group()
            length, device = query.size(0), query.device
            order = dsa_layout.build_zigzag_allgather_cp_key_reorder(length, size, device)
            mine = dsa_layout.build_zigzag_cp_local_positions(length * size, size, group.rank(), device)
            key, value = (gather_from_sequence_parallel_region(part, group=group)[order] for part in (key, value))
        mask = hidden(mine, key.size(0), window, causal=causal)[None, None]
        if attention_mask is not None:
            mask = mask | attention_mask
        softmax.window_size = None  # it stands in the mask
        try:
            return original(self, query, key, value, mask, *args, **kwargs)
        finally:
            softmax.window_size = window

    return forward


def redirections() -> list[Redirection]:
    """What lets a CPU rank share a sequence."""
    attention = "megatron.core.transformer.dot_product_attention.DotProductAttention"
    reason = "upstream leaves context parallelism to Transformer Engine's attention"
    return [
        Redirection(f"{attention}.__init__", _any_size, "takes any CP size", reason, ("self", "config")),
        Redirection(
            f"{attention}.forward",
            _right_keys,
            "gathers the keys and values of the context-parallel group, and keeps to window and mask",
            f"{reason}; a window's mask replaces the one that it is given",
            ("self", "query", "key", "value", "attention_mask"),
        ),
    ]

"""Context parallelism for Megatron Core's own attention, which leaves it to Transformer Engine.

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

from course_lib.cpu.redirection import Redirection

__all__ = ["redirections"]


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


def _all_keys(original: Callable) -> Callable:
    """Wrap `DotProductAttention.forward`: queries of this rank, keys and values of all."""

    @functools.wraps(original)
    def forward(
        self: object, query: object, key: object, value: object, attention_mask: object, *args: object, **kwargs: object
    ) -> object:
        if self.config.context_parallel_size == 1:
            return original(self, query, key, value, attention_mask, *args, **kwargs)
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.experimental_attention_variant import dsa_layout

        if self.attn_mask_type != AttnMaskType.causal or attention_mask is not None:
            raise NotImplementedError("context parallelism on a CPU rank knows causal attention without a mask only")
        group = parallel_state.get_context_parallel_group()
        length, size, device = query.size(0), group.size(), query.device
        order = dsa_layout.build_zigzag_allgather_cp_key_reorder(length, size, device)
        mine = dsa_layout.build_zigzag_cp_local_positions(length * size, size, group.rank(), device)
        key, value = (gather_from_sequence_parallel_region(part, group=group)[order] for part in (key, value))
        later = torch.arange(length * size, device=device) > mine[:, None]  # True hides a key from a query
        return original(self, query, key, value, later[None, None], *args, **kwargs)

    return forward


def redirections() -> list[Redirection]:
    """What lets a CPU rank share a sequence."""
    attention = "megatron.core.transformer.dot_product_attention.DotProductAttention"
    reason = "upstream leaves context parallelism to Transformer Engine's attention"
    return [
        Redirection(f"{attention}.__init__", _any_size, "takes any CP size", reason, ("self", "config")),
        Redirection(
            f"{attention}.forward",
            _all_keys,
            "gathers the keys and values of the context-parallel group",
            reason,
            ("self", "query", "key", "value", "attention_mask"),
        ),
    ]

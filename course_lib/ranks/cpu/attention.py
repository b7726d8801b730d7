"""Core's own attention as Transformer Engine would do it: by flash attention, in a window, over a shared sequence.

Core cuts the sequence, gives each rank its positions and rotary angles, and adds up the gradients for any attention.
Only `DotProductAttention` itself refuses: it knows no keys but its own.  So the keys and values of the other ranks are
gathered before it, as Transformer Engine does it with `cp_comm_type="all_gather"`, and the mask says which of them come
later than a query.  Gathering, its gradient and the order of positions are Core's own functions, which its sparse
attention uses for the same purpose.

Source: megatron-core transformer/dot_product_attention.py, experimental_attention_variant/dsa.py and dsa_layout.py
@ 0.19.2
"""

from __future__ import annotations

import torch

from course_lib.stack.patches import Patches

PATCHES = Patches()
ATTENTION = "megatron.core.transformer.dot_product_attention.DotProductAttention"


@PATCHES.replaces(f"{ATTENTION}.__init__", why="upstream leaves context parallelism to Transformer Engine's attention")
def init(original, self, config, *args, **kwargs):
    """Takes any CP size: it is built as for CP=1."""
    size = config.context_parallel_size
    config.context_parallel_size = 1
    try:
        original(self, config, *args, **kwargs)
    finally:
        config.context_parallel_size = size


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
    before, after = window or (-1, -1)
    after = 0 if causal else after
    distance = torch.arange(total, device=mine.device) - mine[:, None]
    mask = torch.zeros_like(distance, dtype=torch.bool)
    if before >= 0:
        mask |= distance < -before
    if after >= 0:
        mask |= distance > after
    return mask


@PATCHES.replaces(
    f"{ATTENTION}.forward",
    why="upstream keeps all scores, leaves context parallelism to Transformer Engine, and forgets a mask for a window's",
)
def forward(
    original, self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
):
    """By torch's flash attention where it is plain and causal; else upstream's, with all keys that a query may see."""
    softmax, size = self.scale_mask_softmax, self.config.context_parallel_size
    plain = (
        softmax.attn_mask_type.name == "causal"
        and attention_mask is None
        and attention_bias is None
        and packed_seq_params is None
        and softmax.scale is None
        and self.softmax_offset is None
        and not (self.training and self.attention_dropout.p)
        and query.shape[0] == key.shape[0]
        and size == 1
    )
    if plain:
        return _flash(self, query, key, value)
    others = attn_mask_type, attention_bias, packed_seq_params
    window = softmax.window_size
    if size == 1 and window is None:
        return original(self, query, key, value, attention_mask, *others)
    causal = self.attn_mask_type.name == "causal"
    mine = torch.arange(query.size(0), device=query.device) + key.size(0) - query.size(0)
    if size > 1:
        if not causal or attention_mask is not None:
            raise NotImplementedError("context parallelism on a CPU rank knows causal attention without a mask only")
        mine, key, value = _all_keys(query, key, value, size)
    mask = hidden(mine, key.size(0), window, causal=causal)[None, None]
    if attention_mask is not None:
        mask = mask | attention_mask
    softmax.window_size = None  # it stands in the mask; upstream's own takes the place of the mask that it is given
    try:
        return original(self, query, key, value, mask, *others)
    finally:
        softmax.window_size = window


def _flash(self, query, key, value):
    """Never holds the matrix of scores, as on a GPU."""
    mask, window = None, self.scale_mask_softmax.window_size
    if window is not None:
        mine = torch.arange(query.shape[0], device=query.device)
        mask = ~hidden(mine, key.shape[0], window, causal=True)
    # Megatron has [sequence, batch, heads, head size], torch wants [batch, heads, sequence, head size].
    out = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
        attn_mask=mask,
        is_causal=mask is None,
        scale=self.softmax_scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], self.hidden_size_per_partition)


def _all_keys(query, key, value, size):
    """Positions of this rank's queries, and the keys and values of the whole context-parallel group in their order."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
    from megatron.core.transformer.experimental_attention_variant import dsa_layout

    group, length, device = parallel_state.get_context_parallel_group(), query.size(0), query.device
    order = dsa_layout.build_zigzag_allgather_cp_key_reorder(length, size, device)
    mine = dsa_layout.build_zigzag_cp_local_positions(length * size, size, group.rank(), device)
    return mine, *(gather_from_sequence_parallel_region(part, group=group)[order] for part in (key, value))

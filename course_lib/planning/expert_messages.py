"""What the experts of a model add to its messages, by closed form: tokens to the ranks of their experts and back.

How many tokens arrive at a rank is the routers' choice, so it is a number to be given; without one the load is balanced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from course_lib.common.config import Fields
from course_lib.planning.closed_forms import feed_forward_sizes
from course_lib.planning.layout.sizes import Layout

__all__ = ["not_counted", "parameters", "rows"]


def not_counted(fields: Fields, layout: Layout) -> str:
    """Why the messages of these experts are not counted; empty if they are."""
    get = fields.model
    every = get("moe_layer_freq", 1)
    aux = get("moe_router_load_balancing_type", "aux_loss")
    if any(one != 1 for one in (every if isinstance(every, Sequence) else [every])):
        return "moe_layer_freq: not every layer has experts"
    if get("moe_token_dispatcher_type", "allgather") not in ("alltoall", "allgather"):
        return f"moe_token_dispatcher_type={get('moe_token_dispatcher_type')!r} sends inside kernels that need CUDA"
    if layout.resolved_expert_tensor_parallel_size > 1:
        return f"ETP={layout.resolved_expert_tensor_parallel_size} cuts each expert, and its parts send besides"
    if layout.expert_model_parallel_size == 1 < layout.tensor_model_parallel_size:
        return "expert_model_parallel_size=1 with TP > 1: set it to at least TP"
    if aux not in ("aux_loss", "seq_aux_loss", "none"):
        return f"moe_router_load_balancing_type={aux!r} sends other things than 'aux_loss', 'seq_aux_loss' and 'none'"
    for name in (
        *("moe_expert_capacity_factor", "moe_latent_size", "moe_shared_expert_gate"),
        *("moe_shared_expert_overlap", "moe_router_padding_for_quantization", "moe_router_force_load_balancing"),
    ):
        if value := get(name):
            return f"{name}={value!r}"
    return ""


class Sizes(NamedTuple):
    """Parameters that a rank holds of one layer of experts, one number a tensor."""

    router: int
    shared: tuple[int, ...]
    experts: tuple[int, ...]


def parameters(fields: Fields, layout: Layout) -> Sizes:
    """Sizes of what a rank holds of one layer's router, of its shared expert, and of its own routed experts."""
    get, hidden = fields.model, fields.model("hidden_size")
    own, tp = get("num_moe_experts") // layout.expert_model_parallel_size, layout.tensor_model_parallel_size
    shared = get("moe_shared_expert_intermediate_size")
    width = get("moe_ffn_hidden_size") or get("ffn_hidden_size", 4 * hidden)
    return Sizes(
        hidden * get("num_moe_experts"),
        tuple(size // tp for size in feed_forward_sizes(fields, shared)) if shared else (),
        feed_forward_sizes(fields, width) * own,
    )


def rows(
    fields: Fields,
    layout: Layout,
    *,
    layers: int,
    microbatches: int,
    element_bytes: int,
    arriving: Sequence[int] | None,
) -> Iterator[tuple]:
    """Rows (phase, operation, group, group size, bytes, count, why) of the layers of one rank.

    With T tokens a rank and microbatch, K experts a token of E, hidden size H, G ranks that share the experts, and R choices
    that arrive at this rank, for each layer and microbatch and with b bytes an element::

        alltoall    forward    all_gather 8 E G     all_to_all b T K H, b T K, b R H
                    backward   all_to_all b T K H, b R, b R H
        allgather   forward    all_gather T G E, b T G E, b T G H     reduce_scatter b T G H
                    backward   all_gather b T G H     reduce_scatter b T G H, b T G E

    Args:
        fields: The model's fields.
        layout: The layout.
        layers: Layers of this rank.
        microbatches: Microbatches a step.
        element_bytes: Bytes of an activation.
        arriving: Choices that arrive at this rank, one number a layer and microbatch; T K each if None.

    Source: megatron-core transformer/moe/token_dispatcher.py, moe_utils.py, router.py @ 0.19.2.
    """
    get, ep, tp = fields.model, layout.expert_model_parallel_size, layout.tensor_model_parallel_size
    cp, micro = layout.context_parallel_size, fields.get("train", "micro_batch_size")
    experts, hidden, times = get("num_moe_experts"), get("hidden_size"), layers * microbatches
    tokens = get("seq_length") // cp // tp * micro
    score_bytes = 4 if get("moe_router_dtype") in ("fp32", "fp64") else element_bytes
    coefficient = get("moe_aux_loss_coeff", 0.0)
    aux = get("moe_router_load_balancing_type", "aux_loss")
    if coefficient and aux != "none":
        counts = 8 * experts * (micro if aux == "seq_aux_loss" else 1)
        yield "forward", "all_reduce", "tp-cp", tp * cp, counts, times, "load of the experts, for the auxiliary loss"
    if get("moe_router_enable_expert_bias", False):
        ranks = tp * layout.data_parallel_size * cp
        yield "update", "all_reduce", "tp-dp-cp", ranks, 4 * layers * experts, 1, "load of the experts, for their bias"
    if get("moe_token_dispatcher_type", "allgather") == "allgather":
        gathered, both = tokens * ep, "expert-tp-ep"
        scores, stream = score_bytes * gathered * experts, element_bytes * gathered * hidden
        yield "forward", "all_gather", both, ep, gathered * experts, times, "which token chose which expert"
        yield "forward", "all_gather", both, ep, scores, times, "its weight"
        yield "forward", "all_gather", both, ep, stream, times, "all tokens to all ranks"
        yield "forward", "reduce_scatter", both, ep, stream, times, "sums of the experts' results"
        yield "backward", "all_gather", both, ep, stream, times, "gradients of the sums"
        yield "backward", "reduce_scatter", both, ep, stream, times, "gradients of the tokens"
        yield "backward", "reduce_scatter", both, ep, scores, times, "gradients of the weights"
        return
    chosen = tokens * get("moe_router_topk", 2)
    arrived = Counter([chosen] * times if arriving is None else arriving)
    out = element_bytes * chosen * hidden
    yield "forward", "all_gather", "expert-tp-ep", ep, 8 * experts * ep, times, "how many tokens chose each expert"
    yield "forward", "all_to_all", "ep", ep, out, times, "tokens to their experts"
    yield "forward", "all_to_all", "ep", ep, score_bytes * chosen, times, "their weights"
    yield "backward", "all_to_all", "ep", ep, out, times, "gradients of the results, to the experts"
    for number, count in arrived.items():
        back = element_bytes * number * hidden
        yield "forward", "all_to_all", "ep", ep, back, count, "the experts' results, back to the tokens"
        yield "backward", "all_to_all", "ep", ep, back, count, "gradients of the tokens"
        yield "backward", "all_to_all", "ep", ep, score_bytes * number, count, "gradients of the weights"

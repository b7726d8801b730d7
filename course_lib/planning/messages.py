"""What a training step sends, by closed form: tensor, pipeline, context, data and expert parallelism of a model shaped
like Llama, like Qwen's with experts or like Nemotron's hybrids.

A model is read as letters: `*` attention, `-` feed-forward, `E` experts, `M` Mamba.  A layer of a GPT is two of them.

`course_lib.reading.collectives` holds it against what a run recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil, lcm
from typing import TYPE_CHECKING, Any

from course_lib.common.config import Fields
from course_lib.planning import expert_messages
from course_lib.planning.closed_forms import feed_forward_sizes, has_experts, stage_kinds, state_space
from course_lib.planning.layout import embedding_rows, stage_layers
from course_lib.planning.layout.sizes import Layout, next_multiple
from course_lib.planning.layout.stages import has_implicit_chunks, hybrid_pattern

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KEY", "NotCounted", "by_group", "expected", "sent_bytes"]

KEY = ["phase", "operation", "group", "group_size", "bytes"]
"""What tells one kind of operation from another."""


class NotCounted(ValueError):
    """The closed form does not cover this model."""


def expected(
    cfg: Any,
    *,
    ranks: int,
    rank: int = 0,
    element_bytes: int = 4,
    gradient_bytes: int = 4,
    loss_fusion: str | None = None,
    arriving: Sequence[int] | None = None,
) -> pd.DataFrame:
    """What one rank takes part in during one step, the first excepted, by closed form.

    Let A = sequence / CP x micro batch x hidden x `element_bytes`, the size of the residual stream.  For every letter but
    an `E` without a shared expert, and every microbatch, tensor parallelism all-reduces A once forward and once backward;
    the embedding and the output layer add one each, and the loss three small ones.  With sequence parallelism each becomes
    a reduce-scatter and an all-gather, and backward gathers the inputs of the column-parallel layers once more.

    Context parallelism gathers keys and values of the whole sequence once a layer and microbatch, and scatters the sums
    of their gradients; on GPUs Transformer Engine gathers them again for the backward pass instead of keeping them, which
    is not counted.  A Mamba layer deals out heads instead: all-to-all of its five inputs and of its output.  In its first
    step the optimizer asks once more whether every rank has a gradient norm.

    Args:
        cfg: A Bridge `ConfigContainer`, or `config.yaml` read back (`run.config`).
        element_bytes: Bytes of an activation or parameter: 4 in fp32, 2 in bf16.
        gradient_bytes: Bytes of a gradient where it is reduced.
        loss_fusion: What the loss runs as: None for separate operations, which is what a CPU rank does whatever the recipe
            says, or the recipe's `cross_entropy_fusion_impl` for a GPU, `"te"` or `"native"`.
        arriving: How many choices of experts arrive at this rank, one number a layer and microbatch
            (`course_lib.reading.experts.arriving`); without it every expert gets the same.

    Returns:
        Rows `phase, operation, group, group_size, bytes, count, why`: `bytes` is the size of one operation.

    Raises:
        NotCounted: For recomputation of more than experts and norms, layers of other kinds, experts that are cut or dropped
            from, a `cp_comm_type` other than `"all_gather"`, which is what a CPU rank does, or an optimizer whose state is
            divided into several instances.

    Source: megatron-core tensor_parallel/layers.py, mappings.py, cross_entropy.py, distributed/finalize_model_grads.py,
    pipeline_parallel/schedules.py @ 0.19.2; for keys and values course_lib/ranks/cpu/attention.py.
    """
    import pandas as pd

    layout = Layout.from_config(cfg, ranks=ranks)
    fields = Fields.of(cfg)
    _refuse_what_is_not_counted(fields, layout)
    every = _rows(fields, layout, rank, element_bytes, gradient_bytes, loss_fusion, arriving)
    rows = [row for row in every if row[3] > 1 and row[5]]
    return pd.DataFrame(rows, columns=[*KEY, "count", "why"])


def _loss(tokens_bytes: int, tp: int, fusion: str | None) -> list[tuple[str, int, int, str]]:
    """Operation, bytes, times and reason of what one loss sends, for an fp32 number a token of `tokens_bytes`.

    Source: megatron-core tensor_parallel/cross_entropy.py and fusions/fused_cross_entropy.py @ 0.19.2;
    transformer_engine/pytorch/triton/cross_entropy.py (three numbers a token from every rank).
    """
    ways = {
        None: [("all_reduce", tokens_bytes, 3, "maximum, target logit, sum")],
        "native": [
            ("all_reduce", tokens_bytes, 1, "maximum"),
            ("all_reduce", 2 * tokens_bytes, 1, "target logit and sum in one"),
        ],
        "te": [("all_gather", 3 * tp * tokens_bytes, 1, "maximum, sum and target logit of every rank")],
    }
    if fusion not in ways:
        raise NotCounted(f"loss_fusion={fusion!r}: the kernels that are counted are None, 'native' and 'te'")
    return ways[fusion]


def _refuse_what_is_not_counted(fields: Fields, layout: Layout) -> None:
    wanted = {
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "multi_latent_attention": False,
        "add_qkv_bias": False,
        "attention_output_gate": False,
        "softmax_type": "vanilla",
    }
    if granularity := fields.model("recompute_granularity"):
        modules = fields.model("recompute_modules") or ["core_attn"]
        if granularity != "selective" or not set(modules) <= {"moe", "moe_act", "layernorm"}:
            raise NotCounted(
                f"recompute_granularity={granularity!r}, recompute_modules={modules}: what they send again is counted of 'moe', "
                "'moe_act' and 'layernorm' only"
            )
    pattern = hybrid_pattern(fields)
    if other := sorted(set(pattern) - set("*-EM|/")):
        raise NotCounted(
            f"hybrid_layer_pattern={pattern!r}: of kind {', '.join(other)} nothing is counted, only of *, -, E and M"
        )
    if "/" in pattern:
        raise NotCounted(f"hybrid_layer_pattern={pattern!r}: what follows / sends for the tokens ahead, too")
    if ahead := fields.model("mtp_num_layers", None):
        raise NotCounted(f"mtp_num_layers={ahead} sends for the tokens ahead, too")
    if (positions := fields.model("position_embedding_type", "learned_absolute")) not in ("rope", "none"):
        raise NotCounted(
            f"position_embedding_type={positions!r} has weights of its own: only 'rope' and 'none' are counted"
        )
    if layout.context_parallel_size > 1 and (kind := fields.model("cp_comm_type", None)) not in (None, "all_gather"):
        raise NotCounted(f"cp_comm_type={kind!r} runs inside Transformer Engine, which no CPU rank can record")
    if (instances := fields.get("ddp", "num_distributed_optimizer_instances", 1)) != 1:
        raise NotCounted(f"num_distributed_optimizer_instances={instances} divides the optimizer's state twice")
    if has_implicit_chunks(fields):
        raise NotCounted("the pipeline plan interleaves: set virtual_pipeline_model_parallel_size as well")
    if has_experts(fields) and (why := expert_messages.not_counted(fields, layout)):
        raise NotCounted(f"experts: {why}")
    defaults = {"add_bias_linear": True, "normalization": "LayerNorm"}
    for name, value in wanted.items():
        found = fields.model(name, defaults.get(name, value))
        if found != value:
            raise NotCounted(f"{name}={found!r} sends other things than this closed form counts (it wants {value!r})")


def _rows(
    fields: Fields,
    layout: Layout,
    rank: int,
    element_bytes: int,
    gradient_bytes: int,
    loss_fusion: str | None,
    arriving: Sequence[int] | None,
) -> Iterator[tuple]:
    """Rows (phase, operation, group, group size, bytes, count, why); those without partners are left in."""
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    sequence, micro = fields.model("seq_length") // cp, fields.get("train", "micro_batch_size")
    hidden = fields.model("hidden_size")
    stage = rank * pp // layout.world_size
    kinds = Counter("".join(stage_kinds(fields)[stage]))
    first, last = int(stage == 0), int(stage == pp - 1)
    m = fields.get("train", "global_batch_size") // (micro * layout.data_parallel_size)
    stream = sequence * micro * hidden * element_bytes
    # Attention, feed-forward and Mamba are cut; experts are not, a shared one is.
    cut = kinds.total() - (0 if fields.model("moe_shared_expert_intermediate_size") else kinds["E"])
    split_in, split_out = cut + last, cut + first  # column-parallel inputs, row-parallel outputs
    again = m * kinds["E"] * _recomputes_experts(fields)
    if layout.sequence_parallel:
        if fields.model("moe_shared_expert_intermediate_size"):
            yield "backward", "all_gather", "tp", tp, stream, again, "inputs of shared experts, computed again"
            yield "backward", "reduce_scatter", "tp", tp, stream, again, "outputs of shared experts, computed again"
        yield "forward", "reduce_scatter", "tp", tp, stream, m * split_out, "row-parallel outputs and the embedding"
        yield "forward", "all_gather", "tp", tp, stream, m * split_in, "column-parallel inputs"
        both = m * (split_in + split_out)
        yield "backward", "all_gather", "tp", tp, stream, both, "inputs again, and gradients of the outputs"
        yield "backward", "reduce_scatter", "tp", tp, stream, m * split_in, "gradients of column-parallel inputs"
    else:
        yield "forward", "all_reduce", "tp", tp, stream, m * split_out, "row-parallel outputs and the embedding"
        yield "backward", "all_reduce", "tp", tp, stream, m * split_in, "gradients of column-parallel inputs"
    partly = _partly_seen(fields, layout, kinds, last)
    yield (
        "update",
        "all_reduce",
        "tp",
        tp,
        gradient_bytes * partly,
        int(partly > 0),
        "gradients of what saw a part each",
    )
    for operation, size_bytes, times, why in _loss(4 * sequence * micro, tp, loss_fusion):
        yield "forward", operation, "tp", tp, size_bytes, times * m * last, f"loss: {why}"
    if kinds["E"]:
        for row in expert_messages.rows(
            fields, layout, layers=kinds["E"], microbatches=m, element_bytes=element_bytes, arriving=arriving
        ):
            if not again or row[0] != "forward":
                yield row
                continue
            if row[2] != "tp-cp":  # a loss is computed where there are gradients, which is the second time
                yield row
            yield "backward", *row[1:-1], f"{row[-1]}, computed again"
    heads = fields.model("num_attention_heads")
    groups = fields.model("num_query_groups", heads)
    channels = fields.head_channels
    keys = cp * sequence * micro * groups * channels // tp * element_bytes
    yield "forward", "all_gather", "cp", cp, keys, 2 * m * kinds["*"], "keys, and values, of the whole sequence"
    yield "backward", "reduce_scatter", "cp", cp, keys, 2 * m * kinds["*"], "their gradients, to the rank that has them"
    for channels, times in _dealt_out(fields, cp * tp).items() if kinds["M"] else ():
        size_bytes, count = sequence * micro * channels // tp * element_bytes, times * m * kinds["M"]
        yield "forward", "all_to_all", "cp", cp, size_bytes, count, "inputs and output of the scan, dealt out by heads"
        yield "backward", "all_to_all", "cp", cp, size_bytes, count, "their gradients"
    yield from _pipeline_rows(layout, stage, m, stream // (tp if layout.sequence_parallel else 1))
    yield from _update_rows(fields, layout, stage, element_bytes, gradient_bytes)


def _recomputes_experts(fields: Fields) -> bool:
    """Whether the backward pass runs the layers of experts again, messages included."""
    return bool(fields.model("recompute_granularity")) and "moe" in (fields.model("recompute_modules") or ())


def _dealt_out(fields: Fields, ranks: int) -> Counter[int]:
    """Channels of what a Mamba layer deals out to ranks that share a sequence, and how many tensors have as many.

    Where there are more ranks than groups, each rank gets a copy of its group's `B` and `C`.

    Source: megatron-core ssm/mamba_context_parallel.py @ 0.19.2.
    """
    shape = state_space(fields)
    mixed = max(shape.groups, ranks) * shape.state
    return Counter([shape.inner] * 3 + [mixed] * 2 + [shape.heads])


def _partly_seen(fields: Fields, layout: Layout, kinds: Counter[str], last: int) -> int:
    """Parameters that each TP rank holds whole and used on a part of the sequence, or of the heads, alone."""
    hidden, normed = fields.model("hidden_size"), fields.model("qk_layernorm", False)
    count = 2 * fields.head_channels * kinds["*"] if normed else 0
    if layout.sequence_parallel:
        count += hidden * (kinds.total() + last) + kinds["E"] * hidden * fields.model("num_moe_experts", 0)
    return count


def _pipeline_rows(layout: Layout, stage: int, m: int, size_bytes: int) -> Iterator[tuple]:
    pp, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    entries = m * (chunks - (stage == 0))  # chunks of this stage that another stage feeds
    exits = m * (chunks - (stage == pp - 1))
    yield "forward", "send", "pp", pp, size_bytes, exits, "activations to the next stage"
    yield "forward", "recv", "pp", pp, size_bytes, entries, "activations from the previous stage"
    yield "backward", "send", "pp", pp, size_bytes, entries, "gradients to the previous stage"
    yield "backward", "recv", "pp", pp, size_bytes, exits, "gradients from the next stage"


def _update_rows(
    fields: Fields, layout: Layout, stage: int, element_bytes: int, gradient_bytes: int
) -> Iterator[tuple]:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    dp = layout.data_parallel_size * layout.context_parallel_size  # ranks that hold the same weights
    sharded = bool(fields.get("ddp", "use_distributed_optimizer", False))
    tied = bool(fields.model("share_embeddings_and_output_weights", True))
    buckets = [("dp-cp", dp, count) for count in _buckets(fields, layout, stage, sharded=sharded)]
    chunks = stage_kinds(fields)[stage]
    chained = has_experts(fields) and layout.expert_model_parallel_size > 1
    if chained:  # experts have an optimizer of their own, an empty one on a stage without them
        copies, each = layout.expert_data_parallel_size, sum(expert_messages.parameters(fields, layout).experts)
        buckets += [("expert-dp", copies, chunk.count("E") * each) for chunk in chunks if "E" in chunk]
    for group, size, count in buckets:
        if sharded:
            count = ceil(count / lcm(size, 128)) * lcm(size, 128)  # equal shards, aligned for NCCL
            sent = gradient_bytes * count
            yield "update", "reduce_scatter", group, size, sent, 1, "gradients, to the rank that steps"
            # Each of two chained optimizers asks for all parameters after its own step.
            again = 2 if chained else 1
            yield "update", "all_gather", group, size, element_bytes * count, again, "parameters, back to everybody"
        else:
            yield "update", "all_reduce", group, size, gradient_bytes * count, 1, "gradients"
    if tied and pp > 1 and stage in (0, pp - 1):
        size_bytes = gradient_bytes * _table(fields, layout)
        yield "update", "all_reduce", "embedding", 2, size_bytes, 1, "the tied embedding, kept on two stages"
    if sharded:
        yield "update", "all_reduce", "optimizer", layout.world_size, 4, 1, "norm of the gradient"
    yield (
        "update",
        "all_reduce",
        "tp-pp",
        tp * pp,
        4,
        2 if sharded else 3,
        "norm of the gradient, and whether all is well",
    )
    yield "update", "all_reduce", "dp-cp", dp, 8, int(stage == pp - 1), "sum of losses and number of tokens"


def _buckets(fields: Fields, layout: Layout, stage: int, *, sharded: bool) -> Iterator[int]:
    """Parameters of each buffer that is reduced at once, for one rank of a stage."""
    pp, chunks = layout.pipeline_model_parallel_size, len(stage_layers(fields)[stage])
    tied = bool(fields.model("share_embeddings_and_output_weights", True))
    table = _table(fields, layout)
    for chunk in range(chunks):
        count = _parameters(fields, layout, stage, chunk, sharded=sharded)
        shared = (stage == 0 and chunk == 0) or (stage == pp - 1 and chunk == chunks - 1)
        if sharded and tied and pp > 1 and shared:  # a bucket of its own, so that both copies are cut alike
            yield table
            count -= table
        yield count


def _table(fields: Fields, layout: Layout) -> int:
    """Weights of the embedding on one rank."""
    return embedding_rows(fields) // layout.tensor_model_parallel_size * fields.model("hidden_size")


def _parameters(fields: Fields, layout: Layout, stage: int, chunk: int, *, sharded: bool) -> int:
    """Parameters of one model chunk on one rank in its dense buffer, where those of a sharded one begin at multiples of 64.

    Source: megatron-core distributed/param_and_grad_buffer.py @ 0.19.2.
    """
    chunks = stage_kinds(fields)[stage]
    begins = stage == 0 and chunk == 0
    ends = stage == layout.pipeline_model_parallel_size - 1 and chunk == len(chunks) - 1
    tied = fields.model("share_embeddings_and_output_weights", True)
    tables = 1 if begins and ends and tied else int(begins) + int(ends)
    step = 64 if sharded else 1
    each = {kind: _letter(fields, layout, kind) for kind in set(chunks[chunk])}
    sizes = [size for kind in chunks[chunk] for size in each[kind]] + [fields.model("hidden_size")] * ends
    return sum(next_multiple(step, size) for size in sizes) + tables * _table(fields, layout)


def _letter(fields: Fields, layout: Layout, kind: str) -> list[int]:
    """Sizes of the parameters that a rank holds of one layer of a kind in its dense buffer, its norm first."""
    tp, hidden = layout.tensor_model_parallel_size, fields.model("hidden_size")
    if kind == "M":
        return [hidden, *(size // tp for size in state_space(fields).cut)]
    if kind == "-":
        return [
            hidden,
            *(size // tp for size in feed_forward_sizes(fields, fields.model("ffn_hidden_size", 4 * hidden))),
        ]
    if kind == "E":
        mine = expert_messages.parameters(fields, layout)
        return [hidden, mine.router, *mine.shared, *(mine.experts if layout.expert_model_parallel_size == 1 else ())]
    heads, channels = fields.model("num_attention_heads"), fields.head_channels
    both = heads + 2 * fields.model("num_query_groups", heads)
    norms = [channels] * 2 if fields.model("qk_layernorm", False) else []
    return [hidden, hidden * both * channels // tp, heads * channels * hidden // tp, *norms]


def sent_bytes(operation: str, size_bytes: float, group_size: int) -> float:
    """How many bytes does one rank send, if ranks pass parts along a ring?

    Args:
        operation: Name of the operation, as `recorded` has it.

    Returns:
        Bytes that leave one rank.  For the best known algorithms of large messages; a small one costs waiting instead.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).

    >>> [sent_bytes(name, 1000, 4) for name in ("all_reduce", "all_gather", "reduce_scatter", "send", "recv")]
    [1500.0, 750.0, 750.0, 1000.0, 0.0]
    """
    others = (group_size - 1) / group_size
    shares = {"all_reduce": 2 * others, "all_gather": others, "reduce_scatter": others, "all_to_all": others}
    return size_bytes * (shares | {"send": 1.0, "recv": 0.0, "barrier": 0.0}).get(operation, others)


def by_group(rows: pd.DataFrame) -> pd.DataFrame:
    """Bytes that one rank sends in a step, by kind of group.

    Args:
        rows: What `recorded` or `expected` returned.

    Returns:
        One row a kind of group: `operations` (times that the rank takes part) and `sent_bytes`, largest first.
    """
    sent = [sent_bytes(r.operation, r.bytes, r.group_size) * r.count for r in rows.itertuples(index=False)]
    rows = rows.assign(sent_bytes=sent)
    return (
        rows.groupby("group")
        .agg(operations=("count", "sum"), sent_bytes=("sent_bytes", "sum"))
        .sort_values("sent_bytes", ascending=False)
    )

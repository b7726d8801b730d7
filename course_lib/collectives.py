"""Who sends what to whom: what a recorded run sent, and the closed form that says it beforehand.

Sizes are those of the whole that an operation moves: the output of an all-gather, the input of a reduce-scatter, the
tensor of an all-reduce.  `sent_bytes` turns them into what one rank has to send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import ceil, lcm
from typing import TYPE_CHECKING, Any

from course_lib.layout import padded_vocab_size, rank_grid, stage_layers
from course_lib.layout_sizes import Fields, Layout
from course_lib.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from course_lib.runs import Run

__all__ = ["NotCounted", "by_group", "compare", "expected", "picture", "recorded", "sent_bytes"]

_SHARES = [i / 24 for i in range(25)]
KEY = ["phase", "operation", "group", "group_size", "bytes"]


class NotCounted(ValueError):
    """The closed form does not cover this model."""


def sent_bytes(operation: str, size_bytes: float, group_size: int) -> float:
    """How many bytes does one rank send, if ranks pass parts along a ring?

    Args:
        operation: Name of the operation, as `recorded` has it.
        size_bytes: The whole that it moves.
        group_size: Ranks in the group.

    Returns:
        Bytes that leave one rank.  For the best known algorithms of large messages; a small one costs waiting instead.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).

    >>> [sent_bytes(name, 1000, 4) for name in ("all_reduce", "all_gather", "reduce_scatter", "send", "recv")]
    [1500.0, 750.0, 750.0, 1000.0, 0.0]
    """
    others = (group_size - 1) / group_size
    shares = {"all_reduce": 2 * others, "all_gather": others, "reduce_scatter": others, "all_to_all": others}
    return size_bytes * (shares | {"send": 1.0, "recv": 0.0, "barrier": 0.0}).get(operation, others)


def recorded(run: Run, *, rank: int = 0, step: int | None = None) -> pd.DataFrame:
    """What one rank took part in during one step, equal operations counted together.

    Args:
        run: A run that was launched with `record=True`.
        rank: Global rank.
        step: The step; the last one by default.

    Returns:
        Rows `phase, operation, group, group_size, bytes, count`: `bytes` is the size of one operation.

    Raises:
        ValueError: If the run was not recorded, or has no such rank or step.
    """
    rows = run.collectives
    if not len(rows):
        raise ValueError(f"run {run.name!r} has no collectives: launch it with launch.run(..., record=True)")
    step = int(rows.step.max()) if step is None else step
    rows = rows[(rows["rank"] == rank) & (rows.step == step)]
    if not len(rows):
        raise ValueError(f"run {run.name!r} recorded nothing of rank {rank} in step {step}")
    return rows.groupby(KEY, sort=False).size().rename("count").reset_index()


def expected(cfg: Any, *, ranks: int, rank: int = 0, element_bytes: int = 4, gradient_bytes: int = 4) -> pd.DataFrame:
    """What one rank takes part in during one step, the first excepted, by closed form.

    Let A = sequence x micro batch x hidden x `element_bytes`, the size of the residual stream.  For every layer and
    microbatch, tensor parallelism all-reduces A twice forward and twice backward; the embedding and the output layer add
    one each, and the loss three small ones.  With sequence parallelism each becomes a reduce-scatter and an all-gather,
    and backward gathers the inputs of the column-parallel layers once more.  In its first step the optimizer asks once more
    whether every rank has a gradient norm.

    Args:
        cfg: A Bridge `ConfigContainer`, or `config.yaml` read back (`run.config`).
        ranks: World size.
        rank: Global rank.
        element_bytes: Bytes of an activation or parameter: 4 in fp32, 2 in bf16.
        gradient_bytes: Bytes of a gradient where it is reduced.

    Returns:
        Rows as `recorded` has them, and `why`.

    Raises:
        NotCounted: For experts, context parallelism, recomputation, other layers than Llama's, or an optimizer whose
            state is divided into several instances.

    Source: megatron-core tensor_parallel/layers.py, mappings.py, cross_entropy.py, distributed/finalize_model_grads.py,
    pipeline_parallel/schedules.py @ 0.19.2
    """
    import pandas as pd

    layout = Layout.from_config(cfg, ranks=ranks)
    fields = Fields.of(cfg)
    _refuse_what_is_not_counted(fields, layout)
    rows = [row for row in _rows(fields, layout, rank, element_bytes, gradient_bytes) if row[3] > 1 and row[5]]
    return pd.DataFrame(rows, columns=[*KEY, "count", "why"])


def _refuse_what_is_not_counted(fields: Fields, layout: Layout) -> None:
    wanted = {
        "num_moe_experts": None,
        "recompute_granularity": None,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "multi_latent_attention": False,
        "qk_layernorm": False,
    }
    defaults = {"add_bias_linear": True, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute"}
    for name, value in wanted.items():
        found = fields.model(name, defaults.get(name, value))
        if found != value:
            raise NotCounted(f"{name}={found!r} sends other things than this closed form counts (it wants {value!r})")
    if layout.context_parallel_size > 1:
        raise NotCounted(
            f"CP={layout.context_parallel_size} runs inside Transformer Engine's attention, which no CPU rank can record: "
            "set context_parallel_size to 1"
        )


def _rows(fields: Fields, layout: Layout, rank: int, element_bytes: int, gradient_bytes: int) -> Iterator[tuple]:
    """Rows (phase, operation, group, group size, bytes, count, why); those without partners are left in."""
    tp, pp, dp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size
    sequence, micro = fields.model("seq_length"), fields.get("train", "micro_batch_size")
    hidden = fields.model("hidden_size")
    stage = rank // (tp * dp)
    layers = sum(stage_layers(fields)[stage])
    first, last = int(stage == 0), int(stage == pp - 1)
    m = fields.get("train", "global_batch_size") // (micro * dp)
    stream = sequence * micro * hidden * element_bytes
    split_in, split_out = 2 * layers + last, 2 * layers + first  # column-parallel inputs, row-parallel outputs
    if layout.sequence_parallel:
        yield "forward", "reduce_scatter", "tp", tp, stream, m * split_out, "row-parallel outputs and the embedding"
        yield "forward", "all_gather", "tp", tp, stream, m * split_in, "column-parallel inputs"
        both = m * (split_in + split_out)
        yield "backward", "all_gather", "tp", tp, stream, both, "inputs again, and gradients of the outputs"
        yield "backward", "reduce_scatter", "tp", tp, stream, m * split_in, "gradients of column-parallel inputs"
        norms = gradient_bytes * hidden * (2 * layers + last)
        yield (
            "update",
            "all_reduce",
            "tp",
            tp,
            norms,
            1,
            "gradients of the norms, which saw a part of the sequence each",
        )
    else:
        yield "forward", "all_reduce", "tp", tp, stream, m * split_out, "row-parallel outputs and the embedding"
        yield "backward", "all_reduce", "tp", tp, stream, m * split_in, "gradients of column-parallel inputs"
    yield "forward", "all_reduce", "tp", tp, 4 * sequence * micro, 3 * m * last, "loss: maximum, target logit, sum"
    yield from _pipeline_rows(layout, stage, m, stream // (tp if layout.sequence_parallel else 1))
    yield from _update_rows(fields, layout, stage, element_bytes, gradient_bytes)


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
    tp, pp, dp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size
    sharded = bool(fields.get("ddp", "use_distributed_optimizer", False))
    tied = bool(fields.model("share_embeddings_and_output_weights", True))
    for count in _buckets(fields, layout, stage, sharded=sharded):
        if sharded:
            count = ceil(count / lcm(dp, 128)) * lcm(dp, 128)  # equal shards, aligned for NCCL
            yield (
                "update",
                "reduce_scatter",
                "dp-cp",
                dp,
                gradient_bytes * count,
                1,
                "gradients, to the rank that steps",
            )
            yield "update", "all_gather", "dp-cp", dp, element_bytes * count, 1, "parameters, back to everybody"
        else:
            yield "update", "all_reduce", "dp-cp", dp, gradient_bytes * count, 1, "gradients"
    if tied and pp > 1 and stage in (0, pp - 1):
        size_bytes = gradient_bytes * _vocabulary(fields, layout) * fields.model("hidden_size")
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
    table = _vocabulary(fields, layout) * fields.model("hidden_size")
    for chunk in range(chunks):
        count = _parameters(fields, layout, stage, chunk)
        shared = (stage == 0 and chunk == 0) or (stage == pp - 1 and chunk == chunks - 1)
        if sharded and tied and pp > 1 and shared:  # a bucket of its own, so that both copies are cut alike
            yield table
            count -= table
        yield count


def _vocabulary(fields: Fields, layout: Layout) -> int:
    """Rows of the embedding on one rank."""
    tp, preset = layout.tensor_model_parallel_size, fields.model("vocab_size")
    if preset is not None and not fields.get("tokenizer", "use_tokenizer_vocab_size", False):
        return preset // tp  # Bridge takes a preset size as it is
    divisible_by = fields.model("make_vocab_size_divisible_by", 128)
    given = fields.get("tokenizer", "vocab_size")
    return padded_vocab_size(given, tensor_model_parallel_size=tp, divisible_by=divisible_by) // tp


def _parameters(fields: Fields, layout: Layout, stage: int, chunk: int) -> int:
    """Parameters of one model chunk on one rank."""
    tp, chunks = layout.tensor_model_parallel_size, stage_layers(fields)[stage]
    hidden, heads = fields.model("hidden_size"), fields.model("num_attention_heads")
    groups = fields.model("num_query_groups", heads)
    channels = fields.model("kv_channels", hidden // heads)
    matrices = 3 if fields.model("gated_linear_unit", False) else 2
    cut = hidden * channels * (2 * heads + 2 * groups) + matrices * hidden * fields.model("ffn_hidden_size", 4 * hidden)
    begins = stage == 0 and chunk == 0
    ends = stage == layout.pipeline_model_parallel_size - 1 and chunk == len(chunks) - 1
    tied = fields.model("share_embeddings_and_output_weights", True)
    tables = 1 if begins and ends and tied else int(begins) + int(ends)
    norms = hidden * (2 * chunks[chunk] + int(ends))
    return chunks[chunk] * cut // tp + norms + tables * _vocabulary(fields, layout) * hidden


def compare(run: Run, *, rank: int = 0, step: int | None = None) -> pd.DataFrame:
    """The recorded operations of one step beside the closed form.

    Args:
        run: A run that was launched with `record=True`.
        rank: Global rank.
        step: The step; the last one by default.

    Returns:
        Rows `phase, operation, group, group_size, bytes, expected, recorded, why`; the two counts are equal if the
        closed form holds.
    """
    planned = expected(run.config, ranks=run.launch["ranks"], rank=rank)
    found = recorded(run, rank=rank, step=step)
    planned = planned.groupby(KEY, sort=False).agg(expected=("count", "sum"), why=("why", "first")).reset_index()
    both = planned.merge(found.rename(columns={"count": "recorded"}), on=KEY, how="outer", sort=False)
    both[["expected", "recorded"]] = both[["expected", "recorded"]].fillna(0).astype(int)
    return both[[*KEY, "expected", "recorded", "why"]].fillna({"why": "not in the closed form"})


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


def picture(layout: Layout, sent: Mapping[str, float], *, ax: Axes, title: str = "") -> Axes:
    """Draw the ranks as a grid, and the groups that talk to each other as lines with the bytes that a rank sends.

    A column is a place in the tensor-parallel group, a row a copy of the model, a block of rows a pipeline stage.

    Args:
        layout: The layout.
        sent: Bytes that one rank sends in a step, by kind of group (`tp`, `dp-cp`, `pp`).
        ax: The axis to draw on.
        title: What the picture shows.

    Returns:
        The axis.
    """
    from course_lib.plots import COLOURS, INK

    tp, dp = layout.tensor_model_parallel_size, layout.data_parallel_size * layout.context_parallel_size
    wide = layout.pipeline_model_parallel_size

    def place(rank: int) -> tuple[float, float]:
        stage, rest = divmod(rank, tp * dp)
        return stage * (tp + 0.8) + rest % tp, -(rest // tp)

    styles = {"tp": ("blue", "-"), "dp-cp": ("vermilion", "--"), "pp": ("green", "-.")}
    grid, sentences = rank_grid(layout), []
    for kind, (colour, dashes) in styles.items():
        groups = [group for group in grid[kind] if len(group) > 1]
        if not groups or not sent.get(kind):
            continue
        label = f"{kind}: {len(groups)} groups of {len(groups[0])}, {format_bytes(sent[kind])} a rank and step"
        for number, group in enumerate(groups):
            named = {"label": label} if not number else {}
            for (x0, y0), (x1, y1) in pairwise(place(rank) for rank in group):
                # Stages lie side by side, so their lines are arcs that pass below the tensor-parallel ones.
                depth = 0.35 if kind == "pp" else 0.0
                xs, ys = zip(
                    *((x0 + t * (x1 - x0), y0 + t * (y1 - y0) - 4 * depth * t * (1 - t)) for t in _SHARES), strict=True
                )
                ax.plot(xs, ys, color=COLOURS[colour], linestyle=dashes, linewidth=2.5, **named)
                named = {}
        sentences.append(label)
    for rank in range(layout.world_size):
        x, y = place(rank)
        ax.plot(x, y, marker="o", markersize=21, color=INK, linestyle="none")
        ax.text(x, y, str(rank), ha="center", va="center", color="white", fontweight="bold")
    for stage in range(wide):
        if wide > 1:
            ax.text(stage * (tp + 0.8) + (tp - 1) / 2, 0.55, f"stage {stage}", ha="center", va="bottom")
    ax.set_xlim(-0.6, wide * (tp + 0.8) - 1.2)
    ax.set_ylim(-dp + 0.4, 1.0 if wide > 1 else 0.6)
    ax.set_axis_off()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)
    if title:
        ax.set_title(title, loc="left")
    ax.set_label(". ".join([f"{layout}: {layout.world_size} ranks as a grid", *sentences]))
    return ax

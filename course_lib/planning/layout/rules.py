"""The rules behind :mod:`course_lib.planning.layout`, one function for each subject; and the padded vocabulary.

Source: megatron-core 0.19.2 (``model_parallel_config.py``, ``parallel_state.py``, ``num_microbatches_calculator.py``,
``pipeline_parallel/schedules.py``, ``ssm/mamba_mixer.py``, ``tensor_parallel/layers.py``, and in ``transformer/``
``transformer_config.py``, ``attention.py``, ``mlp.py``, ``moe/moe_layer.py``) and megatron-bridge 0.6.2
(``training/config.py``, ``training/setup.py``, ``models/transformer_config.py``).
``tests/planning/test_layout_rules.py`` holds these rules against those functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any

from course_lib.common.config import Fields
from course_lib.planning.layout.sizes import Layout, LayoutError, Refusal, divisors, next_multiple
from course_lib.planning.layout.stages import hybrid_pattern, stage_layers

TP = "model.tensor_model_parallel_size"
EP = "model.expert_model_parallel_size"
PP = "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
BATCHED = "model.batch_p2p_comm"
BATCH = "train.global_batch_size"
MODEL_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("seq_length", "vocab_size", "make_vocab_size_divisible_by", "microbatch_group_size_per_vp_stage"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("mamba_num_heads", "mamba_num_groups"),
)
OTHER_SIZES = (("dataset", "seq_length"), ("tokenizer", "vocab_size"))


def refusals(layout: Layout, fields: Fields) -> list[Refusal]:
    """Every reason why this layout of this model cannot run.

    Returns:
        The reasons; empty if Megatron would accept it.
    """
    if sizes := list(_positive(layout, fields)):  # every later rule divides by these
        return sizes
    rules = (
        _world,
        _pipeline,
        _two_stages,
        _divided_by_size,
        _mamba,
        _multiples_of_size,
        _attention,
        _vocabulary,
        _sequence,
        _experts,
        _batch,
    )
    return [refusal for rule in rules for refusal in rule(layout, fields)]


def _positive(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    names = ["tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor", "virtual_pipeline_model"]
    ranks = {f"model.{name}_parallel_size": getattr(layout, f"{name}_parallel_size") for name in names}
    samples = {
        f"{section}.{name}": fields.get(section, name)
        for section, prefix in (("train", ""), ("validation", "eval_"))
        for name in (f"{prefix}global_batch_size", f"{prefix}micro_batch_size")
    }
    # Bridge takes the layers of a hybrid model from its pattern.
    absent = ("num_layers", "num_attention_heads") if hybrid_pattern(fields) else ()
    sizes = {f"model.{name}": fields.model(name) for name in MODEL_SIZES if name not in absent}
    sizes |= {f"{section}.{name}": fields.get(section, name) for section, name in OTHER_SIZES}
    for numbers, what in (
        ({"ranks": layout.world_size} | ranks, "number of ranks"),
        (samples, "number of samples"),
        (sizes, "size"),
    ):
        for field, value in numbers.items():
            missing = value is None and field != "ranks"
            if not missing and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                yield Refusal(field, f"{value!r} is not a {what}", "give a whole number of at least 1")


def _world(layout: Layout, _: Fields) -> Iterator[Refusal]:
    """``initialize_model_parallel``: the dense grid of ranks, and that of the experts over the same ranks."""
    grids = ["data_parallel_size"]
    if layout.expert_model_size != layout.model_parallel_size:
        grids.append("expert_data_parallel_size")
    for copies in grids:
        try:
            getattr(layout, copies)
        except LayoutError as error:
            yield from error.refusals


def _two_stages(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``validate_args`` of Megatron-LM, which Bridge does not call; CPU ranks tell the messages apart by their tags."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    if fields.get("comm_overlap", "tp_comm_overlap") is None:
        batched = fields.model("batch_p2p_comm", True)
    else:  # Bridge then overlaps the transfers of interleaved stages, unless told otherwise
        batched = fields.get("comm_overlap", "batch_p2p_comm", False)
    if stages == 2 and chunks > 1 and fields.get("dist", "distributed_backend") == "nccl" and batched:
        yield Refusal(
            BATCHED,
            f"VPP={chunks} over PP=2 takes gradients for activations: the next stage is the previous one, and NCCL matches "
            "the messages of a batch by their order",
            changes=({BATCHED: False, "model.overlap_p2p_comm": True},),
        )


def _divided_by_size(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Heads and experts are whole: the size must divide them (``divide`` in the layers, asserts of ``MambaMixer``)."""
    tensor, hybrid = layout.tensor_model_parallel_size, "M" in hybrid_pattern(fields)
    for name, size, value, what in (
        ("TP", tensor, fields.model("num_attention_heads"), "query heads"),
        ("TP", tensor, fields.model("mamba_num_heads") if hybrid else None, "Mamba heads"),
        ("TP", tensor, fields.model("mamba_num_groups") if hybrid else None, "Mamba state groups"),
        ("EP", layout.expert_model_parallel_size, fields.model("num_moe_experts"), "experts"),
    ):
        if value and value % size:
            field = TP if name == "TP" else EP
            changes = tuple({field: fitting} for fitting in divisors(value))
            yield Refusal(field, f"{name}={size} does not divide {value} {what}", changes=changes)


def _mamba(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Asserts of ``MambaMixer`` and ``MambaContextParallel``, which shares the heads of a TP rank among the CP ranks."""
    heads, groups = fields.model("mamba_num_heads"), fields.model("mamba_num_groups")
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    if "M" not in hybrid_pattern(fields) or not heads or not groups or heads % tensor or groups % tensor:
        return
    heads_here, groups_here = heads // tensor, groups // tensor
    if heads % groups:
        message, field = f"{groups} Mamba state groups do not divide {heads} Mamba heads", "model.mamba_num_heads"
        yield Refusal(field, message, changes=({field: next_multiple(groups, heads)},))
    elif heads_here % context or (groups_here % context and context % groups_here):
        message = f"CP={context} does not share {heads_here} Mamba heads in {groups_here} groups of a TP rank"
        field = "model.context_parallel_size"
        fitting = [one for one in divisors(heads_here) if not groups_here % one or not one % groups_here]
        yield Refusal(field, message, changes=tuple({field: one} for one in fitting))


def _multiples_of_size(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Feed-forward widths: ``divide`` in the row parallel layer of ``MLP``, of experts and shared experts too."""
    tensor, expert_tensor = layout.tensor_model_parallel_size, layout.resolved_expert_tensor_parallel_size
    width = fields.model("ffn_hidden_size") or 4 * fields.model("hidden_size", 0)
    shared = fields.model("moe_shared_expert_intermediate_size")
    experts = fields.model("num_moe_experts")
    has_dense_layers = not experts or fields.model("moe_layer_freq", 1) != 1
    for name, size, field, value, exists in (
        ("TP", tensor, "ffn_hidden_size", width, has_dense_layers),
        ("ETP", expert_tensor, "moe_ffn_hidden_size", fields.model("moe_ffn_hidden_size", width), experts),
        ("TP", tensor, "moe_shared_expert_intermediate_size", shared, experts),
    ):
        if exists and value and value % size:
            yield _multiple(f"model.{field}", f"{name}={size} does not divide {field}={value}", size, value)


def _pipeline(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Layers per stage, and the micro-batches that the interleaved schedule needs."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    layers = fields.model("num_layers", 0)
    if stages == 1 and chunks is not None:
        message = f"VPP={chunks} interleaves pipeline stages, but PP=1 has one stage"
        more = ({PP: size} for size in divisors(layers)[1:])
        yield Refusal(VPP, message, changes=({VPP: None}, *more))
    elif chunks == 1:
        message = f"VPP=1 gives each of PP={stages} stages one chunk, which interleaves nothing"
        more = ({VPP: size} for size in divisors(layers // stages)[1:])
        yield Refusal(VPP, message, "None is the schedule without interleaving", ({VPP: None}, *more))
    if stages == 1 or chunks == 1:  # what else is wrong, is so without chunks, too
        chunks, fields = None, Fields(fields.cfg, {**(fields.changed or {}), VPP: None})
    if layers or hybrid_pattern(fields):
        try:
            in_first_stage = len(stage_layers(fields)[0])
        except LayoutError as error:
            yield from error.refusals
            return
        if in_first_stage > 1:  # a written plan may interleave without saying so
            chunks = in_first_stage
    batch, micro = fields.get("train", "global_batch_size"), fields.get("train", "micro_batch_size")
    if stages == 1 or chunks is None or not batch or not micro or layout.world_size % layout.model_parallel_size:
        return
    microbatches, rest = divmod(batch, micro * layout.data_parallel_size)
    group = fields.model("microbatch_group_size_per_vp_stage", stages)
    if not rest and (not stages <= group <= microbatches or 0 < microbatches % group < stages):
        wanted = max(group, stages)
        change = {BATCH: next_multiple(wanted, microbatches) * micro * layout.data_parallel_size}
        if group < stages:
            change["model.microbatch_group_size_per_vp_stage"] = None
        message = f"interleaving PP={stages} feeds micro-batches in groups of {group}, and a step has {microbatches}"
        yield Refusal(BATCH, message, f"a step of whole groups of {wanted} micro-batches", (change,))


def _attention(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__``, and the ``divide`` calls in ``SelfAttention`` and its projections."""
    tensor, heads = layout.tensor_model_parallel_size, fields.model("num_attention_heads")
    if not heads:
        return
    groups = fields.model("num_query_groups") or heads
    if groups % tensor and tensor % groups:
        message = f"TP={tensor} is neither a divisor nor a multiple of {groups} query groups"
        fitting = [size for size in divisors(heads) if not groups % size or not size % groups]
        yield Refusal(TP, message, changes=tuple({TP: size} for size in fitting))
    if fields.model("multi_latent_attention", False):
        return
    if heads % groups:
        field, message = "model.num_query_groups", f"{groups} query groups do not divide {heads} query heads"
        yield Refusal(field, message, changes=tuple({field: number} for number in divisors(heads)))
    channels = fields.head_channels
    rotates = fields.model("position_embedding_type") in ("rope", "yarn", "mrope")
    if rotates and channels % 2 and int(channels * fields.model("rotary_percent", 1.0)) == channels:
        field, message = "model.kv_channels", f"rotary positions turn pairs of channels, and a head has {channels}"
        yield Refusal(field, message, changes=({field: channels + 1},))
    rows = channels * (heads + 2 * groups)
    if not heads % tensor and rows % tensor:
        yield Refusal(
            TP,
            f"TP={tensor} does not divide the {rows} rows of the fused query, key and value projection"
            f" ({heads} + 2 x {groups} heads of {channels})",
            changes=tuple({TP: size} for size in divisors(heads) if not rows % size),
        )


def _vocabulary(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``VocabParallelEmbedding``; Bridge's ``_validate_and_set_vocab_size`` decides whether rows are padded."""
    rows, tensor = fields.model("vocab_size"), layout.tensor_model_parallel_size
    if padded_from_tokenizer(fields):
        return  # they come from the tokenizer, and then they are padded
    field, ids = "model.vocab_size", fields.get("tokenizer", "vocab_size", 0)
    divisible_by = fields.model("make_vocab_size_divisible_by", 128)
    padded = {field: padded_vocab_size(max(rows, ids), tensor_model_parallel_size=tensor, divisible_by=divisible_by)}
    if rows < ids:
        message = f"{rows} rows cannot hold the {ids} ids of the tokenizer"
        yield Refusal(field, message, "None takes the tokenizer's", (padded, {field: None}))
    # A whole configuration: a size set on the model is taken as it is, whatever should_pad_vocab said before.
    if rows % tensor and (fields.is_container or not fields.model("should_pad_vocab", False)):
        pads = ({"tokenizer.use_tokenizer_vocab_size": True},) if ids else ()
        message = f"TP={tensor} does not divide the {rows} rows of the embedding"
        yield Refusal(field, message, "the tokenizer's size is padded" if pads else "", (padded, *pads))


def _sequence(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Bridge's ``validate`` (CP and equal lengths), ``DotProductAttention`` and ``_split_along_first_dim``."""
    length, data_length = fields.model("seq_length"), fields.get("dataset", "seq_length")
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    on_cpu = (
        fields.get("dist", "distributed_backend") == "gloo"
    )  # where course_lib.ranks.cpu.attention gathers the keys
    if context > 1 and fields.model("transformer_impl") == "local" and not on_cpu:
        yield Refusal(
            "model.context_parallel_size",
            f"CP={context} needs Transformer Engine's attention; the local layers refuse it",
            "or run on GPUs with Transformer Engine",
            ({"model.context_parallel_size": 1},),
        )
    if length is None:
        return
    if data_length not in (None, length):
        yield Refusal(
            "dataset.seq_length",
            f"the data has sequences of {data_length} tokens, the model of {length}",
            changes=({"dataset.seq_length": length}, {"model.seq_length": data_length}),
        )
    pieces, shares = 2 * context if context > 1 else 1, context * tensor if layout.sequence_parallel else 1
    size = lcm(pieces, shares)
    if length % pieces:
        message = f"CP={context} cuts a sequence into 2 x {context} pieces, which do not divide {length} tokens"
    elif length % size:
        message = f"sequence parallelism shares {length // context} tokens of a sequence among TP={tensor} ranks"
    else:
        return
    names = ("model.seq_length", *(("dataset.seq_length",) if data_length else ()))
    tokens = [number for number in (length // size * size, next_multiple(size, length)) if number]
    yield Refusal("model.seq_length", message, f"multiples of {size}", tuple(dict.fromkeys(names, n) for n in tokens))


def _experts(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__`` and the first training step of ``MoELayer``."""
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    if not fields.model("num_moe_experts"):
        if expert > 1:
            yield Refusal(EP, f"EP={expert}, but the model has no experts", changes=({EP: 1},))
        return
    if tensor > 1 and not layout.sequence_parallel:
        field, message = "model.sequence_parallel", f"experts with TP={tensor} train only with sequence parallelism"
        yield Refusal(field, message, changes=({field: True}, {TP: 1}))
    experts, chosen = fields.model("num_moe_experts"), fields.model("moe_router_topk") or 1
    if chosen > experts:
        field, message = "model.moe_router_topk", f"a token cannot choose {chosen} of {experts} experts"
        yield Refusal(field, message, changes=({field: experts},))
    expert_tensor = layout.resolved_expert_tensor_parallel_size
    if expert_tensor > 1 and fields.model("add_bias_linear", False):
        field, message = "model.add_bias_linear", f"experts with biases cannot be split by ETP={expert_tensor}"
        yield Refusal(field, message, changes=({field: False}, {"model.expert_tensor_parallel_size": 1}))


def _batch(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``ConstantNumMicroBatchesCalculator``; Bridge's ``validate`` for evaluation."""
    if layout.world_size % layout.model_parallel_size:
        return
    copies = layout.data_parallel_size
    batch, micro = fields.get("train", "global_batch_size"), fields.get("train", "micro_batch_size")
    own_batch = fields.get("validation", "eval_global_batch_size", batch)
    own_micro = fields.get("validation", "eval_micro_batch_size", micro)
    checked = {BATCH: (batch, micro)}
    if (own_batch, own_micro) != (batch, micro):  # an evaluation that says nothing is refused with the training, once
        checked["validation.eval_global_batch_size"] = (own_batch, own_micro)
    for field, (samples, share) in checked.items():
        if samples and share and samples % (share * copies):
            message = f"{samples} samples a step cannot be shared by DP={copies} copies with micro-batches of {share}"
            yield _multiple(field, message, share * copies, samples)


def _multiple(field: str, message: str, size: int, value: int) -> Refusal:
    """The refusal of a value that a size does not divide, where the value is the one to change."""
    below = value // size * size
    changes = ({field: below},) if below else ()
    return Refusal(field, message, f"multiples of {size}", (*changes, {field: next_multiple(size, value)}))


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int = 1, divisible_by: int = 128) -> int:
    """How many rows does the embedding get?

    Args:
        tensor_model_parallel_size: TP; every rank holds the same number of rows.
        divisible_by: ``make_vocab_size_divisible_by`` of the model.

    Returns:
        The next multiple of ``divisible_by`` x TP.

    Raises:
        ValueError: If a number is not positive.

    Source: megatron-core 0.19.2 ``megatron/training/vocab_utils.py``.

    >>> [padded_vocab_size(128256, tensor_model_parallel_size=tp) for tp in (1, 2, 4, 8)]
    [128256, 128256, 128512, 129024]
    """
    if min(vocab_size, tensor_model_parallel_size, divisible_by) <= 0:
        given = f"vocab_size={vocab_size}, tensor_model_parallel_size={tensor_model_parallel_size}"
        raise ValueError(f"{given} and divisible_by={divisible_by} must be positive")
    return next_multiple(divisible_by * tensor_model_parallel_size, vocab_size)


def embedding_rows(cfg: Any) -> int:
    """How many rows does the embedding of a whole configuration get?

    Args:
        cfg: A Bridge ``ConfigContainer``, or the same as nested mappings.

    Returns:
        The tokenizer's ids, padded, or the model's own ``vocab_size`` as it is.

    Raises:
        ValueError: If the configuration says neither.

    Source: megatron-bridge 0.6.2 ``training/setup.py`` ``_validate_and_set_vocab_size``.

    >>> model, tokenizer = dict(tensor_model_parallel_size=8), dict(vocab_size=500)
    >>> embedding_rows(dict(model=model, tokenizer=tokenizer))
    1024
    >>> embedding_rows(dict(model=model | dict(vocab_size=600), tokenizer=tokenizer))
    600
    """
    fields = Fields.of(cfg)
    if not padded_from_tokenizer(fields):
        return fields.model("vocab_size")
    if (ids := fields.get("tokenizer", "vocab_size")) is None:
        raise ValueError(
            "the number of ids is known only to the tokenizer, which is not loaded to plan: set cfg.tokenizer.vocab_size "
            "or cfg.model.vocab_size"
        )
    return padded_vocab_size(
        ids,
        tensor_model_parallel_size=fields.model("tensor_model_parallel_size", 1),
        divisible_by=fields.model("make_vocab_size_divisible_by", 128),
    )


def padded_from_tokenizer(fields: Fields) -> bool:
    """Whether Bridge takes the tokenizer's size, and pads it, instead of the model's own."""
    return fields.model("vocab_size") is None or fields.get("tokenizer", "use_tokenizer_vocab_size", False)

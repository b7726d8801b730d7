"""The rules behind :mod:`course_lib.layout`: one function for each subject, each reason in the course's words.

Source: megatron-core 0.19.2 (``model_parallel_config.py``, ``parallel_state.py``, ``num_microbatches_calculator.py``,
``pipeline_parallel/schedules.py``, ``ssm/mamba_mixer.py``, ``tensor_parallel/layers.py``, and in ``transformer/``
``transformer_config.py``, ``attention.py``, ``mlp.py``, ``moe/moe_layer.py``) and megatron-bridge 0.6.2
(``training/config.py``, ``training/setup.py``, ``models/transformer_config.py``).
``tests/test_layout_rules.py`` holds these rules against those functions.
"""

from __future__ import annotations

from collections.abc import Iterator

from course_lib.layout_sizes import Fields, Layout, LayoutError, Refusal, divisors, either
from course_lib.layout_stages import stage_layers
from course_lib.layout_vocabulary import next_multiple, padded_vocab_size, rows_follow_the_tokenizer
from course_lib.parameters import head_channels

__all__ = ["refusals"]

TP = "model.tensor_model_parallel_size"
EP = "model.expert_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"


def refusals(layout: Layout, fields: Fields) -> list[Refusal]:
    """Every reason why this layout of this model cannot run.

    Args:
        layout: The sizes.
        fields: The configuration they were read from.

    Returns:
        The reasons; empty if Megatron would accept it.
    """
    if sizes := list(_positive(layout, fields)):  # every later rule divides by these
        return sizes
    rules = (
        _world,
        _pipeline,
        _divided_by_size,
        _multiples_of_size,
        _attention,
        _vocabulary,
        _sequence,
        _experts,
        _batch,
    )
    return [refusal for rule in rules for refusal in rule(layout, fields)]


def _use_multiple(size: int, value: int) -> str:
    """The fix for a value that a size does not divide, where the value is the one to change."""
    return f"use a multiple of {size}, e.g. {next_multiple(size, value)}"


def _positive(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    ranks = ["tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor", "virtual_pipeline_model"]
    sizes = {f"model.{name}_parallel_size": getattr(layout, f"{name}_parallel_size") for name in ranks}
    batches = {f"train.{name}_batch_size": fields.get("train", f"{name}_batch_size") for name in ("global", "micro")}
    for numbers, what in (({"ranks": layout.world_size} | sizes, "ranks"), (batches, "samples")):
        for field, value in numbers.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                yield Refusal(field, f"{value!r} is not a number of {what}", "give a whole number of at least 1")


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


def _divided_by_size(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Heads and experts are whole: the size must divide them (``divide`` in the layers, asserts of ``MambaMixer``)."""
    tensor, hybrid = layout.tensor_model_parallel_size, "M" in _hybrid_pattern(fields)
    for name, size, value, what in (
        ("TP", tensor, fields.model("num_attention_heads"), "query heads"),
        ("TP", tensor, fields.model("mamba_num_heads") if hybrid else None, "Mamba heads"),
        ("TP", tensor, fields.model("mamba_num_groups") if hybrid else None, "Mamba state groups"),
        ("EP", layout.expert_model_parallel_size, fields.model("num_moe_experts"), "experts"),
    ):
        if value and value % size:
            field, fix = TP if name == "TP" else EP, f"choose {either(divisors(value))}"
            yield Refusal(field, f"{name}={size} does not divide {value} {what}", fix)


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
            message = f"{name}={size} does not divide {field}={value}"
            yield Refusal(f"model.{field}", message, _use_multiple(size, value))


def _pipeline(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Layers per stage, and the micro-batches that the interleaved schedule needs."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if stages == 1 and chunks is not None:
        message = f"VPP={chunks} interleaves pipeline stages, but PP=1 has one stage"
        yield Refusal(VPP, message, "set it to None, or PP to at least 2")
        return
    # A hybrid model carries its stage borders in its layer pattern.
    if fields.model("num_layers") is not None and not _hybrid_pattern(fields):
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
        yield Refusal(
            "train.global_batch_size",
            f"interleaving PP={stages} feeds micro-batches in groups of {group}, and a step has {microbatches}",
            f"let a step have a multiple of {max(group, stages)} micro-batches",
        )


def _hybrid_pattern(fields: Fields) -> str:
    """The layer pattern of a model that mixes attention and Mamba layers; empty for other models."""
    return fields.model("hybrid_layer_pattern") or fields.model("hybrid_override_pattern", "")


def _attention(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__``, and the ``divide`` calls in ``SelfAttention`` and its projections."""
    tensor, heads = layout.tensor_model_parallel_size, fields.model("num_attention_heads")
    if not heads:
        return
    groups = fields.model("num_query_groups") or heads
    if groups % tensor and tensor % groups:
        message = f"TP={tensor} is neither a divisor nor a multiple of {groups} query groups"
        fits = [size for size in divisors(heads) if not groups % size or not size % groups]
        yield Refusal(TP, message, f"choose {either(fits)}")
    if fields.model("multi_latent_attention", False):
        return
    if heads % groups:
        message, fix = f"{groups} query groups do not divide {heads} query heads", f"choose {either(divisors(heads))}"
        yield Refusal("model.num_query_groups", message, fix)
    channels = head_channels(fields)
    rows = channels * (heads + 2 * groups)
    if not heads % tensor and rows % tensor:
        yield Refusal(
            TP,
            f"TP={tensor} does not divide the {rows} rows of the fused query, key and value projection"
            f" ({heads} + 2 x {groups} heads of {channels})",
            f"choose {either(size for size in divisors(heads) if not rows % size)}",
        )


def _vocabulary(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``VocabParallelEmbedding``; Bridge's ``_validate_and_set_vocab_size`` decides whether rows are padded."""
    rows, tensor = fields.model("vocab_size"), layout.tensor_model_parallel_size
    if rows_follow_the_tokenizer(fields):
        return  # they come from the tokenizer, and then they are padded
    ids = fields.get("tokenizer", "vocab_size", 0)
    if rows < ids:
        message = f"{rows} rows cannot hold the {ids} ids of the tokenizer"
        yield Refusal("model.vocab_size", message, "raise it, or set it to None to take the tokenizer's")
    # A whole configuration: a size set on the model is taken as it is, whatever should_pad_vocab said before.
    padded = fields.model("should_pad_vocab", False) and not fields.is_container
    if rows % tensor and not padded:
        divisible_by = fields.model("make_vocab_size_divisible_by", 128)
        fitting = padded_vocab_size(rows, tensor_model_parallel_size=tensor, divisible_by=divisible_by)
        yield Refusal(
            "model.vocab_size",
            f"TP={tensor} does not divide the {rows} rows of the embedding",
            f"use {fitting}, or set tokenizer.use_tokenizer_vocab_size=True, which pads",
        )


def _sequence(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """Bridge's ``validate`` (CP and equal lengths), ``DotProductAttention`` and ``_split_along_first_dim``."""
    length, data_length = fields.model("seq_length"), fields.get("dataset", "seq_length")
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    on_cpu = fields.get("dist", "distributed_backend") == "gloo"  # where course_lib.cpu.context gathers the keys
    if context > 1 and fields.model("transformer_impl") == "local" and not on_cpu:
        yield Refusal(
            "model.context_parallel_size",
            f"CP={context} needs Transformer Engine's attention; the local layers refuse it",
            "set CP to 1, or run on GPUs with Transformer Engine",
        )
    if length is None:
        return
    if data_length not in (None, length):
        yield Refusal(
            "dataset.seq_length",
            f"the data has sequences of {data_length} tokens, the model of {length}",
            "set model.seq_length and dataset.seq_length to the same number",
        )
    if context > 1 and length % (2 * context):
        message = f"CP={context} cuts a sequence into 2 x {context} pieces, which do not divide {length} tokens"
        yield Refusal("model.seq_length", message, _use_multiple(2 * context, length))
    elif layout.sequence_parallel and length // context % tensor:
        message = f"sequence parallelism shares {length // context} tokens of a sequence among TP={tensor} ranks"
        yield Refusal("model.seq_length", message, _use_multiple(context * tensor, length))


def _experts(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__`` and the first training step of ``MoELayer``."""
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    if not fields.model("num_moe_experts"):
        if expert > 1:
            yield Refusal(EP, f"EP={expert}, but the model has no experts", "set EP to 1")
        return
    if tensor > 1 and not layout.sequence_parallel:
        message = f"experts with TP={tensor} train only with sequence parallelism"
        yield Refusal("model.sequence_parallel", message, "set model.sequence_parallel=True, or TP to 1")
    expert_tensor = layout.resolved_expert_tensor_parallel_size
    if expert_tensor > 1 and fields.model("add_bias_linear", False):
        message = f"experts with biases cannot be split by ETP={expert_tensor}"
        fix = "set model.add_bias_linear=False, or model.expert_tensor_parallel_size=1"
        yield Refusal("model.add_bias_linear", message, fix)


def _batch(layout: Layout, fields: Fields) -> Iterator[Refusal]:
    """``ConstantNumMicroBatchesCalculator``; Bridge's ``validate`` for evaluation."""
    if layout.world_size % layout.model_parallel_size:
        return
    copies = layout.data_parallel_size
    batch, micro = fields.get("train", "global_batch_size"), fields.get("train", "micro_batch_size")
    own_batch = fields.get("validation", "eval_global_batch_size", batch)
    own_micro = fields.get("validation", "eval_micro_batch_size", micro)
    checked = {"train.global_batch_size": (batch, micro)}
    if (own_batch, own_micro) != (batch, micro):  # an evaluation that says nothing is refused with the training, once
        checked["validation.eval_global_batch_size"] = (own_batch, own_micro)
    for field, (samples, share) in checked.items():
        if samples and share and samples % (share * copies):
            message = f"{samples} samples a step cannot be shared by DP={copies} copies with micro-batches of {share}"
            yield Refusal(field, message, _use_multiple(share * copies, samples))

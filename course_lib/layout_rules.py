"""The rules behind :mod:`course_lib.layout`: one function for each subject, each reason in the course's words.

Source: megatron-core 0.19.2 (``transformer/transformer_config.py``, ``model_parallel_config.py``,
``parallel_state.py``, ``transformer/{attention,mlp,transformer_block}.py``, ``tensor_parallel/layers.py``,
``transformer/moe/moe_layer.py``, ``pipeline_parallel/schedules.py``, ``num_microbatches_calculator.py``) and
megatron-bridge 0.6.2 (``training/config.py``, ``training/setup.py``, ``models/transformer_config.py``).
``tests/test_layout.py`` holds these rules against those functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

__all__ = [
    "Fields",
    "LayoutError",
    "Refusal",
    "divisors",
    "expert_world",
    "padded_vocab_size",
    "refusals",
    "split_layers",
    "world",
]


@dataclass(frozen=True)
class Refusal:
    """One reason why a layout cannot run.

    Attributes:
        field: The configuration field to change, e.g. ``model.tensor_model_parallel_size``.
        message: What was given and what it collides with.
        fix: What to do.
    """

    field: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}: {self.fix}"


class LayoutError(ValueError):
    """A layout cannot run; ``refusals`` holds every reason, not only the first."""

    def __init__(self, refusals: list[Refusal]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("\n".join(["this layout cannot run:", *(f"  - {refusal}" for refusal in refusals)]))


@dataclass(frozen=True)
class Fields:
    """Reads the same fields from a ``ConfigContainer``, a provider, or mappings of either (``config.yaml``)."""

    cfg: Any
    changed: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, cfg: Any) -> Fields:
        """Wrap a configuration, unless it is wrapped already."""
        return cfg if isinstance(cfg, Fields) else cls(cfg)

    @property
    def is_container(self) -> bool:
        return _read(self.cfg, "model") is not None

    def get(self, section: str, name: str, default: Any = None) -> Any:
        """A field of a section; ``default`` if either is missing or None."""
        value = _read(_read(self.cfg, section), name)
        return default if value is None else value

    def model(self, name: str, default: Any = None) -> Any:
        """A field of the model; Bridge's newer model configs keep some of them under ``transformer``."""
        changed = dict(self.changed)
        if name in changed:
            return changed[name]
        model = _read(self.cfg, "model") if self.is_container else self.cfg
        value = _read(model, name)
        if value is None:
            value = _read(_read(model, "transformer"), name)
        return default if value is None else value

    def replaced(self, changed: Mapping[str, Any]) -> Fields:
        """The same configuration with other model fields."""
        return replace(self, changed=tuple({**dict(self.changed), **changed}.items()))


def _read(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


class Sizes(Protocol):
    """What a rule reads of a :class:`course_lib.layout.Layout`."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    expert_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    sequence_parallel: bool

    @property
    def model_parallel_size(self) -> int: ...
    @property
    def expert_model_size(self) -> int: ...
    @property
    def data_parallel_size(self) -> int: ...
    @property
    def resolved_expert_tensor_parallel_size(self) -> int: ...


def refusals(layout: Sizes, fields: Fields) -> list[Refusal]:
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
        world,
        expert_world,
        _pipeline,
        _attention,
        _feed_forward,
        _vocabulary,
        _sequence,
        _experts,
        _mamba,
        _batch,
    )
    return [refusal for rule in rules for refusal in rule(layout, fields)]


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int = 1, divisible_by: int = 128) -> int:
    """How many rows does the embedding get?

    Args:
        vocab_size: Number of ids of the tokenizer.
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
    for name, value in (
        ("vocab_size", vocab_size),
        ("tensor_model_parallel_size", tensor_model_parallel_size),
        ("divisible_by", divisible_by),
    ):
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")
    multiple = divisible_by * tensor_model_parallel_size
    return ceil(vocab_size / multiple) * multiple


def _positive(layout: Sizes, _: Fields) -> Iterator[Refusal]:
    for name in (
        "world_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "virtual_pipeline_model_parallel_size",
    ):
        value = getattr(layout, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            where = "ranks" if name == "world_size" else f"model.{name}"
            yield Refusal(where, f"{value!r} is not a number of ranks", "give a whole number of at least 1")


def world(layout: Sizes, _: Fields | None = None) -> Iterator[Refusal]:
    """``initialize_model_parallel`` and Bridge's ``get_data_parallel_size``."""
    ranks, size = layout.world_size, layout.model_parallel_size
    if ranks % size:
        spelled = f"TP={layout.tensor_model_parallel_size} x PP={layout.pipeline_model_parallel_size}"
        spelled += f" x CP={layout.context_parallel_size}"
        yield Refusal(
            "model.tensor_model_parallel_size",
            f"{ranks} ranks cannot be divided into groups of {spelled} = {size}",
            f"let the product be {_either(divisors(ranks))}, or use a multiple of {size} ranks",
        )


def expert_world(layout: Sizes, _: Fields | None = None) -> Iterator[Refusal]:
    """The expert grid of ``initialize_model_parallel``: experts are laid over the same ranks in their own way."""
    ranks, expert = layout.world_size, layout.expert_model_size
    if ranks % expert and expert != layout.model_parallel_size:
        yield Refusal(
            "model.expert_model_parallel_size",
            f"{ranks} ranks cannot be divided into groups of ETP={layout.resolved_expert_tensor_parallel_size}"
            f" x EP={layout.expert_model_parallel_size} x PP={layout.pipeline_model_parallel_size} = {expert}",
            f"let the product be {_either(divisors(ranks))}, or use a multiple of {expert} ranks",
        )


def _pipeline(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__``, ``get_num_layers_to_build``, ``initialize_model_parallel``, the schedule."""
    chunks, stages = layout.virtual_pipeline_model_parallel_size, layout.pipeline_model_parallel_size
    if chunks is not None and stages == 1:
        yield Refusal(
            "model.virtual_pipeline_model_parallel_size",
            f"VPP={chunks} interleaves pipeline stages, but PP=1 has one stage",
            "set it to None, or PP to at least 2",
        )
    elif not _is_hybrid(fields):  # a hybrid model carries its stage borders in its layer pattern
        split, reasons = split_layers(fields)
        yield from reasons
        if split and len(split[0]) > 1:  # a written plan may interleave without saying so
            chunks = len(split[0])
    microbatches = _microbatches(layout, fields)
    if chunks is not None and stages > 1 and microbatches is not None:
        group = fields.model("microbatch_group_size_per_vp_stage") or stages
        if not stages <= group <= microbatches or 0 < microbatches % group < stages:
            yield Refusal(
                "train.global_batch_size",
                f"interleaving PP={stages} feeds micro-batches in groups of {group}, and a step has {microbatches}",
                f"let a step have a multiple of {max(group, stages)} micro-batches",
            )


def split_layers(fields: Fields) -> tuple[list[list[int]] | None, list[Refusal]]:
    """Layers of each chunk of each stage, or the reasons why there is no such division."""
    layers, stages = fields.model("num_layers"), fields.model("pipeline_model_parallel_size", 1)
    if layers is None:
        return None, []
    chunks = fields.model("virtual_pipeline_model_parallel_size") or 1
    first, last = fields.model("num_layers_in_first_pipeline_stage"), fields.model("num_layers_in_last_pipeline_stage")
    embedding = bool(fields.model("account_for_embedding_in_pipeline_split", False))
    loss = bool(fields.model("account_for_loss_in_pipeline_split", False))
    uneven, counted = first is not None or last is not None, embedding or loss
    plan = fields.model("pipeline_model_parallel_layout")
    if plan is not None and (uneven or counted):
        return None, [
            Refusal(
                "model.pipeline_model_parallel_layout",
                "a written layer plan cannot be combined with stage layer counts",
                "keep the plan and unset num_layers_in_*_pipeline_stage and account_for_*_in_pipeline_split",
            )
        ]
    if plan is not None:
        return _planned_layers(fields, plan, layers, stages)
    if uneven and counted:
        return None, [
            Refusal(
                "model.num_layers_in_first_pipeline_stage",
                "given layer counts cannot be combined with account_for_embedding/loss_in_pipeline_split",
                "use one of the two",
            )
        ]
    total = layers + embedding + loss
    middle = stages - (first is not None) - (last is not None)
    left = total - (first or 0) - (last or 0)
    for name, given in (("first", first), ("last", last)):
        if given is not None and given <= 0:
            field = f"model.num_layers_in_{name}_pipeline_stage"
            return None, [Refusal(field, f"{given} layers cannot fill a stage", "give at least 1, or None")]
    if bool(left) != bool(middle) or left < 0 or middle < 0 or (middle and left % middle):
        return None, [_layer_refusal(layers, stages, first, last, total, left, middle)]
    each = [left // middle if middle else 0] * stages
    if first is not None:
        each[0] = first
    if last is not None:
        each[-1] = last
    if chunks > 1 and (odd := [count for count in each if count % chunks]):
        shown = f"{odd[0]} layers" + (" (embedding and loss counted)" if counted else "")
        return None, [
            Refusal(
                "model.virtual_pipeline_model_parallel_size",
                f"VPP={chunks} does not divide the {shown} of a pipeline stage",
                f"choose {_either(divisors(odd[0]))}",
            )
        ]
    split = [[count // chunks] * chunks for count in each]
    split[0][0] -= embedding
    split[-1][-1] -= loss
    return split, []


def _layer_refusal(
    layers: int, stages: int, first: int | None, last: int | None, total: int, left: int, middle: int
) -> Refusal:
    if first is None and last is None:
        counted = f" + {total - layers} (embedding, loss) = {total}" if total != layers else ""
        return Refusal(
            "model.pipeline_model_parallel_size",
            f"PP={stages} does not divide {layers} layers{counted}",
            f"choose {_either(divisors(total))}, or give num_layers_in_first/last_pipeline_stage",
        )
    given = " and ".join(f"{count} in the {name}" for name, count in (("first", first), ("last", last)) if count)
    return Refusal(
        f"model.num_layers_in_{'first' if first is not None else 'last'}_pipeline_stage",
        f"with {given} of {stages} stages, {left} of {layers} layers are left for {middle} stages",
        "let the rest be a positive multiple of the stages that are left (or 0 for none)",
    )


def _planned_layers(
    fields: Fields, plan: Any, layers: int, stages: int
) -> tuple[list[list[int]] | None, list[Refusal]]:
    """The one rule that asks Megatron itself: its little language for plans is not worth a second parser."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    field = "model.pipeline_model_parallel_layout"
    if isinstance(plan, PipelineParallelLayerLayout):
        plan = plan.input_data
    try:
        parsed = PipelineParallelLayerLayout(plan, stages)
        parsed.validate_layer_layout(num_layers=layers, mtp_num_layers=fields.model("mtp_num_layers"))
    except (AssertionError, NotImplementedError) as error:
        return None, [Refusal(field, str(error), f"write a plan for {layers} layers and a multiple of {stages} stages")]
    chunks = fields.model("virtual_pipeline_model_parallel_size")
    if chunks is not None and chunks != parsed.virtual_pipeline_model_parallel_size:
        found = parsed.virtual_pipeline_model_parallel_size
        return None, [Refusal(field, f"the plan has {found} chunks a stage, but VPP={chunks}", f"set VPP to {found}")]
    if stages == 1 and parsed.virtual_pipeline_model_parallel_size > 1:
        found = parsed.virtual_pipeline_model_parallel_size
        return None, [Refusal(field, f"the plan has {found} stages, but PP=1 has one", f"set PP to {found}")]
    return [[chunk.count(LayerType.decoder) for chunk in stage] for stage in parsed.layout], []


def _attention(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__``, and the ``divide`` calls in ``SelfAttention`` and its projections."""
    tensor, heads = layout.tensor_model_parallel_size, fields.model("num_attention_heads")
    field = "model.tensor_model_parallel_size"
    if not heads:
        return
    groups = fields.model("num_query_groups") or heads
    if heads % tensor:
        fix = f"choose {_either(divisors(heads))}"
        yield Refusal(field, f"TP={tensor} does not divide {heads} query heads", fix)
    if groups % tensor and tensor % groups:
        yield Refusal(
            field,
            f"TP={tensor} is neither a divisor nor a multiple of {groups} query groups",
            f"choose {_either([size for size in divisors(heads) if not groups % size or not size % groups])}",
        )
    if fields.model("multi_latent_attention", False):
        return
    if heads % groups:
        yield Refusal(
            "model.num_query_groups",
            f"{groups} query groups do not divide {heads} query heads",
            f"choose {_either(divisors(heads))}",
        )
    hidden = fields.model("hidden_size")
    channels = fields.model("kv_channels") or (hidden // heads if hidden else None)
    if channels and not heads % tensor and channels * (heads + 2 * groups) % tensor:
        yield Refusal(
            field,
            f"TP={tensor} does not divide the {channels * (heads + 2 * groups)} rows of the fused query, key and"
            f" value projection ({heads} + 2 x {groups} heads of {channels})",
            f"choose {_either([size for size in divisors(heads) if not channels * (heads + 2 * groups) % size])}",
        )


def _feed_forward(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """``divide`` in the row parallel layer of ``MLP``; of experts and shared experts too."""
    tensor, experts = layout.tensor_model_parallel_size, fields.model("num_moe_experts")
    hidden = fields.model("hidden_size")
    width = fields.model("ffn_hidden_size") or (4 * hidden if hidden else None)
    widths = []
    if not experts or fields.model("moe_layer_freq", 1) != 1:
        widths.append(("ffn_hidden_size", width, "TP", tensor))
    if experts:
        expert_tensor = layout.resolved_expert_tensor_parallel_size
        widths.append(("moe_ffn_hidden_size", fields.model("moe_ffn_hidden_size") or width, "ETP", expert_tensor))
        shared = fields.model("moe_shared_expert_intermediate_size")
        widths.append(("moe_shared_expert_intermediate_size", shared, "TP", tensor))
    for name, value, kind, size in widths:
        if value and value % size:
            yield Refusal(
                f"model.{name}",
                f"{kind}={size} does not divide {name}={value}",
                f"use a multiple of {size}, e.g. {ceil(value / size) * size}",
            )


def _vocabulary(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """``VocabParallelEmbedding``; Bridge's ``_validate_and_set_vocab_size`` decides whether rows are padded."""
    size, tensor = fields.model("vocab_size"), layout.tensor_model_parallel_size
    if size is None:  # it will come from the tokenizer, and then it is padded
        return
    tokenizer_size = fields.get("tokenizer", "vocab_size")
    if fields.get("tokenizer", "use_tokenizer_vocab_size", False):
        return
    if tokenizer_size is not None and size < tokenizer_size:
        yield Refusal(
            "model.vocab_size",
            f"{size} rows cannot hold the {tokenizer_size} ids of the tokenizer",
            "raise it, or set it to None to take the tokenizer's",
        )
    # A whole configuration: a size set on the model is taken as it is, whatever should_pad_vocab said before.
    padded = fields.model("should_pad_vocab", False) and not fields.is_container
    if size % tensor and not padded:
        divisible_by = fields.model("make_vocab_size_divisible_by", 128)
        rows = padded_vocab_size(size, tensor_model_parallel_size=tensor, divisible_by=divisible_by)
        yield Refusal(
            "model.vocab_size",
            f"TP={tensor} does not divide the {size} rows of the embedding",
            f"use {rows}, or set tokenizer.use_tokenizer_vocab_size=True, which pads",
        )


def _sequence(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """Bridge's ``validate`` (CP and equal lengths), ``DotProductAttention`` and ``_split_along_first_dim``."""
    length, data_length = fields.model("seq_length"), fields.get("dataset", "seq_length")
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    if length is not None and data_length is not None and length != data_length:
        yield Refusal(
            "dataset.seq_length",
            f"the data has sequences of {data_length} tokens, the model of {length}",
            "set model.seq_length and dataset.seq_length to the same number",
        )
    if context > 1 and fields.model("transformer_impl") == "local":
        yield Refusal(
            "model.context_parallel_size",
            f"CP={context} needs Transformer Engine's attention; the local layers refuse it",
            "set CP to 1, or run on GPUs with Transformer Engine",
        )
    if length is None:
        return
    if context > 1 and length % (2 * context):
        yield Refusal(
            "model.seq_length",
            f"CP={context} cuts a sequence into 2 x {context} pieces, which do not divide {length} tokens",
            f"use a multiple of {2 * context}, e.g. {ceil(length / (2 * context)) * 2 * context}",
        )
    elif layout.sequence_parallel and length // context % tensor:
        yield Refusal(
            "model.seq_length",
            f"sequence parallelism shares {length // context} tokens of a sequence among TP={tensor} ranks",
            f"use a multiple of {context * tensor}, e.g. {ceil(length / (context * tensor)) * context * tensor}",
        )


def _experts(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """``TransformerConfig.__post_init__``, ``BaseMoELayer`` and the first training step of ``MoELayer``."""
    experts, size = fields.model("num_moe_experts"), layout.expert_model_parallel_size
    if not experts:
        if size > 1:
            yield Refusal("model.expert_model_parallel_size", f"EP={size}, but the model has no experts", "set EP to 1")
        return
    if experts % size:
        yield Refusal(
            "model.expert_model_parallel_size",
            f"EP={size} does not divide {experts} experts",
            f"choose {_either(divisors(experts))}",
        )
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        yield Refusal(
            "model.sequence_parallel",
            f"experts with TP={layout.tensor_model_parallel_size} train only with sequence parallelism",
            "set model.sequence_parallel=True, or TP to 1",
        )
    expert_tensor = layout.resolved_expert_tensor_parallel_size
    if expert_tensor > 1 and fields.model("add_bias_linear", False):
        yield Refusal(
            "model.add_bias_linear",
            f"experts with biases cannot be split by ETP={expert_tensor}",
            "set model.add_bias_linear=False, or model.expert_tensor_parallel_size=1",
        )


def _mamba(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """The asserts of ``MambaMixer``: heads and state groups are shared among the TP ranks."""
    pattern = _is_hybrid(fields)
    if not pattern or "M" not in pattern:
        return
    tensor = layout.tensor_model_parallel_size
    for name, what in (("mamba_num_heads", "Mamba heads"), ("mamba_num_groups", "Mamba state groups")):
        value = fields.model(name)
        if value and value % tensor:
            yield Refusal(
                "model.tensor_model_parallel_size",
                f"TP={tensor} does not divide {value} {what}",
                f"choose {_either(divisors(value))}",
            )


def _batch(layout: Sizes, fields: Fields) -> Iterator[Refusal]:
    """``ConstantNumMicroBatchesCalculator``; Bridge's ``validate`` for evaluation."""
    if layout.world_size % layout.model_parallel_size:
        return
    copies = layout.data_parallel_size
    train = [fields.get("train", name) for name in ("global_batch_size", "micro_batch_size")]
    evaluation = [fields.get("validation", f"eval_{name}") for name in ("global_batch_size", "micro_batch_size")]
    # An evaluation that says nothing takes the training's sizes, and is then refused with them, once.
    checked = [("train.global_batch_size", "micro_batch_size", *train)]
    if any(value is not None for value in evaluation):
        evaluation = [own if own is not None else other for own, other in zip(evaluation, train, strict=True)]
        checked.append(("validation.eval_global_batch_size", "eval_micro_batch_size", *evaluation))
    for field, micro_name, batch, micro in checked:
        if batch is None or micro is None:
            continue
        if micro < 1 or batch < 1 or batch % (micro * copies):
            least = max(micro, 1) * copies
            yield Refusal(
                field,
                f"{batch} samples a step cannot be shared by DP={copies} copies with {micro_name}={micro}",
                f"use a multiple of {least}, e.g. {max(ceil(batch / least), 1) * least}",
            )


def _microbatches(layout: Sizes, fields: Fields) -> int | None:
    batch, micro = fields.get("train", "global_batch_size"), fields.get("train", "micro_batch_size")
    if not batch or not micro or layout.world_size % layout.model_parallel_size:
        return None
    return None if batch % (micro * layout.data_parallel_size) else batch // (micro * layout.data_parallel_size)


def _is_hybrid(fields: Fields) -> str | None:
    return fields.model("hybrid_layer_pattern") or fields.model("hybrid_override_pattern")


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _either(choices: list[int]) -> str:
    return " or ".join([", ".join(map(str, choices[:-1]))] * (len(choices) > 1) + [str(choices[-1])])

"""How pipeline stages share the layers of a model.

Source: megatron-core 0.19.2 ``transformer/transformer_config.py`` (``__post_init__``),
``transformer/transformer_block.py`` (``get_num_layers_to_build``), ``pipeline_parallel_layer_layout.py``, and for models
with a layer pattern ``models/hybrid/hybrid_layer_allocation.py`` (``select_pipeline_segment``) and ``finalize`` and
``provide`` of megatron-bridge 0.6.2 ``models/hybrid/hybrid_provider.py``.
``tests/planning/test_layout_stages.py`` holds this module against those functions.
"""

from __future__ import annotations

from typing import Any

from course_lib.common.config import Fields
from course_lib.planning.layout.sizes import LayoutError, Refusal, divisors

_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
# What takes each of the three ways to divide the layers back.
PLAN = {"model.pipeline_model_parallel_layout": None}
UNEVEN = {f"model.num_layers_in_{stage}_pipeline_stage": None for stage in ("first", "last")}
COUNTED = {f"model.account_for_{part}_in_pipeline_split": False for part in ("embedding", "loss")}


def hybrid_pattern(fields: Fields) -> str:
    """The layer pattern of a model that mixes kinds of layers, such as attention and Mamba; empty for other models."""
    return next(filter(None, map(fields.model, _PATTERNS)), "")


def has_implicit_chunks(cfg: Any) -> bool:
    """Whether a written pipeline plan interleaves, and no ``virtual_pipeline_model_parallel_size`` says so.

    Megatron accepts that and counts the chunks itself; whoever plans from the field would count too few.
    """
    fields = Fields.of(cfg)
    if fields.model("pipeline_model_parallel_layout") is None or fields.model("virtual_pipeline_model_parallel_size"):
        return False
    return len(stage_layers(fields)[0]) > 1


def stage_layers(cfg: Any) -> list[list[int]]:
    """How many transformer layers does each pipeline stage build?

    Args:
        cfg: As for :func:`course_lib.planning.layout.check`.

    Returns:
        For each stage the number of layers in each of its model chunks (one chunk without interleaving).

    Raises:
        LayoutError: If the layers cannot be divided like this.

    >>> stage_layers(dict(num_layers=30, pipeline_model_parallel_size=4, account_for_embedding_in_pipeline_split=True,
    ...                   account_for_loss_in_pipeline_split=True))
    [[7], [8], [8], [7]]
    >>> stage_layers(dict(hybrid_layer_pattern="M-M*|M-M-M*", pipeline_model_parallel_size=2))
    [[4], [6]]
    """
    fields = Fields.of(cfg)
    if pattern := hybrid_pattern(fields):
        return _hybrid(fields, pattern)
    if fields.model("num_layers") is None:
        raise LayoutError(Refusal("model.num_layers", "is not set", "set it"))
    embedding = int(fields.model("account_for_embedding_in_pipeline_split", False))
    loss = int(fields.model("account_for_loss_in_pipeline_split", False))
    first = fields.model("num_layers_in_first_pipeline_stage")
    last = fields.model("num_layers_in_last_pipeline_stage")
    uneven, counted = first is not None or last is not None, embedding or loss
    if fields.model("pipeline_model_parallel_layout") is not None:
        if uneven or counted:
            raise LayoutError(
                Refusal(
                    "model.pipeline_model_parallel_layout",
                    "a written layer plan cannot be combined with stage layer counts",
                    changes=(UNEVEN | COUNTED, PLAN),
                )
            )
        return _planned(fields)
    if uneven and counted:
        raise LayoutError(
            Refusal(
                "model.num_layers_in_first_pipeline_stage",
                "given layer counts cannot be combined with account_for_embedding/loss_in_pipeline_split",
                changes=(COUNTED, UNEVEN),
            )
        )
    stages = _uneven(fields, first, last) if uneven else _even(fields, embedding + loss)
    split = _into_chunks(fields, stages)
    split[0][0] -= embedding
    split[-1][-1] -= loss
    return split


def _hybrid(fields: Fields, pattern: str) -> list[list[int]]:
    """Layers of each stage of a pattern: between its borders (`|`), or in equal parts where it has none."""
    main = pattern.partition("/")[0]  # what follows predicts further tokens, on the last stage
    segments, stages = main.split("|"), fields.model("pipeline_model_parallel_size", 1)
    layers = sum(map(len, segments))
    if fields.model("num_layers", layers) != layers:
        message = f"{fields.model('num_layers')} layers, but the pattern {pattern} has {layers}"
        raise LayoutError(Refusal("model.num_layers", message, changes=({"model.num_layers": layers},)))
    if chunks := fields.model("virtual_pipeline_model_parallel_size"):
        field = "model.virtual_pipeline_model_parallel_size"
        message = f"VPP={chunks}, but Bridge interleaves no hybrid model"
        raise LayoutError(Refusal(field, message, changes=({field: None},)))
    for change in (PLAN, COUNTED):
        for field in change:
            if fields.model(field.removeprefix("model.")):
                message = "a hybrid model is divided by its pattern, and does not read this"
                raise LayoutError(Refusal(field, message, "stage borders are | in hybrid_layer_pattern", (change,)))
    first = fields.model("num_layers_in_first_pipeline_stage")
    last = fields.model("num_layers_in_last_pipeline_stage")
    uneven = first is not None or last is not None
    without = {
        f"model.{name}": main.replace("|", "") + pattern[len(main) :] for name in _PATTERNS if fields.model(name)
    }
    if len(segments) > 1 and uneven:
        message = "stage layer counts cannot be combined with a pattern that has stage borders"
        raise LayoutError(Refusal(next(iter(without)), message, changes=(UNEVEN, without)))
    if len(segments) not in (1, stages):
        message = f"PP={stages} has {stages} stages, but the borders of the pattern make {len(segments)}"
        changes = ({"model.pipeline_model_parallel_size": len(segments)}, without)
        raise LayoutError(Refusal("model.pipeline_model_parallel_size", message, changes=changes))
    if len(segments) > 1:
        return [[len(segment)] for segment in segments]
    fields = Fields(fields.cfg, {**(fields.changed or {}), "model.num_layers": layers})
    counts = _uneven(fields, first, last) if uneven else _even(fields, 0)
    return [[count] for count in counts]


def _even(fields: Fields, extra: int) -> list[int]:
    """Layers of each stage, where embedding and loss may count as ``extra`` layers."""
    layers, stages = fields.model("num_layers"), fields.model("pipeline_model_parallel_size", 1)
    total = layers + extra
    if total % stages or total < stages:
        counted = f" + {extra} (embedding, loss) = {total}" if extra else ""
        raise LayoutError(
            Refusal(
                "model.pipeline_model_parallel_size",
                f"PP={stages} does not divide {layers} layers{counted}",
                "or give num_layers_in_first/last_pipeline_stage",
                tuple({"model.pipeline_model_parallel_size": size} for size in divisors(total)),
            )
        )
    return [total // stages] * stages


def _uneven(fields: Fields, first: int | None, last: int | None) -> list[int]:
    """Layers of each stage, where the first, the last or both have a count of their own."""
    layers, stages = fields.model("num_layers"), fields.model("pipeline_model_parallel_size", 1)
    given = {name: count for name, count in (("first", first), ("last", last)) if count is not None}
    for name, count in given.items():
        if count <= 0:
            field, message = f"model.num_layers_in_{name}_pipeline_stage", f"{count} layers cannot fill a stage"
            raise LayoutError(Refusal(field, message, "or give at least 1", ({field: None},)))
    middle, left = stages - len(given), layers - sum(given.values())
    fits = left == 0 if middle == 0 else middle > 0 and left > 0 and left % middle == 0
    if not fits:
        spelled = " and ".join(f"{count} in the {name}" for name, count in given.items())
        raise LayoutError(
            Refusal(
                f"model.num_layers_in_{next(iter(given))}_pipeline_stage",
                f"with {spelled} of {stages} stages, {left} of {layers} layers are left for {middle} stages",
                "or let the rest be a positive multiple of the stages that are left, 0 for none",
                (UNEVEN,),
            )
        )
    between = [left // middle] * middle if middle else []
    return [*([first] if first else []), *between, *([last] if last else [])]


def _into_chunks(fields: Fields, stages: list[int]) -> list[list[int]]:
    """The layers of each stage, shared evenly by its model chunks."""
    chunks = fields.model("virtual_pipeline_model_parallel_size", 1)
    for count in stages:
        if count % chunks:
            raise LayoutError(
                Refusal(
                    "model.virtual_pipeline_model_parallel_size",
                    f"VPP={chunks} does not divide the {count} layers of a pipeline stage (embedding and loss count if"
                    " they are accounted for)",
                    changes=(
                        *({"model.virtual_pipeline_model_parallel_size": size} for size in divisors(count)[1:]),
                        {"model.virtual_pipeline_model_parallel_size": None},
                    ),
                )
            )
    return [[count // chunks] * chunks for count in stages]


def _planned(fields: Fields) -> list[list[int]]:
    """The one rule that asks Megatron itself: its little language for plans is not worth a second parser."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    field, plan = "model.pipeline_model_parallel_layout", fields.model("pipeline_model_parallel_layout")
    layers, stages = fields.model("num_layers"), fields.model("pipeline_model_parallel_size", 1)
    if isinstance(plan, PipelineParallelLayerLayout):
        plan = plan.input_data
    try:
        parsed = PipelineParallelLayerLayout(plan, stages)
        parsed.validate_layer_layout(num_layers=layers, mtp_num_layers=fields.model("mtp_num_layers"))
    except (AssertionError, NotImplementedError) as error:
        fix = f"or write a plan for {layers} layers and a multiple of {stages} stages"
        raise LayoutError(Refusal(field, str(error), fix, (PLAN,))) from None
    found, chunks = parsed.virtual_pipeline_model_parallel_size, fields.model("virtual_pipeline_model_parallel_size")
    if chunks not in (None, found):
        raise LayoutError(
            Refusal(
                field,
                f"the plan has {found} chunks a stage, but VPP={chunks}",
                changes=({"model.virtual_pipeline_model_parallel_size": found},),
            )
        )
    if stages == 1 and found > 1:
        message = f"the plan has {found} stages, but PP=1 has one"
        raise LayoutError(Refusal(field, message, changes=({"model.pipeline_model_parallel_size": found}, PLAN)))
    return [[chunk.count(LayerType.decoder) for chunk in stage] for stage in parsed.layout]

"""The layers of each pipeline stage are Megatron's, and so are the refusals of a division."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from course_lib.planning import layout
from support.layouts import provider, reasons, refused


def pipelines() -> Iterator[dict[str, Any]]:
    for layers, stages, chunks in product((1, 2, 4, 6, 7, 8), (1, 2, 3, 4), (None, 1, 2, 4)):
        base = {
            "num_layers": layers,
            "pipeline_model_parallel_size": stages,
            "virtual_pipeline_model_parallel_size": chunks,
        }
        for first, last in product((None, 1, 2, 3, 6), (None, 1, 2, 6)):
            yield base | {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
        for embedding, loss in ((True, False), (False, True), (True, True)):
            yield base | {
                "account_for_embedding_in_pipeline_split": embedding,
                "account_for_loss_in_pipeline_split": loss,
            }
    for counts in ({"num_layers_in_first_pipeline_stage": 0}, {"num_layers_in_last_pipeline_stage": -1}):
        yield {"num_layers": 4, "pipeline_model_parallel_size": 2} | counts
    yield {
        "num_layers": 4,
        "pipeline_model_parallel_size": 2,
        "num_layers_in_first_pipeline_stage": 2,
        "account_for_loss_in_pipeline_split": True,
    }
    for plan in (
        "Et|ttt|L|",
        "Et|tttL",
        "Ett|ttL",
        "E|t*2|tt|L",
        "ttE|ttL",
        "Etttt|L|",
        [["embedding"] + ["decoder"] * 3, ["decoder", "loss"]],
    ):
        for stages, chunks in product((1, 2, 4), (None, 2)):
            yield {
                "num_layers": 4,
                "pipeline_model_parallel_size": stages,
                "virtual_pipeline_model_parallel_size": chunks,
                "pipeline_model_parallel_layout": plan,
            }
    yield {
        "num_layers": 4,
        "pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": "Ett|ttL",
        "num_layers_in_first_pipeline_stage": 2,
    }


def ends(changed: dict[str, Any]) -> tuple[int | None, int | None]:
    return changed.get("num_layers_in_first_pipeline_stage"), changed.get("num_layers_in_last_pipeline_stage")


def built_layers(model: Any) -> list[list[int]]:
    """What Megatron builds on each stage, chunk by chunk."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if chunks is not None and stages == 1:
        raise RuntimeError("initialize_model_parallel: pipeline-model-parallel size should be greater than 1")
    if model.pipeline_model_parallel_layout is not None:
        plan = model.pipeline_model_parallel_layout.layout
        return [[chunk.count(LayerType.decoder) for chunk in stage] for stage in plan]
    return [
        [
            get_num_layers_to_build(model, vp_stage=chunk if chunks else None, pp_rank=stage)
            for chunk in range(chunks or 1)
        ]
        for stage in range(stages)
    ]


def test_pipeline_refusals_and_stage_layers_are_megatrons(bridge: Any) -> None:
    """Layers per stage: the same refusals, the same division; and no division that loses layers silently.

    Megatron itself accepts a few divisions whose stages do not add up to the model (a first stage with more layers
    than the model has, for example), and one chunk a stage, which interleaves nothing.  The course refuses those: they
    are the only difference.
    """
    cases = accepted = silent = 0
    for changed in pipelines():
        model = provider(**changed)
        ours = reasons(model, model.pipeline_model_parallel_size)
        mine = None if ours else layout.stage_layers(model)
        built: list[list[int]] = []
        theirs = refused(model.finalize) or refused(lambda model=model, built=built: built.extend(built_layers(model)))
        lost = not theirs and (sum(map(sum, built)) != model.num_layers or min(map(min, built)) < 0)
        # With one stage a first and a last count name the same stage, and Megatron takes the last if it happens to fit.
        lost = lost or (not theirs and model.pipeline_model_parallel_size == 1 and None not in ends(changed))
        lost = lost or model.virtual_pipeline_model_parallel_size == 1
        assert bool(ours) == bool(theirs or lost), f"{changed}\n  course: {ours}\n  Megatron: {theirs or built}"
        assert mine is None or mine == built, changed
        cases, accepted, silent = cases + 1, accepted + (not ours), silent + lost
    assert cases > 1500 and accepted > 100 and silent > 0


def hybrids() -> Iterator[dict[str, Any]]:
    patterns = ("M-M*", "M-M*-M-", "M-M*M-M*-", "M-|M*", "M-M|*", "M-|M*|M-", "M-|M*|M-|M*", "M-M*/*M/*M", "M-|M*/*M")
    for pattern, stages in product(patterns, (1, 2, 3, 4)):
        base = {"hybrid_layer_pattern": pattern, "pipeline_model_parallel_size": stages}
        for first, last in product((None, 1, 2, 3), (None, 1, 2)):
            yield base | {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
        yield base | {"num_layers": 4}
        yield base | {"virtual_pipeline_model_parallel_size": 2}
        yield base | {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}


def built_segments(model: Any, monkeypatch: Any) -> list[list[int]]:
    """What Megatron builds of a pattern on each stage."""
    from megatron.core.models.hybrid import hybrid_layer_allocation as allocation

    assert model.virtual_pipeline_model_parallel_size is None, "Bridge's provide() asserts it"
    main = allocation.parse_hybrid_pattern(model.hybrid_layer_pattern).main_pattern
    stages, built = model.pipeline_model_parallel_size, []
    ends = (model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage)
    for stage in range(stages):
        monkeypatch.setattr("torch.distributed.get_rank", lambda group, stage=stage: stage)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda group: stages)
        built.append([len(allocation.select_pipeline_segment(main, "stages", None, *ends)[0])])
    return built


def test_stages_of_a_layer_pattern_are_megatrons(bridge: Any, monkeypatch: Any) -> None:
    """A pattern is divided as Megatron divides it, and what it would not build, or not wholly, is refused.

    More borders than stages lose the layers behind them without a word, and both ends of one stage are counted twice; fields
    that a hybrid model does not read are refused, too.
    """
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

    for name in ("log_on_each_pipeline_stage", "log_single_rank"):
        monkeypatch.setattr(f"megatron.core.models.hybrid.hybrid_layer_allocation.{name}", lambda *_, **__: None)
    accepted = silent = 0
    for changed in hybrids():
        model = HybridModelProvider(**({"hidden_size": 64, "mamba_num_heads": 8, "apply_rope_fusion": False} | changed))
        ours = reasons(model, model.pipeline_model_parallel_size)
        mine = None if ours else layout.stage_layers(model)
        built: list[list[int]] = []
        theirs = refused(model.finalize)
        theirs = theirs or refused(lambda model=model, built=built: built.extend(built_segments(model, monkeypatch)))
        lost = not theirs and (sum(map(sum, built)) != model.num_layers or min(map(min, built)) < 1)
        lost = lost or (not theirs and model.pipeline_model_parallel_size == 1 and None not in ends(changed))
        lost = lost or (not theirs and "account_for_loss_in_pipeline_split" in changed)
        assert bool(ours) == bool(theirs or lost), f"{changed}\n  course: {ours}\n  Megatron: {theirs or built}"
        assert mine is None or mine == built, changed
        accepted, silent = accepted + (not ours), silent + lost
    assert accepted > 30 and silent > 10


def test_a_hybrid_that_does_not_divide_is_refused_with_the_fix() -> None:
    """Nemotron 3 Nano 4B has 42 layers, which four stages do not share; the fixes were tried."""
    pattern = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
    nano = {"hybrid_layer_pattern": pattern, "pipeline_model_parallel_size": 4}
    assert len(pattern) == 42
    expected = "PP=4 does not divide 42 layers: choose 1 or 2 (or give num_layers_in_first/last_pipeline_stage)"
    assert reasons(nano, 8) == [f"model.pipeline_model_parallel_size: {expected}"]
    assert reasons(nano | {"num_layers_in_first_pipeline_stage": 9}, 8) == []
    [borders] = reasons(nano | {"hybrid_layer_pattern": f"{pattern[:20]}|{pattern[20:]}"}, 8)
    assert "PP=4 has 4 stages, but the borders of the pattern make 2: choose 2" in borders

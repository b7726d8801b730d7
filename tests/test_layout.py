"""The layout arithmetic: what it refuses is what Megatron refuses, and its groups are Megatron's groups."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from course_lib import layout, layout_rules, layout_sizes, layout_stages
from course_lib.layout import Layout, LayoutError

LLAMA = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 128}


def reasons(cfg: Any, ranks: int) -> list[str]:
    return [str(refusal) for refusal in layout.check(cfg, ranks)]


def sizes(tensor: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
        "expert_model_parallel_size": expert,
    }


# What a learner sees.


@pytest.mark.parametrize("module", [layout, layout_rules, layout_sizes, layout_stages])
def test_documented_examples_hold(module: Any) -> None:
    """Every example in the docstrings is true."""
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0


def test_layout_needs_no_torch() -> None:
    """A layout is refused before anything heavy is imported."""
    code = "import sys; from course_lib import layout; layout.check({'num_layers': 4}, 8); "
    code += "print([name for name in ('torch', 'megatron', 'numpy', 'pandas') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize(
    ("changed", "ranks", "expected"),
    [
        (sizes(3), 9, "model.tensor_model_parallel_size: TP=3 does not divide 8 query heads: choose 1, 2, 4 or 8"),
        (sizes(3), 8, "8 ranks cannot be divided into groups of TP=3 x PP=1 x CP=1 = 3"),
        (sizes(pipeline=3), 9, "PP=3 does not divide 4 layers: choose 1, 2 or 4"),
        (sizes(2, expert=2), 8, "EP=2, but the model has no experts: set EP to 1"),
        (sizes(2) | {"ffn_hidden_size": 129}, 8, "TP=2 does not divide ffn_hidden_size=129: use a multiple of 2"),
        (sizes(4) | {"vocab_size": 1002}, 8, "TP=4 does not divide the 1002 rows of the embedding: use 1024"),
        (sizes(context=4) | {"seq_length": 12}, 8, "model.seq_length: CP=4 cuts a sequence into 2 x 4 pieces"),
        (sizes(2) | {"num_moe_experts": 4}, 8, "model.sequence_parallel: experts with TP=2 train only with sequence"),
        (sizes(0), 8, "model.tensor_model_parallel_size: 0 is not a number of ranks: give a whole number"),
        (sizes(1) | {"pipeline_model_parallel_size": "2"}, 8, "'2' is not a number of ranks"),
        ({"virtual_pipeline_model_parallel_size": 2}, 8, "VPP=2 interleaves pipeline stages, but PP=1 has one stage"),
    ],
)
def test_a_refusal_names_field_collision_and_fix(changed: dict[str, Any], ranks: int, expected: str) -> None:
    """Each refusal says which field, what it collides with, and what to choose."""
    assert any(expected in reason for reason in reasons(LLAMA | changed, ranks)), reasons(LLAMA | changed, ranks)


def test_every_reason_is_given_at_once() -> None:
    """``require`` lists all reasons, so that a learner does not fix them one launch at a time."""
    cfg = {
        "model": LLAMA | sizes(3, 3) | {"seq_length": 128},
        "train": {"global_batch_size": 5, "micro_batch_size": 2},
        "dataset": {"seq_length": 64},
    }
    with pytest.raises(LayoutError) as caught:
        layout.require(cfg, 9)
    assert {refusal.field for refusal in caught.value.refusals} == {
        "model.tensor_model_parallel_size",
        "model.pipeline_model_parallel_size",
        "model.ffn_hidden_size",
        "dataset.seq_length",
        "train.global_batch_size",
    }
    assert str(caught.value).count("\n  - ") == len(caught.value.refusals) >= 5


def test_the_lesson_layouts_are_legal_and_read_back() -> None:
    """The course's own layouts pass, and a layout knows its data parallel size."""
    cfg = {"model": LLAMA | sizes(2), "train": {"global_batch_size": 8, "micro_batch_size": 1}}
    assert layout.require(cfg, 8).data_parallel_size == 4
    assert layout.require(json.loads(json.dumps(cfg)), 8) == layout.require(cfg, 8)
    assert str(layout.require({"model": LLAMA | sizes(2, 2)}, 8)) == "TP=2 PP=2 DP=2"
    assert "TP=8 PP=1 DP=1" in map(str, layout.legal_layouts(8, LLAMA))
    with pytest.raises(LayoutError, match="8 ranks cannot"):
        _ = Layout(world_size=8, tensor_model_parallel_size=3).data_parallel_size


def test_legal_layouts_are_those_that_check_accepts() -> None:
    """No legal layout is left out and none is refused, experts included."""
    model = LLAMA | {"num_moe_experts": 4, "add_bias_linear": False}
    found = layout.legal_layouts(8, model)
    assert len(found) == len(set(found))
    for tensor, pipeline, context, expert in product((1, 2, 4, 8), repeat=4):
        changed = sizes(tensor, pipeline, context, expert) | {"sequence_parallel": tensor > 1}
        legal = not layout.check(model | changed, 8)
        assert legal == (Layout.from_config(model | changed, ranks=8) in found), changed


def test_evaluation_batch_is_refused_once() -> None:
    """An evaluation that inherits the training's batch does not repeat the training's refusal."""
    cfg = {"model": LLAMA, "train": {"global_batch_size": 6, "micro_batch_size": 1}, "validation": {}}
    assert [refusal.field for refusal in layout.check(cfg, 4)] == ["train.global_batch_size"]
    cfg["validation"] = {"eval_global_batch_size": 4}
    cfg["train"] = {"global_batch_size": 16, "micro_batch_size": 4}
    assert [refusal.field for refusal in layout.check(cfg, 4)] == ["validation.eval_global_batch_size"]


# Against Megatron.


@contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """A torch process group without other processes: enough for every constructor and group builder of Megatron."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "another test left a process group behind"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Group:
    """A process group of any size: constructors ask only for its size and rank."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def provider(**changed: Any) -> Any:
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    fields = dict(LLAMA) | {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "params_dtype": torch.float32,
        "transformer_layer_spec": local_layer_spec,
        "transformer_impl": "local",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "vocab_size": 256,
        "seq_length": 32,
    }
    return GPTModelProvider(**(fields | changed))


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message with which Megatron refuses, or nothing."""
    try:
        call(*args, **kwargs)
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def build_layer(model: Any, tensor: int) -> None:
    """Construct what TP splits: attention, feed-forward layer and embedding, at a TP size without processes."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
    from megatron.core.transformer.spec_utils import build_module

    parts = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    groups = SimpleNamespace(tp=Group(tensor), cp=Group(1))
    build_module(parts.self_attention, config=model, layer_number=1, pg_collection=groups)
    parts.mlp(config=model, pg_collection=groups, is_mtp_layer=False)
    VocabParallelEmbedding(
        model.vocab_size, model.hidden_size, init_method=lambda tensor: tensor, config=model, tp_group=Group(tensor)
    )


HEADS = [
    (heads, groups, channels, ffn, vocab)
    for heads, groups in [(4, 4), (6, 2), (6, 3), (8, 1), (8, 2), (8, 4), (8, 8), (12, 4), (12, 3)]
    for channels, ffn, vocab in [(8, 96, 384), (None, 96, 384), (1, 96, 384), (8, 100, 384), (8, 96, 250)]
]


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8, 12])
def test_tensor_parallel_refusals_are_megatrons(bridge: Any, tensor: int) -> None:
    """For heads, groups, widths and vocabularies: refused here if and only if the real layers cannot be built."""
    seen = {True: 0, False: 0}
    for heads, groups, channels, ffn, vocab in HEADS:
        changed = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": channels, "hidden_size": 96}
        changed |= {"ffn_hidden_size": ffn, "vocab_size": vocab} | sizes(tensor)
        model = provider(**changed)
        ours = reasons(model, tensor)
        with fake_world(tensor):
            theirs = refused(model.finalize) or refused(build_layer, model, tensor)
        assert bool(ours) == bool(theirs), f"{changed}\n  course: {ours}\n  Megatron: {theirs}"
        seen[bool(ours)] += 1
    assert seen[False] > 0 and (seen[True] > 0) == (tensor > 1)


def test_query_groups_must_divide_the_heads(bridge: Any) -> None:
    """Groups that do not divide the heads pass every constructor upstream and break in the first forward pass."""
    import torch

    for heads, groups in product((4, 6, 8), (1, 2, 3, 4, 5, 8)):
        model = provider(num_attention_heads=heads, num_query_groups=groups, hidden_size=48, kv_channels=4)
        ours = reasons(model, 1)
        model.finalize()
        with fake_world(1):
            build_layer(model, 1)

        def forward(model: Any = model) -> None:
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
            from megatron.core.transformer.spec_utils import build_module

            parts = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
            collection = SimpleNamespace(tp=Group(1), cp=Group(1))
            attention = build_module(parts.self_attention, config=model, layer_number=1, pg_collection=collection)
            attention.get_query_key_value_tensors(torch.zeros(2, 1, 48))

        with fake_world(1):
            theirs = refused(forward)
        assert bool(ours) == bool(theirs) == bool(heads % groups), (heads, groups, ours, theirs)


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
    than the model has, for example).  The course refuses those: they are the only difference.
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
        assert bool(ours) == bool(theirs or lost), f"{changed}\n  course: {ours}\n  Megatron: {theirs or built}"
        assert mine is None or mine == built, changed
        cases, accepted, silent = cases + 1, accepted + (not ours), silent + lost
    assert cases > 1500 and accepted > 100 and silent > 0


def test_padded_vocabulary_is_megatrons(bridge: Any) -> None:
    """The rows of the embedding equal those of Megatron's own function."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    for vocab, divisible_by, tensor in product((1, 127, 128, 32000, 32001, 128256, 131072), (1, 64, 128), (1, 2, 3, 8)):
        theirs = calculate_padded_vocab_size(vocab, divisible_by, tensor, logging_enabled=False)
        mine = layout.padded_vocab_size(vocab, tensor_model_parallel_size=tensor, divisible_by=divisible_by)
        assert mine == theirs
    for wrong in ({"vocab_size": 0}, {"vocab_size": 1, "divisible_by": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            layout.padded_vocab_size(wrong.pop("vocab_size"), **wrong)


def test_vocabulary_choice_is_bridges(bridge: Any) -> None:
    """Bridge decides between model and tokenizer, and pads only what came from the tokenizer."""
    from megatron.bridge.training.setup import _validate_and_set_vocab_size

    for model_vocab, vocab, use, tensor in product((None, 90, 100, 102), (100,), (True, False), (1, 4)):
        cfg = {
            "model": LLAMA | sizes(tensor) | {"vocab_size": model_vocab, "should_pad_vocab": True},
            "tokenizer": {"vocab_size": vocab, "use_tokenizer_vocab_size": use},
        }

        def theirs(model_vocab: Any = model_vocab, vocab: int = vocab, use: bool = use, tensor: int = tensor) -> None:
            from megatron.core.tensor_parallel.utils import VocabUtility

            rows, padded = _validate_and_set_vocab_size(model_vocab, vocab, use)
            if not padded:
                VocabUtility.vocab_range_from_global_vocab_size(rows, 0, tensor)

        assert bool(reasons(cfg, 4)) == bool(refused(theirs)), (cfg, refused(theirs))


def test_rank_groups_are_megatrons(bridge: Any) -> None:
    """Every group of every legal division equals that of Megatron's RankGenerator, dense and expert."""
    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    assert order == "-".join(layout.ORDER)
    cases = 0
    for ranks, tensor, pipeline, context, expert, expert_tensor in product(
        (4, 8, 12, 16), (1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (None, 1, 2)
    ):
        division = sizes(tensor, pipeline, context, expert) | {"expert_tensor_parallel_size": expert_tensor}
        model = Layout(world_size=ranks, **division)
        if ranks % model.model_parallel_size or ranks % model.expert_model_size:
            continue
        grid, cases = layout.rank_grid(model), cases + 1
        dense = RankGenerator(tp=tensor, ep=1, dp=model.data_parallel_size, pp=pipeline, cp=context, order=order)
        for kind in ("tp", "cp", "dp", "pp", "dp-cp"):
            assert sorted(grid[kind]) == sorted(map(sorted, dense.get_ranks(kind))), (model, kind)
        experts = RankGenerator(
            tp=model.resolved_expert_tensor_parallel_size,
            ep=expert,
            dp=model.expert_data_parallel_size,
            pp=pipeline,
            cp=1,
            order=order,
        )
        for kind, theirs in (("ep", "ep"), ("expert-tp", "tp"), ("expert-dp", "dp")):
            assert sorted(grid[kind]) == sorted(map(sorted, experts.get_ranks(theirs))), (model, kind)
    assert cases > 100


def test_world_refusals_are_megatrons(bridge: Any) -> None:
    """The real ``initialize_model_parallel``, on torch's fake process group, refuses the same divisions."""
    from megatron.core import parallel_state

    for ranks in (4, 6, 8):
        with fake_world(ranks):
            for tensor, pipeline, context, expert, chunks in product(
                (1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 4), (None, 2)
            ):
                model = LLAMA | sizes(tensor, pipeline, context, expert)
                model |= {
                    "num_moe_experts": 4,
                    "sequence_parallel": True,
                    "virtual_pipeline_model_parallel_size": chunks,
                }
                division = Layout.from_config(model, ranks=ranks)
                theirs = refused(
                    parallel_state.initialize_model_parallel,
                    **sizes(tensor, pipeline, context, expert),
                    virtual_pipeline_model_parallel_size=chunks,
                    # Bridge resolves None before it gets here: test_expert_refusals_are_megatrons.
                    expert_tensor_parallel_size=division.resolved_expert_tensor_parallel_size,
                    create_gloo_process_groups=False,
                )
                parallel_state.destroy_model_parallel()
                assert bool(reasons(model, ranks)) == bool(theirs), (model, ranks, reasons(model, ranks), theirs)


def test_expert_refusals_are_megatrons(bridge: Any) -> None:
    """Experts: the same refusals as the configuration, the layer's constructor and its first training step."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer

    class Layer(BaseMoELayer):
        def forward(self, hidden_states: Any) -> Any:
            return hidden_states

    for experts, expert, tensor, sequence, bias, expert_tensor in product(
        (None, 4, 6), (1, 2, 4), (1, 2), (False, True), (False, True), (None, 1, 2)
    ):
        changed = {"num_moe_experts": experts, "sequence_parallel": sequence, "add_bias_linear": bias}
        changed |= sizes(tensor, expert=expert) | {
            "expert_tensor_parallel_size": expert_tensor,
            "moe_ffn_hidden_size": None,
        }
        if experts is None:
            changed.pop("moe_ffn_hidden_size")
        model = provider(**changed)
        ours = reasons(model, 16)
        theirs = refused(model.finalize)
        division = Layout.from_config(model, ranks=16)
        if not theirs:
            assert model.expert_tensor_parallel_size == division.resolved_expert_tensor_parallel_size
        if experts and not theirs:
            groups = SimpleNamespace(ep=Group(expert), tp=Group(tensor))
            with fake_world(16):
                theirs = refused(Layer, config=model, layer_number=1, pg_collection=groups)
            step = SimpleNamespace(training=True, attn_tp_group=Group(tensor), config=model)
            with suppress(AttributeError, TypeError):  # past the check, this half object has no router
                theirs = theirs or refused(MoELayer.forward, step, None)
        assert bool(ours) == bool(theirs), f"{changed}\n  course: {ours}\n  Megatron: {theirs}"


def test_sequence_parallelism_without_tensor_parallelism(bridge: Any) -> None:
    """Megatron Core refuses it, Bridge drops it silently; the course follows Bridge, whose configuration it reads."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    with pytest.raises(ValueError, match="Cannot use sequence parallelism without tensor parallelism"):
        TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=8, sequence_parallel=True)
    model = provider(sequence_parallel=True)
    assert reasons(model, 1) == [] and not Layout.from_config(model, ranks=1).sequence_parallel
    model.finalize()
    assert model.sequence_parallel is False


def test_sequence_refusals_are_megatrons(bridge: Any) -> None:
    """Sequence parallelism refuses what ``_split_along_first_dim`` cannot split evenly."""
    import torch
    from megatron.core.tensor_parallel.mappings import _split_along_first_dim

    for length, tensor in product((8, 10, 12, 15), (1, 2, 4)):
        ours = reasons(LLAMA | sizes(tensor) | {"seq_length": length, "sequence_parallel": True}, tensor)
        assert bool(ours) == bool(refused(_split_along_first_dim, torch.zeros(length, 1, 4), Group(tensor)))


def test_local_attention_refuses_context_parallelism(bridge: Any) -> None:
    """Without Transformer Engine upstream has no context parallelism; a CPU run gathers the keys, and is let through."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    model = provider(**sizes(context=2))
    assert "CP=2 needs Transformer Engine's attention" in " ".join(reasons(model, 2))
    theirs = refused(DotProductAttention, model, 1, AttnMaskType.causal, "self")
    assert "Context parallelism is only supported by TEDotProductAttention" in theirs
    assert reasons(LLAMA | sizes(context=2), 2) == []
    local = LLAMA | sizes(context=2) | {"transformer_impl": "local"}
    for backend, found in (("nccl", 1), ("gloo", 0)):
        assert len(layout.check({"model": local, "dist": {"distributed_backend": backend}}, 2)) == found


def test_batch_refusals_are_megatrons(bridge: Any) -> None:
    """A step is refused exactly when Megatron's calculator of micro-batches refuses it."""
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator

    for batch, micro, copies in product((1, 2, 4, 6, 8, 12), (1, 2, 3, 4), (1, 2, 4)):
        cfg = {"model": LLAMA, "train": {"global_batch_size": batch, "micro_batch_size": micro}}
        theirs = refused(ConstantNumMicroBatchesCalculator, batch, micro, copies, False, 1)
        assert bool(reasons(cfg, copies)) == bool(theirs), (batch, micro, copies)


def test_interleaving_needs_enough_microbatches(bridge: Any) -> None:
    """The schedule's two conditions on micro-batches stand upstream as they are mirrored here."""
    from megatron.core.pipeline_parallel import schedules

    source = inspect.getsource(schedules.forward_backward_pipelining_with_interleaving)
    assert "config.microbatch_group_size_per_vp_stage > num_microbatches" in source
    assert "config.microbatch_group_size_per_vp_stage < pipeline_parallel_size" in source
    assert "0 < final_microbatch_group_size < pipeline_parallel_size" in source
    interleaved = LLAMA | sizes(pipeline=2) | {"virtual_pipeline_model_parallel_size": 2}
    verdicts = {}
    for batch in (1, 2, 3, 4, 5):
        cfg = {"model": interleaved, "train": {"global_batch_size": batch, "micro_batch_size": 1}}
        verdicts[batch] = not layout.check(cfg, 2)
    assert verdicts == {1: False, 2: True, 3: False, 4: True, 5: False}


def test_mamba_refusals_name_heads_and_groups() -> None:
    """A hybrid model shares its Mamba heads and state groups among the TP ranks; dense models are not asked."""
    hybrid = LLAMA | {"hybrid_layer_pattern": "M-M*", "mamba_num_heads": 6, "mamba_num_groups": 8}
    assert reasons(hybrid | sizes(2), 2) == []
    assert any("TP=4 does not divide 6 Mamba heads" in reason for reason in reasons(hybrid | sizes(4), 4))
    assert reasons(LLAMA | {"mamba_num_heads": 6} | sizes(4), 4) == []


@pytest.mark.parametrize(
    ("changed", "ranks", "legal"),
    [
        ({}, 8, True),
        ({"model.tensor_model_parallel_size": 2}, 8, True),
        ({"model.tensor_model_parallel_size": 3}, 8, False),
        ({"model.tensor_model_parallel_size": 16}, 16, True),
        ({"model.tensor_model_parallel_size": 64}, 64, False),
        ({"model.context_parallel_size": 2}, 8, True),
        ({"model.context_parallel_size": 2, "model.seq_length": 8190, "dataset.seq_length": 8190}, 8, False),
        ({"model.seq_length": 4096}, 8, False),
        ({"train.global_batch_size": 12}, 8, False),
        ({"validation.eval_global_batch_size": 12}, 8, False),
        ({"model.pipeline_model_parallel_size": 4, "model.account_for_loss_in_pipeline_split": True}, 8, False),
        ({"model.expert_model_parallel_size": 2}, 8, False),
    ],
)
def test_whole_configurations_agree_with_bridges_validate(
    bridge: Any, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], ranks: int, legal: bool
) -> None:
    """NVIDIA's 1B recipe with one thing changed: refused here if and only if Bridge's own validation refuses."""
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.config import runtime_config_update

    from course_lib import recipes

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    cfg.env_vars = {}
    cfg.model.apply_rope_fusion = False  # needs Transformer Engine, and is not a matter of layout
    for name, value in changed.items():
        section, field = name.split(".")
        setattr(getattr(cfg, section), field, value)
    ours = reasons(cfg, ranks)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")

    def theirs() -> None:
        from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator

        runtime_config_update(cfg)
        batch, micro = cfg.train.global_batch_size, cfg.train.micro_batch_size
        ConstantNumMicroBatchesCalculator(batch, micro, cfg.data_parallel_size, False, 1)

    assert bool(ours) == bool(refused(theirs)) == (not legal), f"course: {ours}\nBridge: {refused(theirs)}"

"""What the layout arithmetic refuses is what Megatron refuses, and its groups are Megatron's groups."""

from __future__ import annotations

import inspect
from contextlib import suppress
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from course_lib.planning import layout
from course_lib.planning.layout import Layout
from support.layouts import LLAMA, Group, fake_world, provider, reasons, refused, sizes


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


@pytest.mark.parametrize("channels", [8, 11, 12])
@pytest.mark.parametrize("percent", [0.0, 0.3, 0.5, 1.0])
def test_rotary_positions_turn_pairs(
    bridge: Any, monkeypatch: pytest.MonkeyPatch, channels: int, percent: float
) -> None:
    """An odd number of turned channels passes every constructor upstream and breaks in the first forward pass."""
    import torch
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    model = provider(num_attention_heads=4, hidden_size=48, kv_channels=channels, rotary_percent=percent)
    model.position_embedding_type, model.apply_rope_fusion = "rope", False
    monkeypatch.setattr("torch.cuda.current_device", lambda: "cpu")
    with fake_world(1):
        angles = RotaryEmbedding(channels, percent, use_cpu_initialization=True, cp_group=Group(1))(6)
    theirs = refused(lambda: apply_rotary_pos_emb(torch.ones(6, 1, 4, channels), angles, model, cp_group=Group(1)))
    ours = reasons(model, 1)
    assert bool(ours) == bool(theirs)
    if ours:
        model.kv_channels = layout.check(model, 1)[0].changes[0]["model.kv_channels"]
        assert not reasons(model, 1)


def test_a_token_chooses_experts_that_there_are(bridge: Any) -> None:
    """More than there are pass Core's checks and break in the first forward pass; as many do not."""
    for chosen, words in ((4, []), (5, ["model.moe_router_topk: a token cannot choose 5 of 4 experts: choose 4"])):
        model = provider(num_moe_experts=4, moe_router_topk=chosen)
        assert reasons(model, 1) == words


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

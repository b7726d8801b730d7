"""What a run really sends equals the closed form, whatever the layout."""

from __future__ import annotations

import pandas as pd
import pytest

from course_lib import launch
from course_lib.figures import parallelism
from course_lib.planning import messages
from course_lib.planning.layout import Layout
from course_lib.reading import collectives
from support import families, sparse
from support.small import config

SHARDED = {"ddp__use_distributed_optimizer": True, "optimizer__use_distributed_optimizer": True}
LAYOUTS = {
    "TP=2 DP=2": (4, {"tp": 2}),
    "TP=4": (4, {"tp": 4}),
    "TP=4 DP=2, sequence parallel": (8, {"tp": 4, "model__sequence_parallel": True}),
    "TP=2 PP=2": (4, {"tp": 2, "pp": 2}),
    "TP=2 PP=2 DP=2, sequence parallel, sharded": (8, {"tp": 2, "pp": 2, "model__sequence_parallel": True, **SHARDED}),
    "DP=4, distributed optimizer": (4, {"tp": 1, **SHARDED}),
    "TP=2 DP=2, distributed optimizer": (4, {"tp": 2, **SHARDED}),
    "PP=2 interleaved": (2, {"tp": 1, "pp": 2, "model__virtual_pipeline_model_parallel_size": 2}),
    "PP=4 DP=2": (8, {"tp": 1, "pp": 4}),
    "TP=2 CP=2 DP=2": (8, {"tp": 2, "model__context_parallel_size": 2}),
    "TP=2 PP=2 CP=2, sequence parallel, sharded": (
        8,
        {"tp": 2, "pp": 2, "model__context_parallel_size": 2, "model__sequence_parallel": True, **SHARDED},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_recorded_equals_closed_form(name, bridge, runs_directory):
    """Every operation of every rank: its phase, group, group size, bytes and count are as the closed form says."""
    ranks, fields = LAYOUTS[name]
    cfg = config(train_iters=2, train__global_batch_size=4, **fields)
    run = launch.run(cfg, ranks=ranks, show=None, record=True)
    for rank in range(ranks):
        table = collectives.compare(run, rank=rank)
        wrong = table[table.expected != table.recorded]
        assert wrong.empty, f"rank {rank}:\n{wrong.to_string()}"
    assert set(run.collectives.step) == {1, 2}
    passes = run.timeline[run.timeline.step == 2].groupby(["rank", "kind"]).size()
    assert passes.nunique() == 1 and len(passes) == 2 * ranks


@pytest.mark.parametrize(
    ("fusion", "sent"),
    [
        (None, [("all_reduce", 256, 24)]),
        ("native", [("all_reduce", 256, 8), ("all_reduce", 512, 8)]),
        ("te", [("all_gather", 1536, 8)]),
    ],
)
def test_a_fused_loss_sends_other_messages(bridge, fusion, sent):
    """64 tokens a micro-batch and 8 of them a step: three numbers a token, however the kernel packs them."""
    rows = messages.expected(config(), ranks=2, loss_fusion=fusion)
    loss = rows[rows.why.str.startswith("loss:")]
    assert list(loss[["operation", "bytes", "count"]].itertuples(index=False, name=None)) == sent
    with pytest.raises(messages.NotCounted, match="loss_fusion='apex'"):
        messages.expected(config(), ranks=2, loss_fusion="apex")


EXPERTS = {
    "as the recipe says": (2, {"expert": 2}, {"moe_token_dispatcher_type": "flex", "moe_aux_loss_coeff": 1e-3}),
    "allgather, TP=2": (4, {"tensor": 2, "expert": 2}, {"moe_token_dispatcher_type": "allgather"}),
    "as Nemotron routes, TP=2 PP=2": (
        8,
        {"tensor": 2, "pipeline": 2, "expert": 4},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_router_dtype": "fp32",
            "moe_aux_loss_coeff": 1e-4,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "without expert parallelism": (2, {}, {}),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_messages_of_experts_equal_the_closed_form(name, bridge, runs_directory):
    """Every operation of every rank and step; all-to-all bytes follow the recorded choices with no tolerance."""
    ranks, layout, fields = EXPERTS[name]
    run = launch.run(sparse.config(fields=fields, **layout), ranks=ranks, show=None, record=True)
    for rank in range(ranks):
        table = collectives.compare(run, rank=rank)
        wrong = table[table.expected != table.recorded]
        assert wrong.empty, f"rank {rank}:\n{wrong.to_string()}"


KEPT = {"model__recompute_granularity": None, "model__moe_token_dispatcher_type": "alltoall"}
HYBRIDS = {
    "M*": (2, {}, {}),
    "M-*": (4, {"tensor": 2}, SHARDED | {"model__share_embeddings_and_output_weights": True}),
    "M*M": (4, {"tensor": 2, "context": 2}, {}),
    "E*": (2, {"tensor": 2, "expert": 2}, {"model__moe_token_dispatcher_type": "allgather"}),
    "MEM*E": (4, {"expert": 4}, KEPT),
    "EM*E": (4, {"expert": 2}, {"model__moe_token_dispatcher_type": "alltoall"}),
    "MEM*E*": (4, {"tensor": 2, "expert": 2}, KEPT),
    "ME|M*": (4, {"pipeline": 2, "expert": 2}, KEPT),
    "ME|M*E": (8, {"tensor": 2, "pipeline": 2, "expert": 2}, KEPT | SHARDED),
}
"""Ranks, sizes and fields of Nemotron 3 Nano's recipe in small, by pattern; it recomputes experts unless they are `KEPT`."""


@pytest.mark.parametrize("pattern", HYBRIDS)
def test_messages_of_hybrids_equal_the_closed_form(pattern, bridge, runs_directory):
    """Letter by letter, in every layout; where tokens travel to experts, as many bytes as the routers chose."""
    ranks, layout, more = HYBRIDS[pattern]
    cfg = families.hybrid(pattern=pattern, layout=layout, train__global_batch_size=4, **more)
    run = launch.run(cfg, ranks=ranks, show=None, record=True)
    for rank in range(ranks):
        table = collectives.compare(run, rank=rank)
        wrong = table[table.expected != table.recorded]
        assert wrong.empty, f"rank {rank}:\n{wrong.to_string()}"


def test_without_a_recorded_load_every_expert_gets_the_same(bridge):
    """32 tokens with two choices each, of 64 channels, go out and come back: a plan."""
    rows = messages.expected(sparse.config(expert=2), ranks=2)
    assert set(rows[rows.operation == "all_to_all"].bytes) == {4 * 64 * 64, 4 * 64}


@pytest.mark.parametrize(
    ("layout", "fields", "why"),
    [
        ({"expert": 2}, {"moe_layer_freq": [0, 1]}, "moe_layer_freq: not every layer"),
        ({"expert": 2}, {"moe_token_dispatcher_type": "flex"}, "kernels that need CUDA"),
        ({"expert": 2}, {"expert_tensor_parallel_size": 2}, "ETP=2 cuts each expert"),
        ({"tensor": 2}, {}, "set it to at least TP"),
        ({"expert": 2}, {"moe_router_load_balancing_type": "global_aux_loss"}, "global_aux_loss"),
        ({"expert": 2}, {"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1.0"),
    ],
)
def test_experts_that_are_not_counted_are_refused(layout, fields, why, bridge):
    """Each with the field that sends other things."""
    with pytest.raises(messages.NotCounted, match=why):
        messages.expected(sparse.config(fields=fields, **layout), ranks=4)


def test_what_a_recorded_run_says_beside_its_bytes(bridge, runs_directory):
    """An operation names the module that asked for it, forward and backward, and the function that made the call; the
    comparison fails for a run of another shape, and says which rows."""
    run = launch.run(config(train_iters=2), ranks=2, show=None, record=True)
    rows = run.collectives[(run.collectives["rank"] == 0) & (run.collectives.bytes > 1000)]
    assert "decoder.layers.0.mlp.linear_fc2" in set(rows[rows.phase == "forward"].module)
    assert "decoder.layers.0.mlp.linear_fc1" in set(rows[rows.phase == "backward"].module)
    assert rows.caller.str.startswith("megatron.").all()
    run.config["model"]["num_layers"] = 6
    table = collectives.compare(run)
    assert set(table[table.expected != table.recorded].group) == {"tp"}


def test_a_recorder_that_is_taken_off_leaves_nothing(bridge, tmp_path):
    """What it replaced in torch's process groups and Megatron's schedule lies there again."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from course_lib.ranks import recording

    def methods():
        return [vars(torch.distributed.ProcessGroup).get(name) for name in recording.METHODS] + [schedules.forward_step]

    before, recorder = methods(), recording.Recorder(tmp_path, 0)
    recorder.install()
    assert all(one is not other or one is None for one, other in zip(methods(), before, strict=True))
    recorder.remove()
    assert all(one is other for one, other in zip(methods(), before, strict=True))


def test_nothing_is_recorded_unless_asked(bridge, runs_directory):
    """A run without `record=True` leaves no such files, and reading it says what to do."""
    run = launch.run(config(train_iters=1), ranks=2, show=None)
    assert not (run.path / "collectives.jsonl").exists() and not (run.path / "timeline.jsonl").exists()
    with pytest.raises(ValueError, match="record=True"):
        collectives.recorded(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recompute_granularity", "full"),
        ("cp_comm_type", "p2p"),
        ("add_bias_linear", True),
        ("normalization", "LayerNorm"),
        ("position_embedding_type", "learned_absolute"),
        ("multi_latent_attention", True),
        ("add_qkv_bias", True),
        ("attention_output_gate", True),
        ("softmax_type", "learnable"),
        ("mtp_num_layers", 1),
        ("hybrid_layer_pattern", "*-G-"),
        ("hybrid_layer_pattern", "*-*-/*-"),
    ],
)
def test_what_is_not_counted_is_refused(field, value, bridge):
    """The closed form does not answer for a model that sends other things."""
    cfg = config(model__context_parallel_size=2)
    assert len(messages.expected(cfg, ranks=8))
    setattr(cfg.model, field, value)
    with pytest.raises(messages.NotCounted, match=field):
        messages.expected(cfg, ranks=8)


def test_what_a_rank_sends_is_counted_by_group():
    """A ring passes all but one part on, and the largest sender comes first."""
    assert [messages.sent_bytes(name, 1000, 4) for name in ("all_to_all", "barrier")] == [750.0, 0.0]
    rows = [("all_gather", "tp", 4, 1000, 3), ("all_reduce", "dp-cp", 2, 4000, 1), ("all_reduce", "tp", 4, 100, 2)]
    found = messages.by_group(pd.DataFrame(rows, columns=["operation", "group", "group_size", "bytes", "count"]))
    assert list(found.itertuples(name=None)) == [("dp-cp", 1, 4000.0), ("tp", 5, 2550.0)]


def test_picture_shows_every_rank_and_group(bridge):
    """The picture names the groups, their number and their bytes."""
    from course_lib.figures import plots

    layout = Layout(world_size=8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with plots.figure() as ax:
        parallelism.messages(layout, {"tp": 2**20, "dp-cp": 2**10, "pp": 512}, ax=ax)
    text = ax.get_label()
    assert (
        "tp: 4 groups of 2, 1.0 MiB" in text and "dp-cp: 4 groups of 2" in text and "pp: 4 groups of 2, 512 B" in text
    )
    assert {label.get_text() for label in ax.texts} >= {str(rank) for rank in range(8)}
    with plots.figure() as ax:
        parallelism.messages(Layout(world_size=8, context_parallel_size=2), {"cp": 2**10, "dp-cp": 2**20}, ax=ax)
    assert "cp: 4 groups of 2, 1.0 KiB" in ax.get_label() and "dp-cp: 1 group of 8" in ax.get_label()

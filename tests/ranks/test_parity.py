"""Every layout trains the same model: from one checkpoint, the losses and gradient norms of one rank."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from course_lib import launch, runs
from support import families, small

DENSE = {
    "model__num_layers": 4,  # two stages of two chunks
    "model__hidden_size": 64,
    "model__ffn_hidden_size": 128,
    "model__seq_length": 32,
    "dataset__seq_length": 32,
    "train__global_batch_size": 4,
    "tokenizer__vocab_size": 1024,  # Megatron pads to a multiple of 128 times TP, and the loss counts padded rows
    "scheduler__lr_decay_iters": 10,
    "checkpoint__load_rng": False,  # upstream keeps a generator for each expert-parallel rank, and wants as many back
    "checkpoint__load_optim": False,  # and refuses Adam's state at another EP
}
# Four stages of two chunks, which four microbatches would only fill and drain.
LONGER = DENSE | {"model__num_layers": 8, "train__global_batch_size": 8}
EXPERTS = LONGER | {
    "model__num_layers": 4,
    "model__num_moe_experts": 8,
    "model__moe_router_topk": 2,
    "model__moe_ffn_hidden_size": 64,
    "model__moe_router_load_balancing_type": "aux_loss",
    "model__moe_aux_loss_coeff": 0.01,
    "model__moe_token_dispatcher_type": "alltoall",
}
ODD = LONGER | {  # sizes that divide badly: tied weights, heads wider than their share, fewer key heads than TP ranks
    "model__num_layers": 7,
    "model__num_query_groups": 2,
    "model__kv_channels": 24,
    "model__rotary_percent": 0.5,
    "model__qk_layernorm": True,
    "model__add_qkv_bias": True,
    "model__share_embeddings_and_output_weights": True,
    "tokenizer__vocab_size": 1001,
    "train__micro_batch_size": 2,
    "optimizer__clip_grad": 0.01,
}
MODELS = {"dense": DENSE, "longer": LONGER, "experts": EXPERTS, "odd": ODD, "hybrid": {}}
SIZES = {
    "TP": "model__tensor_model_parallel_size",
    "PP": "model__pipeline_model_parallel_size",
    "VP": "model__virtual_pipeline_model_parallel_size",
    "CP": "model__context_parallel_size",
    "EP": "model__expert_model_parallel_size",
}
OVERLAP = {"model__overlap_p2p_comm": True, "model__batch_p2p_comm": False}
SHAPES = {"model__variable_seq_lengths": True}
COUNTED = {"model__account_for_embedding_in_pipeline_split": True}
ENDS = {"model__num_layers_in_first_pipeline_stage": 1, "model__num_layers_in_last_pipeline_stage": 2}
SEEDED = "support.drills:seeds_its_stream"
FULL = {"model__recompute_granularity": "full", "model__recompute_method": "uniform", "model__recompute_num_layers": 1}


def plan(text: str) -> dict[str, Any]:
    """A written plan of the pipeline's stages."""
    return {"model__pipeline_model_parallel_layout": text}


def layout(text: str) -> dict[str, Any]:
    """The fields of a layout such as `TP2 CP2 SP`."""
    sizes = {SIZES[part[:2]]: int(part[2:]) for part in text.split() if part != "SP"}
    return sizes | ({"model__sequence_parallel": True} if "SP" in text.split() else {})


def config(kind: str, steps: int = 3, **fields: Any) -> Any:
    """The small model of a kind after some fields were changed."""
    if kind != "hybrid":
        return small.config(**{"tp": 1} | MODELS[kind] | fields, train_iters=steps)
    return families.hybrid(train__train_iters=steps, **fields)


@pytest.fixture(scope="module")
def started(bridge, tmp_path_factory):
    """Of a kind of model: a checkpoint of one rank, and one rank's run from it; both are made when they are first asked for."""

    @functools.cache
    def begun(kind: str) -> tuple[runs.Run, runs.Run]:
        start = launch.run(config(kind, 1), ranks=1, name=kind, save=True, show=None)
        return start, launch.run(config(kind), ranks=1, name=kind, load=start, show=None)

    directory = tmp_path_factory.mktemp("runs")

    def of(kind: str) -> tuple[runs.Run, runs.Run]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COURSE_RUNS", str(directory))
            return begun(kind)

    return of


@pytest.mark.parametrize(
    ("ranks", "kind", "text", "more"),
    [
        (4, "dense", "TP4", {}),  # TP8 without SP is in tests/launch/test_launch.py
        (8, "dense", "TP8 SP", {}),
        (2, "dense", "CP2", {}),
        (4, "dense", "TP2 CP2 SP", {}),
        (4, "longer", "PP4 VP2", {}),
        (2, "dense", "PP2 VP2", {}),
        (2, "dense", "PP2 VP2", OVERLAP),
        (2, "experts", "PP2 VP2", SHAPES),
        (8, "dense", "TP2 PP2 VP2 CP2 SP", {}),
        (4, "experts", "EP1", {}),
        (4, "experts", "EP4", {}),
        (8, "experts", "EP8", {}),
        (8, "experts", "TP2 EP4 SP", {}),
        (8, "experts", "PP2 EP4", {}),
        (8, "experts", "TP2 PP2 VP2 EP2 SP", {}),
        (4, "odd", "TP4 SP", {}),
        (4, "odd", "TP2 CP2 SP", {}),
        (2, "odd", "PP2", COUNTED),
        (4, "odd", "PP4", ENDS),
        (3, "odd", "PP3", plan("E|t*7|L")),
        (2, "experts", "PP2", plan("Et|t*3L")),
        (8, "hybrid", "EP8", {}),
        (4, "hybrid", "TP2 CP2 SP", {}),
        (8, "hybrid", "TP2 PP2 EP2 SP", {"model__hybrid_layer_pattern": "ME|M*E"}),
        (2, "hybrid", "PP2", {"model__hybrid_layer_pattern": "M|EM*E"}),  # a stage without experts
    ],
)
def test_every_layout_trains_the_same_model(started, runs_directory, ranks, kind, text, more):
    """Two steps after the checkpoint: losses and gradient norms of one rank, to 1e-5."""
    start, alone = started(kind)
    run = launch.run(config(kind, **layout(text), **more), ranks=ranks, load=start, show=None)
    assert run.metrics.step.tolist() == [2, 3] == alone.metrics.step.tolist()
    assert runs.difference(run, alone) < 1e-5


@pytest.mark.parametrize(
    ("ranks", "text", "more"),
    [(1, "", FULL), (2, "TP2 SP", FULL), (2, "PP2", FULL), (2, "TP2", {"model__recompute_granularity": "selective"})],
)
def test_what_is_computed_again_drops_what_it_dropped(bridge, runs_directory, ranks, text, more):
    """With dropout, a run that computes layers again has the bits of one that keeps them, and not those without dropout."""
    dropping = layout(text) | {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1, "model__num_layers": 2}
    kept, again = (launch.run(config("dense", 2, **dropping, **each), ranks=ranks, show=None) for each in ({}, more))
    for name in ("loss", "grad_norm"):
        assert kept.metrics[name].tolist() == again.metrics[name].tolist()


def test_tensor_parallel_ranks_drop_the_same_of_what_they_share(started, runs_directory):
    """Hidden dropout without sequence parallelism is drawn alike on every TP rank: it trains as one rank does.

    Attention's dropout is not compared: each rank has heads of its own, and by Megatron's design a stream of its own.
    """
    start, undropped = started("dense")
    hidden = {"model__hidden_dropout": 0.1}
    alone, shared = (
        launch.run(config("dense", **layout(text), **hidden), ranks=ranks, load=start, show=None, target=SEEDED)
        for ranks, text in ((1, ""), (2, "TP2"))
    )
    assert runs.difference(shared, alone) < 1e-5 < runs.difference(undropped, alone)


def test_a_balance_over_all_ranks_is_a_matter_of_data_parallelism(started, runs_directory):
    """Megatron Core counts `global_aux_loss` over what all ranks compute at once, and the mean over DP then divides it by DP.

    So two copies at twice the coefficient are one rank with two sequences at once, experts dealt out or not.
    """
    start, _ = started("experts")
    balance = {"model__moe_router_load_balancing_type": "global_aux_loss"}
    balance["train__global_batch_size"] = 4
    one, two = ({"model__moe_aux_loss_coeff": weight} | balance for weight in (0.5, 1.0))
    alone = launch.run(config("experts", train__micro_batch_size=2, **one), ranks=1, load=start, show=None)
    for text, weighted, same in (("EP1", two, True), ("EP2", two, True), ("EP2", one, False)):
        run = launch.run(config("experts", **layout(text), **weighted), ranks=2, load=start, show=None)
        assert (runs.difference(run, alone) < 1e-5) == same


def test_a_hybrid_goes_on_where_it_was(started, runs_directory):
    """With Adam's moments, on two tensor-parallel ranks: a run in two parts is the run in one."""
    fields = layout("TP2 SP") | {"checkpoint__load_rng": True, "checkpoint__load_optim": True}
    fields["train__global_batch_size"] = 4
    first = launch.run(config("hybrid", 1, **fields), ranks=2, save=True, show=None)
    second = launch.run(config("hybrid", **fields), ranks=2, load=first, show=None)
    whole = launch.run(config("hybrid", **fields), ranks=2, show=None)
    assert second.metrics.step.tolist() == [2, 3] == whole.metrics.step.tolist()[1:]
    for name in ("loss", "grad_norm"):
        assert second.metrics[name].tolist() == pytest.approx(whole.metrics[name].tolist()[1:], rel=1e-6)

"""The routers' choices are recorded whole by NVIDIA's tracer, or refused by name; what arrives is what was chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from course_lib import launch
from course_lib.ranks import routing
from course_lib.reading import experts
from support.sparse import config


def test_every_choice_of_a_step_is_counted_once(bridge, runs_directory):
    """32 tokens x top-2 a sequence, 4 sequences a step, in both layers; an evaluation between steps is not counted."""
    cfg = config(expert=2)
    cfg.validation.eval_iters = cfg.validation.eval_interval = 1
    run = launch.run(cfg, ranks=2, record="router", show=None)
    assert not len(run.collectives) and set(run.router.microbatch) == {0, 1}
    load = experts.load(run)
    assert load.index.tolist() == [(step, layer) for step in (1, 2) for layer in (1, 2)] and load.shape == (4, 8)
    assert (load.sum(axis=1) == 4 * 32 * 2).all()
    arrived = [experts.arriving(run, rank=rank) for rank in (0, 1)]
    first = load.loc[2].iloc[:, :4].sum(axis=1)
    assert [sum(arrived[0][:2]), sum(arrived[0][2:])] == first.tolist() and len(arrived[0]) == 4
    assert [one + other for one, other in zip(*arrived, strict=True)] == [2 * 32 * 2] * 4
    assert (experts.imbalance(load) >= 1).all(axis=None) and (experts.starved(load, share=9) == 8).all(axis=None)


@pytest.mark.parametrize(
    "again",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
)
def test_a_router_that_runs_again_in_the_backward_pass_is_counted_once(bridge, runs_directory, again):
    """Step for step, layer for layer and microbatch for microbatch the choices of a run that keeps everything."""
    kept, recomputed = (launch.run(config(fields=more), ranks=1, record="router", show=None) for more in ({}, again))
    assert len(kept.router) and recomputed.router.equals(kept.router)


def test_layers_of_later_stages_keep_their_numbers(bridge, runs_directory):
    """A stage numbers its layers from 0, the model from 1."""
    run = launch.run(config(pipeline=2), ranks=2, record="router", show=None)
    assert set(zip(run.router["rank"], run.router.layer, strict=True)) == {(0, 1), (1, 2)}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1.0 drops choices"),
        ({"mtp_num_layers": 1}, "set mtp_num_layers to None"),
        ({"cuda_graph_impl": "local"}, "set it to 'none'"),
        ({"num_moe_experts": None}, "the model has no experts"),
    ],
)  # fmt: skip
def test_what_the_tracer_would_count_wrongly_is_refused_by_name(bridge, runs_directory, fields, why):
    """Before there are ranks, and nothing is left behind."""
    cfg = config()
    assert routing.unrecorded(cfg, "cuda") == ""
    for name, value in fields.items():
        setattr(cfg.model, name, value)
    assert why in routing.unrecorded(cfg, "cuda")


def test_a_refusal_comes_before_ranks_and_a_reader_is_told_the_reason(bridge, runs_directory):
    """`record="router"` is refused; `record=True` records the rest, and reading the load says why there is none."""
    cfg = config()
    cfg.model.moe_expert_capacity_factor = 1.0
    with pytest.raises(launch.ConfigError, match="drops choices"):
        launch.run(cfg, ranks=1, record="router", show=None)
    with pytest.raises(ValueError, match="use True, False or 'router'"):
        launch.run(cfg, ranks=1, record="routers", show=None)
    assert not list(runs_directory.glob("*/launch.json"))
    run = launch.prepare(cfg, ranks=1, record=True)
    with pytest.raises(ValueError, match="drops choices"):
        experts.load(run)
    unasked = launch.prepare(config(), ranks=1)
    with pytest.raises(ValueError, match="record='router'"):
        experts.load(unasked)


def test_a_microbatch_that_the_tracer_leaves_out_stops_the_run(bridge, monkeypatch, tmp_path):
    """What no refusal foresaw must not become a load that is too small."""
    monkeypatch.setattr("megatron.core.num_microbatches_calculator.get_num_microbatches", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    listener = routing.Routers(tmp_path, 0)
    record = {"layer": 0, "_top_indices_tensor": torch.tensor([[0, 1]])}
    listener.chunks = [(SimpleNamespace(records=[record]), [SimpleNamespace(layer_number=1)])]
    with pytest.raises(RuntimeError, match="1 microbatches of the router in layer 1 instead of 2"):
        listener.on_train_step_end(SimpleNamespace())

"""Planned bytes: counted from the built model, equal to what ranks hold, and to what Bridge's own formula says."""

from __future__ import annotations

from typing import Any

import pytest
import small

from course_lib import compute, launch, layout, live_tensors, memory, meta_model, planner, recipes


@pytest.fixture(scope="module")
def llama(bridge: Any) -> Any:
    """NVIDIA's recipe for Llama 3 8B with its real vocabulary and one CP rank."""
    from megatron.bridge.recipes.llama import llama3_8b_pretrain_config

    with recipes.offline():
        cfg = llama3_8b_pretrain_config()
    cfg.tokenizer.vocab_size, cfg.model.context_parallel_size, cfg.train.global_batch_size = 128_256, 1, 128
    return cfg


@pytest.mark.parametrize(
    ("tp", "pp", "ranks", "distributed"), [(2, 1, 8, True), (2, 2, 4, False), (1, 1, 2, True), (2, 2, 8, True)]
)
def test_the_plan_is_what_ranks_hold(bridge, runs_directory, tp, pp, ranks, distributed):
    """Real ranks hold the planned states within 3%, and one forward pass leaves the planned activations within 10%."""
    cfg = small.config(tp=tp, pp=pp, train_iters=2, model__seq_length=256, dataset__seq_length=256)
    cfg.train.micro_batch_size, cfg.mixed_precision = 2, None
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = distributed
    cfg.train.global_batch_size = 16
    cfg = memory.on_cpu(cfg)
    run = launch.run(cfg, ranks=ranks, name="held", show=None, target=live_tensors.TARGET)
    held = live_tensors.read(run)
    assert len(held) == ranks
    planned = memory.states(cfg, ranks=ranks)
    for rank, row in held.iterrows():
        stage = rank * pp // ranks
        for part in ("weights", "gradients", "optimizer"):
            assert row[f"{part}_bytes"] == pytest.approx(getattr(planned[stage], f"{part}_bytes"), rel=0.03), part
        kept = memory.activations(cfg, ranks=ranks, stage=stage)
        assert row["activations_bytes"] == pytest.approx(kept.per_microbatch_bytes + kept.loss_bytes, rel=0.10)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_every_legal_layout_holds_the_whole_model(llama, ranks):
    """Stages and TP ranks together hold each parameter once; norms are copied, and the vocabulary is padded."""
    count = recipes.parameter_count(llama.model, vocab_size=128_256)
    for one in layout.legal_layouts(ranks, llama):
        tp, pp, cp = (
            one.tensor_model_parallel_size,
            one.pipeline_model_parallel_size,
            one.context_parallel_size,
        )
        found = memory.states(memory.with_layout(llama, tp=tp, pp=pp, cp=cp), ranks=ranks)
        assert len(found) == pp
        assert tp * sum(stage.parameters for stage in found) == pytest.approx(count, rel=0.003)


def test_states_equal_bridges_own_estimate(llama):
    """At PP=1 Bridge's formula and the count agree; at PP=2 too, for untied embeddings."""
    for sizes in ({}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"cp": 2}):
        cfg = memory.with_layout(llama, **sizes)
        counted = max(stage.total_bytes for stage in memory.states(cfg, ranks=8))
        assert counted == pytest.approx(memory.bridge_estimate(cfg, ranks=8)["states"], rel=0.002)


def test_tied_embeddings_stand_on_both_ends_of_a_pipeline(bridge):
    """The last stage keeps its own copy of a tied embedding, which Bridge's formula leaves out."""
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    first, last = memory.states(memory.with_layout(cfg, pp=2), ranks=8)
    assert last.parameters == first.parameters + cfg.model.hidden_size  # the final norm


def test_experts_are_dealt_out_over_their_own_ranks(bridge):
    """EP=4 leaves a rank a quarter of the experts; each expert's optimizer states go to the ranks that hold it."""
    fields = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 256, "moe_grouped_gemm": False}
    cfg = small.config(tp=1, **{f"model__{name}": value for name, value in fields.items()})
    cfg.mixed_precision = None
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = True
    (alone,) = memory.states(memory.with_layout(cfg, ep=1), ranks=8)
    (dealt,) = memory.states(memory.with_layout(cfg, ep=4), ranks=8)
    assert alone.parameters - dealt.parameters == 3 * dealt.expert_parameters > 0
    assert alone.optimizer_bytes == pytest.approx(dealt.optimizer_bytes, rel=1e-6)
    with pytest.raises(ValueError, match="what the router sends"):
        memory.activations(cfg, ranks=8)


def test_activations_follow_what_is_kept(llama):
    """Sequence parallelism and recomputation keep less, a second stage keeps two micro-batches of half the layers."""
    kept = {
        name: memory.activations(memory.with_layout(llama, **fields), ranks=8)
        for name, fields in {
            "tp": {"tp": 2},
            "sp": {"tp": 2, "sequence_parallel": True},
            "whole": {},
            "pipeline": {"pp": 2},
            "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        }.items()
    }
    assert kept["sp"].total_bytes < kept["tp"].total_bytes < kept["whole"].total_bytes
    assert kept["sp"].per_microbatch_bytes * 2 == pytest.approx(kept["whole"].per_microbatch_bytes, rel=0.02)
    assert kept["pipeline"].in_flight == 2
    assert kept["pipeline"].total_bytes == pytest.approx(kept["whole"].total_bytes, rel=0.02)
    assert kept["full"].total_bytes < kept["whole"].total_bytes / 8
    assert kept["full"].recomputed_bytes > 0
    assert kept["attention"].total_bytes < kept["whole"].total_bytes
    with pytest.raises(ValueError, match="only \\['core_attn'\\] can be planned"):
        memory.activations(
            memory.with_layout(llama, recompute_granularity="selective", recompute_modules=["mlp"]), ranks=8
        )


def test_planning_leaves_nothing_behind(llama):
    """No process group, no patch of torch.cuda, and the configuration is as it was; errors inside change nothing."""
    import torch

    before, current = recipes.flatten(llama), torch.cuda.current_device
    with pytest.raises(layout.LayoutError):
        memory.states(memory.with_layout(llama, tp=3), ranks=8)
    with pytest.raises(ZeroDivisionError), meta_model.built(llama, ranks=8):
        raise ZeroDivisionError
    assert not torch.distributed.is_initialized()
    assert torch.cuda.current_device is current
    assert recipes.flatten(llama) == before
    with pytest.raises(AttributeError, match="no field 'tensor_size'"):
        memory.with_layout(llama, tensor_size=2)


def test_operations_counted_and_by_formula(llama):
    """torch counts on the meta model what the formula says; NVIDIA's two accountings of 8B at 8,192 tokens follow."""
    counted = compute.counted_flops_per_token(llama)
    assert counted == pytest.approx(compute.flops_per_token(llama, vocab_size=128_256, causal=False), rel=0.01)
    assert compute.flops_per_token(llama, vocab_size=128_256) / 1e9 == pytest.approx(51.5, abs=0.1)


def test_a_ceiling_is_above_every_published_run(llama):
    """Nobody published more than the data sheet allows, and TP's messages lower the ceiling."""
    gpu = compute.gpus()["H100 SXM 80GB"]
    rates = []
    for tp in (1, 2, 4, 8):
        cfg = memory.with_layout(llama, tp=tp, sequence_parallel=tp > 1)
        count = memory.states(cfg, ranks=8)[0].parameters
        sizes = {"ranks": 8, "gpu": gpu, "parameters": count, "vocab_size": 128_256}
        rates.append(compute.ceiling(cfg, **sizes).tokens_per_second_per_gpu)
    assert rates == sorted(rates, reverse=True)
    assert (compute.published().tokens_per_second_per_gpu < rates[0]).all()
    assert all(compute.published().source) and all(gpu.source for gpu in compute.gpus().values())


def test_the_planner_shows_what_fits_and_what_cannot_be(llama):
    """The controls draw a frame and the Bridge code at once; an impossible layout becomes its reason."""
    panel = planner.controls({"llama3_8b_pretrain_config": llama})
    tp = panel.children[0].children[1]
    picture, code = panel.children[2:]
    assert picture.value[:4] == b"\x89PNG" and "tensor_model_parallel_size = 2" in code.value
    tp.value = 8
    assert "tensor_model_parallel_size = 8" in code.value
    panel.children[0].children[3].value = 8  # CP=8 with TP=8 on 8 ranks
    assert picture.value == b"" and "cannot be divided" in code.value


def test_a_bar_that_does_not_fit_says_so(llama):
    """8B at TP=1 is marked, in words too, and TP=2 is not."""
    from matplotlib.figure import Figure

    plans = {
        "whole": memory.plan(llama, ranks=8),
        "cut": memory.plan(memory.with_layout(llama, tp=2, sequence_parallel=True), ranks=8),
    }
    ax = planner.bars(plans, gpu=compute.gpus()["H100 SXM 80GB"], ax=Figure().subplots())
    texts = [text.get_text() for text in ax.texts]
    assert "does not fit" in texts[0] and "fit" not in texts[1]


def test_a_run_that_measured_nothing_is_refused(tmp_path):
    """Reading tensors of an ordinary run says how to measure them."""
    from course_lib import runs

    (tmp_path / "ranks").mkdir()
    with pytest.raises(ValueError, match="target=live_tensors.TARGET"):
        live_tensors.read(runs.Run(tmp_path))

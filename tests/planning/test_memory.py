"""Planned bytes: counted from the built model, equal to what ranks hold, and to what Bridge's own formula says."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from course_lib import launch, recipes
from course_lib.common.config import Fields, UnknownField, changed
from course_lib.experiments import tensors
from course_lib.figures import parallelism
from course_lib.planning import (
    activations,
    alike,
    ceiling,
    closed_forms,
    controls,
    layout,
    memory,
    messages,
    meta_kernels,
    meta_model,
    usable,
)
from course_lib.planning.closed_forms import mixers
from course_lib.stack import devices
from support import families, small


@pytest.fixture(scope="module")
def llama(bridge: Any) -> Any:
    """NVIDIA's recipe for Llama 3 8B with its real vocabulary and one CP rank."""
    from megatron.bridge.recipes.llama import llama3_8b_pretrain_config

    with recipes.offline():
        cfg = llama3_8b_pretrain_config()
    cfg.tokenizer.vocab_size, cfg.model.context_parallel_size, cfg.train.global_batch_size = 128_256, 1, 128
    return cfg


AGAIN = {"recompute_granularity": "full", "recompute_num_layers": 2}
PARTS = {"recompute_granularity": "selective"}
FULL = {"model__recompute_granularity": "full", "model__recompute_num_layers": 2}
SELECTED = {"model__recompute_granularity": "selective"}
EXPERTS = {"model__num_moe_experts": 4, "model__moe_router_topk": 2, "model__moe_ffn_hidden_size": 128}
EXPERTS |= {"model__moe_grouped_gemm": False, "model__moe_shared_expert_intermediate_size": 64}
SP = {"model__sequence_parallel": True}
EP = {"model__expert_model_parallel_size": 2}
CASES = {
    "TP": (4, {"tp": 2, "ddp__use_distributed_optimizer": True}),
    "TP, PP": (4, {"tp": 2, "pp": 2}),
    "TP, PP, sharded": (8, {"tp": 2, "pp": 2, "ddp__use_distributed_optimizer": True}),
    "DP": (2, {"tp": 1, "ddp__use_distributed_optimizer": True}),
    "SP": (2, {"tp": 2, **SP}),
    "full, uniform": (1, {"tp": 1, "model__recompute_method": "uniform", **FULL}),
    "full, block": (1, {"tp": 1, "model__recompute_method": "block", **FULL}),
    "MLP and norms": (1, {"tp": 1, "model__recompute_modules": ["mlp", "layernorm"], **SELECTED}),
    "experts": (1, {"tp": 1, "model__moe_token_dispatcher_type": "alltoall", **EXPERTS}),
    "EP, alltoall": (2, {"tp": 1, "model__moe_token_dispatcher_type": "alltoall", **EXPERTS, **EP}),
    "EP, allgather": (2, {"tp": 1, "model__moe_token_dispatcher_type": "allgather", **EXPERTS, **EP}),
    "EP, TP, SP": (2, {"tp": 2, "model__moe_token_dispatcher_type": "alltoall", **EXPERTS, **EP, **SP}),
    "experts again": (1, {"tp": 1, "model__recompute_modules": ["moe"], **EXPERTS, **SELECTED}),
    "shared expert again": (1, {"tp": 1, "model__recompute_modules": ["shared_experts"], **EXPERTS, **SELECTED}),
}
"""What is planned and then measured: number of ranks, and fields of the small model."""
PLAIN = {"model__recompute_granularity": None, "model__recompute_modules": None}
CUT = {"model__tensor_model_parallel_size": 2, **EP, **SP}
HYBRIDS = {
    "one rank": (1, PLAIN),
    "kernels one by one": (1, {"model__use_mamba_mem_eff_path": False, **PLAIN}),
    "experts and norms again, EP, TP, SP": (2, CUT),
    "PP, EP, TP, SP": (4, {"pattern": "*|ME", "model__pipeline_model_parallel_size": 2, **CUT, **PLAIN}),
}
"""The same for Nemotron 3 Nano's recipe in small."""


@pytest.mark.parametrize("case", [*CASES, *HYBRIDS])
def test_the_plan_is_what_ranks_hold(bridge, runs_directory, case):
    """Real ranks hold the planned states within 3%, and one forward pass leaves the planned activations within 10%.

    Which expert gets how many tokens is the router's choice: activations of ranks with experts are held to the plan,
    which is balanced, by their mean.
    """
    ranks, fields = (CASES | HYBRIDS)[case]
    fields = {"model__seq_length": 256, "dataset__seq_length": 256, **fields}
    cfg = families.hybrid(**fields) if case in HYBRIDS else small.config(train_iters=2, **fields)
    cfg.train.micro_batch_size, cfg.mixed_precision = 2, None
    cfg.train.global_batch_size = 2 * ranks // cfg.model.tensor_model_parallel_size  # one or two micro-batches a rank
    cfg.optimizer.use_distributed_optimizer = cfg.ddp.use_distributed_optimizer
    cfg = devices.applied(cfg)
    run = launch.run(cfg, ranks=ranks, name="held", show=None, target=tensors.TARGET)
    held = tensors.read(run)
    assert len(held) == ranks
    stages = cfg.model.pipeline_model_parallel_size
    for stage, planned in enumerate(memory.states(cfg, ranks=ranks)):
        rows = held.iloc[stage * ranks // stages : (stage + 1) * ranks // stages]
        for part in ("weights", "gradients", "optimizer"):
            assert rows[f"{part}_bytes"].tolist() == pytest.approx(
                [getattr(planned, f"{part}_bytes")] * len(rows), rel=0.03
            )
        kept = memory.activations(cfg, ranks=ranks, stage=stage)
        wanted = pytest.approx(kept.per_microbatch_bytes + kept.loss_bytes, rel=0.10)
        if "EP" in case:
            assert rows.activations_bytes.mean() == wanted
        else:
            assert all(size == wanted for size in rows.activations_bytes)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_every_legal_layout_holds_the_whole_model(llama, ranks):
    """Stages and TP ranks together hold each parameter once; norms are copied, and the vocabulary is padded."""
    count = closed_forms.parameter_count(llama.model, vocab_size=128_256)
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


def test_one_expert_stands_for_those_of_its_rank(bridge, monkeypatch):
    """Experts of a rank are alike, so one is built and counted for all; building every one of them counts the same."""
    cfg = small.config(tp=1, model__moe_token_dispatcher_type="allgather", **EXPERTS)
    counted = [memory.states(cfg, ranks=2), memory.activations(cfg, ranks=2)]
    monkeypatch.setattr(meta_kernels, "_one_expert_for_all", lambda original, *args, **named: original(*args, **named))
    built = [memory.states(cfg, ranks=2), memory.activations(cfg, ranks=2)]
    assert built[0] == counted[0]
    assert built[1].per_microbatch_bytes == pytest.approx(counted[1].per_microbatch_bytes, rel=0.01)


DENSE = {"model__num_layers": 9}
CHUNKS = {"model__num_layers": 16, "pp": 2, "model__virtual_pipeline_model_parallel_size": 2}
HYBRID = {**PLAIN, "pattern": "MEMEMEMEM*ME", "model__cuda_graph_impl": "none"}
ALIKE = {
    "dense": (small.config, DENSE, 3),
    "every layer again": (small.config, {**DENSE, **FULL, "model__recompute_method": "uniform"}, 3),
    "two layers again": (small.config, {**DENSE, **FULL, "model__recompute_method": "block"}, 4),
    "parts again": (small.config, {**DENSE, **SELECTED, "model__recompute_modules": ["mlp", "layernorm"]}, 3),
    "another layer in between": (small.config, {**DENSE, "model__no_rope_freq": [0, 0, 0, 0, 1, 0, 0, 0, 0]}, 5),
    "experts": (small.config, {"tp": 1, **DENSE, **EXPERTS}, 3),
    "chunks": (small.config, {**CHUNKS, "model__batch_p2p_comm": False, "model__overlap_p2p_comm": True}, 6),
    "hybrid": (families.hybrid, HYBRID, 7),
}
"""Models of many layers: who makes them, their fields, and how many layers are computed."""


@pytest.mark.parametrize("case", ALIKE)
def test_layers_that_are_alike_are_counted_by_a_few(bridge, monkeypatch, case):
    """The same bytes by layer, part and tensor as if every layer were computed; another one in between starts anew."""
    make, fields, few = ALIKE[case]
    cfg, computed, watch = make(**fields), [], alike.Layers.watch
    ranks = fields.get("pp", 1) * cfg.model.tensor_model_parallel_size

    def counting(self, name, layer, marked):
        forward = layer.forward
        layer.forward = lambda *args, **named: computed.append(name) or forward(*args, **named)
        watch(self, name, layer, marked)

    monkeypatch.setattr(alike.Layers, "watch", counting)
    by_a_few = memory.activations(cfg, ranks=ranks)
    computed.clear()
    with activations.built(cfg, ranks=ranks, stage=0) as chunks:
        tensors = activations._tensors(chunks, cfg, ranks=ranks)
    monkeypatch.setattr(alike.Layers, "watch", lambda *_: None)
    assert by_a_few == memory.activations(cfg, ranks=ranks)
    with activations.built(cfg, ranks=ranks, stage=0) as chunks:
        assert sorted(tensors[0]) == sorted(activations._tensors(chunks, cfg, ranks=ranks)[0])
    assert len(computed) == few


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_nemotron_is_counted_in_every_layout(bridge, ranks):
    """Nemotron 3 Nano: TP ranks together hold the dense part once, EP ranks the experts."""
    from megatron.bridge.recipes.nemotronh.h100.nemotron_3_nano import (
        nemotron_3_nano_pretrain_8gpu_h100_bf16_config,
    )

    cfg = nemotron_3_nano_pretrain_8gpu_h100_bf16_config()
    cfg.tokenizer.vocab_size = 131_072
    whole, seen = memory.states(memory.with_layout(cfg), ranks=1)[0].parameters, set()
    assert whole == 31_577_937_344  # as lesson 02 counts it, with every expert built
    for one in layout.legal_layouts(ranks, cfg):
        tp, pp, ep = (
            one.tensor_model_parallel_size,
            one.pipeline_model_parallel_size,
            one.expert_model_parallel_size,
        )
        if one.context_parallel_size > 1 or (pp > 1 and ranks > 4):  # CP cuts no weights; a few pipelines are enough
            continue
        planned = memory.with_layout(cfg, tp=tp, pp=pp, ep=ep, sequence_parallel=tp > 1)
        stages = memory.states(planned, ranks=ranks)
        experts = sum(stage.expert_parameters for stage in stages)
        dense = sum(stage.parameters for stage in stages) - experts
        assert tp * dense + ep * experts == pytest.approx(whole, rel=0.005), one
        seen.add((tp, ep))
    assert seen >= {(1, 1), (1, ranks), (2 if ranks > 1 else 1, 1)}


def test_mamba_layers_keep_what_their_kernels_save(bridge):
    """On a GPU, in bf16: norm and projection of the residual stream, the scan's input and output, the gated norm's result.

    By hand, for one micro-batch of 256 tokens: 8 heads of 16, 2 groups of 16 states, hidden 64.  The kernels one by one keep
    what stands between them, too: the convolution's input and each of the scan's, with decays in fp32.
    """
    tokens, hidden, inner, shared, groups, heads = 256, 64, 8 * 16, 2 * 2 * 16, 2, 8
    around = 2 * (hidden + inner) + 4 * groups  # inputs of both products, and a number for each norm
    together = 2 * (2 * inner + shared + heads) + 2 * inner + 2 * inner
    one_by_one = 2 * (inner + shared) + 2 * (inner + heads + shared) + 4 * heads + 2 * inner + 2 * inner
    for whole, kept in ((True, together), (False, one_by_one)):
        cfg = families.hybrid(pattern="M", model__seq_length=tokens, dataset__seq_length=tokens, **PLAIN)
        cfg.model.use_mamba_mem_eff_path, cfg.model.cuda_graph_impl = whole, "none"
        found = memory.activations(cfg, ranks=1).by_part
        assert found["norm"] == 2 * tokens * (2 * hidden + 4), "the layer's norm and the last one"
        assert found["mamba"] == tokens * (around + kept) + 4 * heads, whole


def test_what_a_hybrid_plan_does_not_count_is_refused(bridge):
    """Where a Mamba group is shared among context-parallel ranks, and what CPU ranks keep of a shared sequence."""
    cfg = families.hybrid(model__context_parallel_size=4, model__cuda_graph_impl="none")
    with pytest.raises(memory.NotPlanned, match="CP=4 over 2 Mamba state groups"):
        memory.activations(cfg, ranks=4)
    for one in (families.hybrid(model__context_parallel_size=2), small.config(tp=1, model__context_parallel_size=2)):
        with pytest.raises(memory.NotPlanned, match="CP=2 on CPU ranks"):
            memory.activations(devices.applied(one), ranks=2)


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
            "norms": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        }.items()
    }
    assert kept["sp"].total_bytes < kept["tp"].total_bytes < kept["whole"].total_bytes
    assert kept["sp"].per_microbatch_bytes * 2 == pytest.approx(kept["whole"].per_microbatch_bytes, rel=0.02)
    assert kept["pipeline"].in_flight == 2
    assert kept["pipeline"].total_bytes == pytest.approx(kept["whole"].total_bytes, rel=0.02)
    assert kept["full"].total_bytes < kept["whole"].total_bytes / 8
    assert kept["full"].recomputed_bytes > 0
    assert kept["attention"].total_bytes >= kept["whole"].total_bytes  # flash attention keeps no scores to spare
    # Transformer Engine's norms are a part of the layer behind them, so there is nothing to compute again.
    assert kept["norms"].per_microbatch_bytes == kept["whole"].per_microbatch_bytes
    again = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    with pytest.raises(ValueError, match="Transformer Engine's grouped experts"):
        memory.activations(memory.with_layout(llama, **again), ranks=8)


def test_kept_bytes_are_those_of_the_shapes(llama):
    """8B in bf16 by hand: what Transformer Engine's layers keep of 8,192 tokens, byte for byte."""
    tokens, hidden, wide, layers = 8192, 4096, 14336, 32
    keys, heads, channels = 1024, 32, 128
    stream = 2 * hidden  # bytes of a token's hidden vector
    norm = stream + 4  # the input and its scale in fp32
    rotary = 2 * 2 * 2 * channels  # cosine and sine, for queries and for keys
    attention = (
        stream + 2 * (hidden + 2 * keys) + rotary + stream + 4 * heads
    )  # input, q k v, output, softmax statistics
    mlp = stream + 2 * 3 * wide  # input, both halves of the gate, their product
    kept = memory.activations(llama, ranks=8)
    assert kept.by_part == {
        "embedding": 8 * tokens,
        "norm": (2 * layers + 1) * norm * tokens,
        "attention": layers * attention * tokens,
        "mlp": layers * mlp * tokens,
        "output": stream * tokens,
    }
    assert kept.per_microbatch_bytes == kept.total_bytes == sum(kept.by_part.values())
    assert kept.loss_bytes == 2 * 128_256 * tokens


@pytest.mark.parametrize("tp", [1, 2])
def test_one_layer_by_its_tensors(llama, tp):
    """The named tensors of the first layer are a layer's share of what the model keeps; half of it at TP=2 with SP."""
    cut = memory.with_layout(llama, tp=tp, sequence_parallel=tp > 1)
    layer, kept = activations.one_layer(cut, ranks=8), memory.activations(cut, ranks=8)
    tokens, hidden, wide = 8192, 4096, 14_336
    assert layer["both halves before the gate"] == 2 * layer["product of the halves"] == 2 * 2 * wide * tokens / tp
    assert layer["q, k, v, and attention's output"] == (2 * (2 * hidden + 2 * 1024) + 4 * 32) * tokens / tp
    assert layer["input of the norm before attention"] == (2 * hidden + 4) * tokens / tp
    outside = 2 * (2 * hidden) * tokens / tp  # the final norm's input and the output layer's
    assert 32 * sum(layer.values()) + outside == pytest.approx(kept.total_bytes, rel=1e-4)
    assert "self_attention" not in str(list(layer)) and "mlp" not in str(list(layer)), "every tensor has words"


@pytest.mark.parametrize(
    ("pp", "vpp", "batch", "stage", "in_flight"),
    [
        (1, None, 16, 0, 1),
        (2, None, 16, 0, 2),
        (2, None, 16, 1, 1),
        (4, None, 4, 0, 2),  # no more than a step has
        (2, 2, 16, 0, 5 / 2),  # 2 warm-up passes for the next stage, 2 for the next chunk, and one
        (4, 2, 16, 0, 11 / 2),
        (4, 2, 16, 3, 5 / 2),
    ],
)
def test_micro_batches_in_flight(llama, pp, vpp, batch, stage, in_flight):
    """1F1B keeps one a stage that follows; interleaving keeps chunks, counted as parts of a micro-batch."""
    cfg = memory.with_layout(llama, pp=pp, virtual_pipeline_model_parallel_size=vpp)
    cfg.train.global_batch_size = batch
    ranks = 2 * pp
    assert activations._in_flight(cfg, ranks=ranks, stage=stage) == pytest.approx(in_flight, rel=1e-12)


@pytest.mark.parametrize(("limit", "batch", "waiting"), [(22, 128, 22), (0, 128, 64), (22, 16, 8)])
def test_what_waits_for_the_output_layers_weight_gradient_is_kept(
    llama: Any, limit: int, batch: int, waiting: int
) -> None:
    """On the last stage an input, a share of the sequence, and a share of the logits' gradient for each; as `cfg.comm_overlap`
    says, which overrules the model's own field."""
    from megatron.bridge.training.comm_overlap import CommOverlapConfig

    cfg = memory.with_layout(llama, tp=2, pp=2, sequence_parallel=True)
    cfg.train.global_batch_size, cfg.model.defer_embedding_wgrad_compute = batch, True
    kept = []
    for asked in (None, True):
        cfg.comm_overlap = CommOverlapConfig(
            tp_comm_overlap=False, defer_embedding_wgrad_compute=asked, wgrad_deferral_limit=limit
        )
        kept.append([memory.activations(cfg, ranks=8, stage=stage).loss_bytes for stage in (0, 1)])
    assert kept[1][0] == kept[0][0] == 0
    assert kept[1][1] - kept[0][1] == waiting * 8192 * (4096 // 2 + 128_256 // 2) * 2


def test_planning_leaves_nothing_behind(llama):
    """No process group, and the configuration is as it was; torch.cuda stays untouched even while a model runs."""
    import torch

    before, cuda = recipes.flatten(llama), dict(vars(torch.cuda))
    with meta_model.built(llama, ranks=8) as (model,):
        assert dict(vars(torch.cuda)) == cuda
        model.register_forward_pre_hook(lambda *_: setattr(model, "cuda_inside", dict(vars(torch.cuda))))
        meta_model.forward(model, llama, ranks=8)
        assert model.cuda_inside == cuda
    with pytest.raises(layout.LayoutError):
        memory.states(memory.with_layout(llama, tp=3), ranks=8)
    with pytest.raises(ZeroDivisionError), meta_model.built(llama, ranks=8):
        raise ZeroDivisionError
    assert not torch.distributed.is_initialized()
    assert dict(vars(torch.cuda)) == cuda
    assert recipes.flatten(llama) == before
    with pytest.raises(UnknownField, match="no field 'model.tensor_size'; the nearest are "):
        memory.with_layout(llama, tensor_size=2)


@pytest.mark.parametrize("given", [{}, {"NVTE_FLASH_ATTN": "1", "NVTE_UNFUSED_ATTN": "0", "NVTE_FRAMEWORK": "pytorch"}])
def test_planning_chooses_no_attention_for_ranks(
    llama: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    """Ranks inherit the environment of the process that launches them, and a plan leaves it as it found it."""
    from megatron.core.transformer.enums import AttnBackend

    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    for backend in (AttnBackend.flash, AttnBackend.unfused):
        cfg = changed(llama, {"model.attention_backend": backend, "model.flash_attention_version": 2})
        assert memory.plan(cfg, ranks=8).total_bytes
        assert dict(os.environ) == before
    with meta_model.built(llama, ranks=8), pytest.raises(ZeroDivisionError), meta_model._choosing_no_attention():
        os.environ["NVTE_FUSED_ATTN"] = "0"
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_operations_counted_and_by_formula(llama):
    """torch counts on the meta model what the formula says; NVIDIA's two accountings of 8B at 8,192 tokens follow."""
    counted = ceiling.counted_flops_per_token(llama)
    assert counted == pytest.approx(closed_forms.flops_per_token(llama, vocab_size=128_256, causal=False), rel=0.01)
    assert closed_forms.flops_per_token(llama, vocab_size=128_256) / 1e9 == pytest.approx(51.5, abs=0.1)


def test_operations_of_a_hybrid_follow_its_weights(bridge):
    """Nemotron 3 Nano 4B: six operations for each weight but the input embedding's, and attention and scans besides."""
    from megatron.bridge.recipes.nemotronh.h100.nemotron_3_nano_4b import (
        nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config,
    )

    model = nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config().model
    weights = 3_973_556_832 - 131_072 * model.hidden_size  # as built and counted, test_offline_recipes.py
    met = mixers(Fields.of(model))
    assert met.weights + 131_072 * model.hidden_size == pytest.approx(weights, rel=1e-3)
    assert closed_forms.flops_per_token(model, vocab_size=131_072) == pytest.approx(6 * weights, rel=0.05)
    assert closed_forms.flops_per_token(model, vocab_size=131_072) > 6 * weights


@pytest.mark.parametrize(
    ("modules", "part"),
    [([], 0), (None, 2 * 32 * 8192 * 4096), (["mlp"], 2 * 32 * 3 * 4096 * 14_336), (["layernorm"], 0)],
)
def test_what_is_recomputed_costs_its_forward_pass_again(llama, modules, part):
    """No module named means attention, an empty list means nothing."""
    cfg = memory.with_layout(llama, recompute_granularity="selective", recompute_modules=modules)
    assert ceiling._repeated_flops_per_token(cfg) == pytest.approx(part)
    sparse = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 4096}
    sparse = memory.with_layout(cfg, **sparse, recompute_modules=["moe"])
    assert ceiling._repeated_flops_per_token(sparse) == 2 * 32 * 4096 * (2 * 3 * 4096 + 8)
    with pytest.raises(ValueError, match="operations of mla_up_proj are not counted"):
        ceiling._repeated_flops_per_token(memory.with_layout(cfg, recompute_modules=["mla_up_proj"]))


def test_a_ceiling_is_above_every_published_run(llama):
    """Nobody published more in BF16 than the data sheet allows, and TP's messages lower the ceiling."""
    gpu = ceiling.gpus()["H100 SXM 80GB"]
    rates = []
    for tp in (1, 2, 4, 8):
        cfg = memory.with_layout(llama, tp=tp, sequence_parallel=tp > 1)
        rates.append(ceiling.of(cfg, ranks=8, gpu=gpu, vocab_size=128_256).tokens_per_second_per_gpu)
    assert rates == sorted(rates, reverse=True)
    published = ceiling.published()
    runs = published[published.precision == "bf16"]
    assert len(runs) >= 3 and (runs.tokens_per_second_per_gpu < rates[0]).all()
    assert all(published.source) and all(gpu.source for gpu in ceiling.gpus().values())


@pytest.mark.parametrize(
    ("fields", "bubble", "repeated"),
    [
        ({}, 0, lambda layers: 0),
        ({"pp": 4}, 3 / 64, lambda layers: 0),
        ({"pp": 4, "virtual_pipeline_model_parallel_size": 2}, 3 / 128, lambda layers: 0),
        ({**AGAIN, "recompute_method": "uniform"}, 0, lambda layers: layers / 3),
        ({"pp": 4, **AGAIN, "recompute_method": "block"}, 3 / 64, lambda layers: layers / 3 * 2 / 8),
        ({**PARTS, "recompute_modules": ["mlp"]}, 0, lambda layers: 2 * 32 * 3 * 4096 * 14336),
        ({**PARTS, "recompute_modules": ["core_attn"]}, 0, lambda layers: 2 * 32 * 8192 * 32 * 128),
    ],
)
def test_a_ceiling_is_operations_bubble_and_messages(llama, fields, bubble, repeated):
    """Each second of a ceiling by hand: the pipeline's bubble, what recomputation repeats, and messages over the link."""
    gpu = ceiling.Gpu("round numbers", 0, 1e15, 1e11, "none")
    cfg = memory.with_layout(llama, **fields)
    found = ceiling.of(cfg, ranks=8, gpu=gpu, vocab_size=128_256)
    layers, tokens = closed_forms.flops_per_token(cfg, vocab_size=0), 128 * 8192
    output = 6 * 4096 * 128_256  # on the last stage alone, and the others wait for it
    operations = layers + repeated(layers) + output * cfg.model.pipeline_model_parallel_size
    assert found.compute_seconds == pytest.approx(operations * tokens / 8e15 * (1 + bubble), rel=1e-9)
    sent = ceiling.sent_bytes(cfg, ranks=8)
    assert found.tensor_seconds == pytest.approx((sent["tensor"] + sent["pipeline"]) / 1e11, rel=1e-9)
    assert found.data_seconds == pytest.approx((sent["data"] + sent["context"]) / 1e11, rel=1e-9)
    step_seconds = max(found.compute_seconds, found.data_seconds) + found.tensor_seconds
    assert found.tokens_per_second_per_gpu == pytest.approx(tokens / step_seconds / 8, rel=1e-9)


def test_messages_are_those_of_the_closed_form(llama):
    """The planner adds up the operations that recorded runs are held to; CP and recomputation come on top."""
    cut = memory.with_layout(llama, tp=2, sequence_parallel=True)
    sent = ceiling.sent_bytes(cut, ranks=8)
    rows = messages.by_group(messages.expected(cut, ranks=8, element_bytes=2, gradient_bytes=4)).sent_bytes
    assert sent["tensor"] == rows["tp"] and sent["data"] == rows["dp-cp"]
    stream, microbatches = 8192 * 4096 * 2, 128 / 4
    by_hand = microbatches * 32 * 4 * stream  # two all-reduces a layer each way, at TP=2 one stream each
    assert sent["tensor"] > by_hand and sent["pipeline"] == sent["context"] == 0
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    repeated = ceiling.sent_bytes(memory.with_layout(llama, tp=2, sequence_parallel=True, **again), ranks=8)
    assert sent["tensor"] < repeated["tensor"] < 1.5 * sent["tensor"]
    whole, ring = (ceiling.sent_bytes(memory.with_layout(llama, cp=cp), ranks=8) for cp in (1, 2))
    assert ring["data"] == whole["data"] and ring["tensor"] == 0
    assert (
        ring["context"] == 32 * 32 * 3 * 4096 * 2 * 8 * 128 * 2
    )  # micro-batches, layers, three passes, keys and values


def test_the_planner_shows_what_fits_and_what_cannot_be(llama):
    """The controls draw a frame and the Bridge code at once; an impossible layout becomes its reason."""
    panel = controls.panel({"llama3_8b_pretrain_config": llama})
    tp = panel.children[0].children[1]
    picture, code = panel.children[2:]
    assert picture.value[:4] == b"\x89PNG" and "tensor_model_parallel_size = 2" in code.value
    tp.value = 8
    assert "tensor_model_parallel_size = 8" in code.value
    panel.children[0].children[3].value = 8  # CP=8 with TP=8 on 8 ranks
    assert picture.value == b"" and "cannot be divided" in code.value and "choose 1" in code.value


def test_frames_are_stepped_through_without_a_kernel(llama):
    """Buttons and frames are linked in the browser; each frame holds its picture, its words and its Bridge code."""
    import ipywidgets

    cfgs = {"whole": llama, "TP=2": memory.with_layout(llama, tp=2, sequence_parallel=True)}
    plans = {label: memory.plan(cfg, ranks=8) for label, cfg in cfgs.items()}
    choices = {label: ("llama3_8b_pretrain_config", cfg) for label, cfg in cfgs.items()}
    panel = controls.frames(choices, plans, gpu=ceiling.gpus()["H100 SXM 80GB"])
    buttons, stack = panel.children
    links = [one for one in ipywidgets.Widget.get_manager_state()["state"].values() if one["model_name"] == "LinkModel"]
    ends = [(f"IPY_MODEL_{one.model_id}", name) for one, name in ((buttons, "index"), (stack, "selected_index"))]
    assert any([tuple(one["state"][end]) for end in ("source", "target")] == ends for one in links)
    whole, half = (frame.value for frame in stack.children)
    assert "data:image/png;base64," in whole and 'alt="Planned GiB of the fullest rank: TP=2' in half
    assert "tensor_model_parallel_size = 2" in half and "tensor_model_parallel_size = 1" in whole
    room = usable.of(llama, ranks=8).usable_bytes / 2**30
    assert f"A plan may use {room:.1f} GiB" in whole, "a frame's limit is not the one that the lesson argues with"


def test_a_bar_that_does_not_fit_says_so(llama):
    """8B at TP=1 is marked, in words too, and TP=2 is not."""
    from matplotlib.figure import Figure

    plans = {
        "whole": memory.plan(llama, ranks=8),
        "cut": memory.plan(memory.with_layout(llama, tp=2, sequence_parallel=True), ranks=8),
    }
    ax = parallelism.plans(plans, gpu=ceiling.gpus()["H100 SXM 80GB"], ax=Figure().subplots())
    texts = [text.get_text() for text in ax.texts]
    assert "does not fit" in texts[0] and "fit" not in texts[1]


def test_a_run_that_measured_nothing_is_refused(tmp_path):
    """Reading tensors of an ordinary run says how to measure them."""
    from course_lib import runs

    (tmp_path / "ranks").mkdir()
    with pytest.raises(ValueError, match="target=tensors.TARGET"):
        tensors.read(runs.Run(tmp_path))


@pytest.mark.parametrize(("precision", "recompute"), [("fp32", "nothing"), ("bf16_mixed", "norms")])
def test_the_planners_code_gives_the_plan_that_is_shown(llama: Any, precision: str, recompute: str) -> None:
    """Pasted below a recipe that recomputes and trains in bf16, the lines give the same bytes as the picture."""
    base = memory.with_layout(llama, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    recipe = changed(
        base, {"tokenizer.vocab_size": 32_000}
    )  # the recipe's own stand-in; the plan is made for Llama's ids
    choice = {"tp": 2, "pp": 1, "cp": 1, "sequence": 2048, "micro": 1, "batch": 16}
    choice |= {"precision": precision, "recompute": next(iter(k for k in controls.RECOMPUTE if recompute in k))}
    shown = controls.chosen(base, choice)
    names: dict[str, Any] = {"recipe": lambda: recipe}
    exec(controls.bridge_code("recipe", shown), names)  # noqa: S102
    pasted = names["cfg"]
    assert memory.plan(pasted, ranks=8) == memory.plan(shown, ranks=8)
    assert pasted.model.recompute_granularity == shown.model.recompute_granularity
    assert meta_model.precision(pasted).weights == (4 if precision == "fp32" else 2)


def test_what_cannot_be_planned_says_what_to_set(llama: Any) -> None:
    """Without a number of ids, or with a pipeline plan that interleaves unsaid, nothing is guessed."""
    unknown = changed(llama, {"model.vocab_size": None, "tokenizer.vocab_size": None})
    with pytest.raises(ValueError, match="set cfg.tokenizer.vocab_size or cfg.model.vocab_size"):
        memory.states(unknown, ranks=8)
    interleaved = memory.with_layout(llama, pp=2, num_layers=4, pipeline_model_parallel_layout="Et|t|t|tL")
    for planned in (memory.states, messages.expected):
        with pytest.raises(ValueError, match="interleaves: set virtual_pipeline"):
            planned(interleaved, ranks=8)


@pytest.mark.parametrize(("stored", "dropped", "weight_bytes"), [(0, 0, 4), (0, 1, 2), (1, 0, 2), (1, 1, 1)])
def test_a_weight_multiplied_in_eight_bits_has_its_copies(stored: int, dropped: int, weight_bytes: int) -> None:
    """Two bytes or one, and beside them one byte for each pass: both are copies of a bf16 weight, one of a stored fp8 one."""
    model = SimpleNamespace(fp8_param=bool(stored), disable_parameter_transpose_cache=bool(dropped))
    assert memory._eight_bit_weight_bytes(model) == weight_bytes


ADAM = {"use_distributed_optimizer": True, "optimizer": "adam", "bf16": True, "fp16": False, "fp8_recipe": None}
ADAM |= {"use_precision_aware_optimizer": False, "optimizer_cpu_offload": False, "store_param_remainders": True}
ADAM |= {f"{name}_dtype": "float32" for name in ("exp_avg", "exp_avg_sq", "main_params")}
AWARE = {"use_precision_aware_optimizer": True}
HALF_AWAY = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}


@pytest.mark.parametrize(
    ("weights", "fields", "each"),
    [
        ("bfloat16", {}, 8 + 4),
        ("float32", {}, 8),
        ("bfloat16", {"use_distributed_optimizer": False}, 8 + 4),
        ("bfloat16", {"use_distributed_optimizer": False, "bf16": False}, 8),
        ("bfloat16", {"optimizer": "sgd"}, 4 + 4),
        ("bfloat16", {"optimizer": "lion"}, 4 + 4),
        ("bfloat16", AWARE, 8 + 2),  # a bf16 weight and 16 bits more are its fp32 copy
        ("float16", AWARE, 8 + 4),
        ("bfloat16", AWARE | {"store_param_remainders": False}, 8 + 4),
        ("bfloat16", AWARE | {"main_params_dtype": "float16"}, 8 + 2),
        ("bfloat16", AWARE | {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "uint8"}, 3 + 2),
        ("bfloat16", AWARE | {"fp8_recipe": "delayed"}, 8 + 2),
        ("bfloat16", AWARE | {"fp8_recipe": "tensorwise"}, 8 + 4),
        ("bfloat16", HALF_AWAY, 4 + 4),
        ("bfloat16", HALF_AWAY | AWARE, 4 + 2),
    ],
)
def test_an_optimizer_keeps_moments_and_a_copy(bridge: Any, weights: str, fields: dict[str, Any], each: float) -> None:
    """Bytes of a parameter that it steps: which of Core, Adam and the CPU has the copy decides over its size."""
    import torch

    values = {name: getattr(torch, v) if name.endswith("_dtype") else v for name, v in (ADAM | fields).items()}
    assert memory._optimizer_bytes(SimpleNamespace(**values), weights=getattr(torch, weights)) == each

"""Every claim of a check cell of lesson 16 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace as Some

import pandas as pd
import pytest
import torch

from course_lib import runs
from course_lib.common import units
from support.lesson_cells import falsify, gives, tagged


def trained(*losses):
    """A run with these losses."""
    return Some(metrics=pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses, "grad_norm": 1.0}))


def table(equal=True):
    """A comparison with the closed form."""
    row = {"phase": "forward", "operation": "all_to_all", "group": "ep", "bytes": 8, "why": "tokens"}
    return pd.DataFrame([row | {"expected": 2, "recorded": 2 if equal else 3}])


def load(*rows):
    """Loads of four experts, a row a step and layer."""
    index = pd.MultiIndex.from_product([range(1, len(rows) // 2 + 1), (1, 2)], names=["step", "layer"])
    return pd.DataFrame(rows, index=index)


def lesson():
    """Facts of lesson 16, and for each cell what may be wrong with them."""
    yield from counts()
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.0, 1.0, 0.9, 3.0]])
    score = logits.sigmoid()
    own = torch.tensor([[True, True, False, False], [False, True, False, True]])
    moved = torch.tensor([[True, False, True, False], [False, False, True, True]])
    weights = {name: (score * mask) / (score * mask).sum(1, keepdim=True) for name, mask in
               {"softmax": own, "sigmoid": own, "sigmoid, bias": moved}.items()}  # fmt: skip
    chosen = {"softmax": own, "sigmoid": own, "sigmoid, bias": moved}

    def routing(weights=weights, chosen=chosen):
        def route(_logits, _top_k, *, score_function, expert_bias=None):
            name = score_function if expert_bias is None else f"{score_function}, bias"
            return weights[name], chosen[name]

        return {"moe_utils": Some(topk_routing_with_score_function=route)}

    counted = (score + torch.tensor([0.0, 0.0, 0.5, 0.0])) * moved
    by_bias = weights | {"sigmoid, bias": counted / counted.sum(1, keepdim=True)}
    wrong = [
        routing(weights={name: one * 2 for name, one in weights.items()}),
        routing(chosen=chosen | {"sigmoid, bias": own}),
        routing(weights=by_bias),
    ]
    yield "check-router", {"torch": torch, "top_k": 2, **routing()}, wrong
    even, one = load([4, 4, 4, 4], [4, 4, 4, 4]), load([16, 0, 0, 0], [16, 0, 0, 0])
    names = ("no balancing", "auxiliary loss", "bias")
    busy = {"no balancing": 4.0, "auxiliary loss": 2.0, "bias": 2.0}
    frames = {name: pd.DataFrame({1: [1.0], 2: [value]}) for name, value in busy.items()}
    loads = {"loads": dict(zip(names, (one, even, even), strict=True)), "busiest": frames}
    collapsed = [{"busiest": frames | {name: frames["no balancing"]}} for name in names[1:]]
    lost = {"loads": loads["loads"] | {"bias": even - 1}}
    spread = {"loads": loads["loads"] | {"no balancing": even}}
    facts = {"pd": pd, "tokens_a_step": 8, "top_k": 2, "steps": 1, "num_experts": 4, **loads}
    yield "check-load", facts, [lost, spread, *collapsed]
    yield from sent()
    nano = Some(num_moe_experts=32, expert_model_parallel_size=2)
    grouped = {"nano": nano, "sparse_layers": 1, "pd": pd, "steps": 1, "loads": {"no balancing": one}}
    grouped |= {"recipe": Some(model=Some(moe_grouped_gemm=True)), "stack": Some(device=gives("cpu"))}
    changed = pd.DataFrame(index=["model.moe_grouped_gemm"])
    wrong = [{"launch": Some(differences=gives(changed[:0]))}, {"recipe": Some(model=Some(moe_grouped_gemm=False))}]
    yield "check-grouped", grouped | {"launch": Some(differences=gives(changed))}, wrong
    yield from pays()
    parts = ["weights", "gradients", "optimizer", "planned"]
    planned = pd.DataFrame({"8 GPUs": [11, 11, 44, 85], "16 GPUs": [11, 11, 22, 63]}, index=parts)
    plan = {"rest": 80, "held": Some(expert_parameters=20, optimizer_bytes=360), "planned": planned}
    wrong = [
        {"held": Some(expert_parameters=20, optimizer_bytes=200)},
        {"planned": planned.assign(**{"8 GPUs": [11, 11, 44, 70]})},
        {"planned": planned.assign(**{"16 GPUs": [11, 11, 30, 63]})},
        {"planned": planned.assign(**{"16 GPUs": [11, 11, 22, 75]})},
    ]
    yield "check-plan", plan, wrong
    yield from sends()


def counts():
    """A model of four sparse layers of sixteen experts of ten weights, on eight ranks; a token visits six."""
    nano = Some(num_moe_experts=16, moe_router_topk=6, moe_ffn_hidden_size=1, hybrid_layer_pattern="EEEE")
    cfg = Some(tokenizer=Some(), model=nano)
    recipe = "nemotron_3_nano_pretrain_8gpu_h100_bf16_config"
    held = Some(expert_parameters=80, parameters=3_580_000_000 - 640 + 400 + 80)
    facts = {
        "recipes": Some(offline=contextlib.nullcontext),
        "nemotron_3_nano": Some(**{recipe: gives(cfg)}),
        "closed_forms": Some(feed_forward_weights=gives(10)),
        "memory": Some(states=gives([held])),
        "published_active": 3.6,
    }
    wrong = [{"closed_forms": Some(feed_forward_weights=gives(11))}, {"published_active": 3.2}]
    yield "check-count", facts, wrong


def sent():
    """Messages of eight ranks in both forms, and where the choices arrived."""
    small = {"train": Some(micro_batch_size=2), "model": Some(seq_length=4), "scheduler": Some()}
    arrived = [[16, 10]] * 4 + [[16, 22]] * 4

    def messages_of(*, equal=True, gather=390, arrived=arrived):
        def recorded(run):
            return pd.DataFrame({"group": ["ep"], "bytes": [gather if run is gathering else 100]})

        compared = Some(compare=gives(table(equal)), recorded=recorded)
        return {"collectives": compared, "experts": Some(arriving=lambda _run, rank: arrived[rank])}

    gathering = trained(3.0, 2.0)
    facts = {
        "copy": copy,
        "cfg": Some(**small),
        "top_k": 2,
        "stack": Some(device=gives("cpu")),
        "launch": Some(run=gives(gathering)),
        "tables": Some(full=gives(None)),
        **messages_of(),
    }
    yield "check-send", facts, [messages_of(equal=False), messages_of(arrived=[[16, 10]] * 8)]
    more = {"runs": runs, "units": units, "cfg_sent": Some(**small), "run_sent": trained(3.0, 2.0)}
    more["messages"] = Some(by_group=lambda rows: Some(sent_bytes=rows.bytes))
    wrong = [{"run_sent": trained(3.0, 2.1)}, messages_of(equal=False), messages_of(gather=100)]
    yield "check-gather", facts | more, wrong


def sends():
    """What the experts of the plan send: two tokens a rank, one expert each in one layer of four channels."""
    run = Some(train=Some(global_batch_size=8), model=Some(seq_length=2, moe_token_dispatcher_type="flex"))
    facts = {
        "copy": copy,
        "units": units,
        "cfg_nano": Some(**vars(run), tokenizer=Some(vocab_size=8)),
        "nano": Some(moe_router_topk=1, hidden_size=4),
        "sparse_layers": 1,
    }

    def planned(experts=84.0, data=0.5, seconds=9.0):
        best = Some(tensor_seconds=seconds, compute_seconds=26.0)
        sent = {"experts": experts, "data": data}
        return {"ceiling": Some(sent_bytes=gives(sent), gpus=gives({"H100 SXM 80GB": None}), of=gives(best))}

    wrong = [planned(experts=70.0), planned(data=2.0), planned(seconds=2.0)]
    yield "check-sends", facts | planned(), wrong


def pays():
    """The verdict on sparse against dense."""
    pair = Some(verdict="no difference beyond noise", difference=0.01, noise=0.1, before=[5.0] * 3, after=[5.0] * 3)
    models = {
        "cfg_dense": Some(model=Some(ffn_hidden_size=128)),
        "cfg_sparse": Some(model=Some(moe_ffn_hidden_size=64)),
    }
    facts = {"pair": pair, "top_k": 2, "differences": [0.1, 0.2, -0.1], "seeds": [1, 2, 3], **models}
    better = Some(**vars(pair) | {"verdict": "better"})
    yield (
        "check-pay",
        facts,
        [
            {"pair": better},
            {"cfg_dense": Some(model=Some(ffn_hidden_size=256))},
            {"differences": [-0.1, -0.2, 0.1]},
        ],
    )
    rows = pd.DataFrame({"steps": [30, 200, 200], "difference": [0.1, -0.1, -0.2], "paired_noise": [0.05, 0.2, 0.1]})
    rows = rows.assign(text="standard library", hidden=[64, 64, 128], dense=[[5.0], [4.0], [4.3]], sparse=4.0)

    def shows(**changed):
        return {"tables": Some(published=gives(rows.assign(**changed)), full=gives(None))}

    wrong = [shows(paired_noise=0.3), shows(difference=[0.1, 0.3, -0.2]), shows(dense=[[5.0], [4.0], [3.9]])]
    yield "longer", shows(), wrong


CELLS = {cell: (facts, wrong) for cell, facts, wrong in lesson()}


@pytest.mark.parametrize("name", CELLS)
def test_each_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """With right facts all claims of the cell hold; for each claim one of the wrong facts makes it fail."""
    falsify("16", name, *CELLS[name])


def test_no_check_cell_is_left_out():
    """Every check cell of the lesson stands in the table above."""
    assert tagged("16", "check") <= CELLS.keys()


def test_on_gpus_the_dispatchers_may_differ_by_the_sums_of_bf16():
    """There the messages of the experts alone are in the form, and losses of two dispatchers are not equal in fp32."""
    gathered, wrong = CELLS["check-gather"]
    falsify(
        "16", "check-gather", gathered | {"stack": Some(device=gives("cuda")), "run_sent": trained(3.0, 2.01)}, wrong
    )

"""The layout arithmetic as a learner meets it: refusals that name the field and the fix, and legal layouts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest

from course_lib.planning import layout
from course_lib.planning.layout import Layout, LayoutError
from support.layouts import LLAMA, reasons, sizes


def test_layout_needs_no_torch() -> None:
    """A layout is refused before anything heavy is imported."""
    code = "import sys; from course_lib.planning import layout; layout.check({'num_layers': 4}, 8); "
    code += "print([name for name in ('torch', 'megatron', 'numpy', 'pandas') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize(
    ("changed", "ranks", "expected"),
    [
        (sizes(3), 24, "model.tensor_model_parallel_size: TP=3 does not divide 8 query heads: choose 1, 2, 4 or 8"),
        (sizes(3), 9, "model.tensor_model_parallel_size: TP=3 does not divide 8 query heads: choose 1"),
        (sizes(3), 8, "8 ranks cannot be divided into groups of TP=3 x PP=1 x CP=1 = 3"),
        (sizes(pipeline=3), 12, "PP=3 does not divide 4 layers: choose 1, 2 or 4 (or give num_layers_in_first/last"),
        (sizes(2, expert=2), 8, "EP=2, but the model has no experts: choose 1"),
        (sizes(2) | {"ffn_hidden_size": 129}, 8, "ffn_hidden_size=129: choose 128 or 130 (multiples of 2)"),
        (sizes(4) | {"vocab_size": 1002}, 8, "TP=4 does not divide the 1002 rows of the embedding: choose 1024"),
        (sizes(context=4) | {"seq_length": 12}, 8, "model.seq_length: CP=4 cuts a sequence into 2 x 4 pieces"),
        (sizes(2) | {"num_moe_experts": 4}, 8, "model.sequence_parallel: experts with TP=2 train only with sequence"),
        (sizes(0), 8, "model.tensor_model_parallel_size: 0 is not a number of ranks: give a whole number"),
        (sizes(1) | {"pipeline_model_parallel_size": "2"}, 8, "'2' is not a number of ranks"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            8,
            "VPP=2 interleaves pipeline stages, but PP=1 has one stage: choose None",
        ),
        (sizes(pipeline=2) | {"virtual_pipeline_model_parallel_size": 1}, 8, "interleaves nothing: choose None or 2"),
        ({"num_layers": 0}, 8, "model.num_layers: 0 is not a size: give a whole number of at least 1"),
        ({"hidden_size": True}, 8, "model.hidden_size: True is not a size"),
        ({"vocab_size": 0}, 8, "model.vocab_size: 0 is not a size"),
        ({"seq_length": -1}, 8, "model.seq_length: -1 is not a size"),
        ({}, "8", "ranks: '8' is not a number of ranks"),
        (
            sizes(2, context=2) | {"sequence_parallel": True, "seq_length": 4098},
            8,
            "which do not divide 4098 tokens: choose 4096 or 4100 (multiples of 4)",
        ),
        (
            sizes(8, context=1) | {"sequence_parallel": True, "seq_length": 4100},
            8,
            "among TP=8 ranks: choose 4096 or 4104 (multiples of 8)",
        ),
    ],
)
def test_a_refusal_names_field_collision_and_fix(changed: dict[str, Any], ranks: int, expected: str) -> None:
    """Each refusal says which field, what it collides with, and what to choose."""
    assert any(expected in reason for reason in reasons(LLAMA | changed, ranks)), reasons(LLAMA | changed, ranks)


def test_two_interleaved_stages_do_not_batch_over_nccl(bridge, runs_directory) -> None:
    """What Megatron-LM's own arguments refuse, Bridge trains wrong on GPUs; ranks on a CPU have tags, from a file as well."""
    from megatron.bridge.training.comm_overlap import CommOverlapConfig

    from course_lib import launch
    from support.small import config

    cfg = config(tp=1, pp=2, model__virtual_pipeline_model_parallel_size=2)
    (reason,) = reasons(cfg, 2)
    assert reason.startswith("model.batch_p2p_comm: VPP=2 over PP=2 takes gradients for activations")
    assert reason.endswith("set model.batch_p2p_comm to False and model.overlap_p2p_comm to True")
    assert launch.prepare(launch.prepare(cfg, ranks=2).path / "config.yaml", ranks=2).config["model"]["batch_p2p_comm"]
    cfg.model.batch_p2p_comm, cfg.model.overlap_p2p_comm = False, True
    assert not reasons(cfg, 2)
    cfg.model.batch_p2p_comm, cfg.comm_overlap = True, CommOverlapConfig(tp_comm_overlap=False)
    assert not reasons(cfg, 2), "Bridge overlaps them"
    cfg.comm_overlap.batch_p2p_comm = True
    assert reasons(cfg, 2)
    cfg = config(tp=1, pp=4, model__virtual_pipeline_model_parallel_size=2, model__num_layers=8)
    assert not reasons(cfg, 4) and not reasons(config(tp=1, pp=2), 2)


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
    with pytest.raises(LayoutError, match="'8' is not a number of ranks"):
        layout.legal_layouts("8", LLAMA)
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


def test_mamba_refusals_name_heads_and_groups() -> None:
    """A hybrid model shares its Mamba heads and state groups among TP and CP ranks; dense models are not asked."""
    hybrid = LLAMA | {"hybrid_layer_pattern": "M-M*", "mamba_num_heads": 6, "mamba_num_groups": 2}
    assert reasons(hybrid | sizes(2), 2) == []
    assert any("TP=4 does not divide 6 Mamba heads" in reason for reason in reasons(hybrid | sizes(4), 4))
    assert reasons(LLAMA | {"mamba_num_heads": 6} | sizes(4), 4) == []
    hybrid |= {"mamba_num_heads": 12, "mamba_num_groups": 8}
    assert any("8 Mamba state groups do not divide 12 Mamba heads" in reason for reason in reasons(hybrid, 1))
    hybrid |= {"mamba_num_heads": 24, "num_attention_heads": 8}
    assert reasons(hybrid | sizes(2, context=4), 8) == []
    assert any(
        "CP=8 does not share 12 Mamba heads in 4 groups" in one for one in reasons(hybrid | sizes(2, context=8), 16)
    )


def changed_by(cfg: dict[str, Any], ranks: int, change: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A configuration as somebody leaves it who does what a refusal proposes."""
    new = {section: dict(values) for section, values in cfg.items()}
    for name, value in change.items():
        if name != "ranks":
            section, field = name.split(".")
            new[section][field] = value
    return new, change.get("ranks", ranks)


def random_configuration(choose: random.Random) -> tuple[dict[str, Any], int]:
    """Sizes of which most do not fit together."""
    experts = choose.choice([None, None, 4, 6, 8])
    model = LLAMA | sizes(*(choose.choice([1, 1, 2, 3, 4, 8]) for _ in range(3)), choose.choice([1, 1, 2, 4]))
    model |= {
        "num_layers": choose.choice([4, 6, 8, 30]),
        "num_attention_heads": choose.choice([6, 8, 16]),
        "num_query_groups": choose.choice([None, 1, 2, 4, 5]),
        "ffn_hidden_size": choose.choice([None, 128, 129, 250]),
        "seq_length": choose.choice([62, 64, 100, 4098]),
        "vocab_size": choose.choice([None, 500, 1002, 1024]),
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": choose.choice([None, 96, 33]) if experts else None,
        "moe_shared_expert_intermediate_size": choose.choice([None, 98]) if experts else None,
        "add_bias_linear": choose.choice([True, False]),
        "expert_tensor_parallel_size": choose.choice([None, None, 1, 2]) if experts else None,
        "sequence_parallel": choose.choice([True, False]),
        "virtual_pipeline_model_parallel_size": choose.choice([None, None, 1, 2, 3]),
        "microbatch_group_size_per_vp_stage": choose.choice([None, None, 1, 3, 5]),
        "account_for_embedding_in_pipeline_split": choose.choice([False, False, True]),
        "account_for_loss_in_pipeline_split": choose.choice([False, False, True]),
        "num_layers_in_first_pipeline_stage": choose.choice([None, None, None, 0, 1, 3]),
        "num_layers_in_last_pipeline_stage": choose.choice([None, None, None, 1, 2]),
        "transformer_impl": choose.choice(["local", "transformer_engine"]),
    }
    cfg = {
        "model": model,
        "train": {
            "global_batch_size": choose.choice([1, 4, 5, 8, 12]),
            "micro_batch_size": choose.choice([1, 1, 2, 3]),
        },
        "validation": {"eval_global_batch_size": choose.choice([None, None, 4, 7])},
        "dataset": {"seq_length": choose.choice([None, model["seq_length"], 64])},
        "tokenizer": {"vocab_size": choose.choice([None, 900])},
        "dist": {"distributed_backend": choose.choice(["gloo", "nccl"])},
    }
    return cfg, choose.choice([1, 2, 4, 6, 8, 12, 16])


def test_what_a_refusal_proposes_is_accepted() -> None:
    """Each change of each refusal takes it away and brings up no other; the first of each, in turn, ends in a legal layout."""
    choose, seen = random.Random(0), Counter()
    for number in range(120):
        cfg, ranks = random_configuration(choose)
        found, steps = layout.check(cfg, ranks), 0
        kinds = {refusal.kind for refusal in found}
        for refusal in found:
            assert refusal.changes, f"{number}: {refusal}"
            for change in refusal.changes:
                left = {other.kind for other in layout.check(*changed_by(cfg, ranks, change))}
                assert left < kinds and refusal.kind not in left, f"{number}: {refusal}\n{change} leaves {left - kinds}"
                seen[refusal.field] += 1
        while found:
            cfg, ranks = changed_by(cfg, ranks, found[0].changes[0])
            found, steps = layout.check(cfg, ranks), steps + 1
            assert steps < 20, f"{number}: no end: {found}"
    assert len(seen) > 14 and min(seen.values()) > 2, seen

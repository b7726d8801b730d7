"""The layout arithmetic as a learner meets it: refusals that name the field and the fix, and legal layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
from layouts import LLAMA, reasons, sizes

from course_lib import layout
from course_lib.layout import Layout, LayoutError


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


def test_mamba_refusals_name_heads_and_groups() -> None:
    """A hybrid model shares its Mamba heads and state groups among the TP ranks; dense models are not asked."""
    hybrid = LLAMA | {"hybrid_layer_pattern": "M-M*", "mamba_num_heads": 6, "mamba_num_groups": 8}
    assert reasons(hybrid | sizes(2), 2) == []
    assert any("TP=4 does not divide 6 Mamba heads" in reason for reason in reasons(hybrid | sizes(4), 4))
    assert reasons(LLAMA | {"mamba_num_heads": 6} | sizes(4), 4) == []

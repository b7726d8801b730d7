"""Every family of Megatron-Bridge's pretraining recipes trains on CPU ranks with its sizes made small, or is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from course_lib import launch, runs
from course_lib.common.project import DATA
from course_lib.planning import memory, meta_model
from course_lib.recipes import catalogue
from support import families

FILE = DATA / "recipe_families.json"
ROWS = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
# The layout and layers with which a recipe runs here; one rank for each expert or matrix part, else plain data parallel.
LAYOUTS: dict[str, dict[str, Any]] = {
    "deepseek_v2_lite": {"tensor": 2},
    "deepseek_v3": {"expert": 2},
    "glm45_air_106b": {"pipeline": 2},
    "olmoe_7b": {"expert": 2},
    "qwen3_30b_a3b": {"expert": 2},
    "qwen3_next_80b_a3b": {"layers": 4},
    "nemotron_3_nano": {"pattern": "MEM*E", "expert": 2},
    "nemotron_3_nano_4b": {"pattern": "M-M*-"},
    "nemotron_3_super": {"pattern": "MEM*E", "tensor": 2},
    "nemotron_3_ultra": {"pattern": "ME|M*E", "pipeline": 2},
    "nemotron_nano_9b_v2": {"pattern": "M-*-", "tensor": 2},
    "nemotronh_4b": {"pattern": "M-*-"},
}
# What a refusal proposes, tried.
INSTEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kimi_k2": ({}, {"optimizer": "adam"}),
}


def of(recipe: str, table: dict[str, Any], default: Any) -> Any:
    """The entry of a table whose key the recipe's name begins with."""
    return next((value for key, value in table.items() if recipe.startswith(f"{key}_pretrain")), default)


def outcome(row: dict[str, Any]) -> dict[str, Any]:
    """A row as this machine finds it: the recipe is called, made small and trained for two steps on two ranks."""
    recipe = row["recipe"].partition(":")[2]
    try:
        cfg = families.shrink(families.build(row["recipe"]), **of(recipe, LAYOUTS, {}))
    except OSError as error:
        asked = str(error).split()[0]
        because = f"the recipe itself asks the Hub for {asked}, and recipes.offline() answers for shapes of models only"
        return {"family": row["family"], "recipe": row["recipe"], "runs": False, "because": because}
    try:
        run = launch.run(cfg, ranks=2, name=row["family"], show=None)
    except launch.ConfigError as error:
        return {"family": row["family"], "recipe": row["recipe"], "runs": False, "because": str(error)}
    assert run.metrics.step.tolist() == [1, 2]
    rows = run.config["model"]["vocab_size"]
    for loss, norm in zip(run.metrics.loss, run.metrics.grad_norm, strict=True):
        assert abs(loss - math.log(rows)) < 0.2 and 0 < norm < 100, (loss, norm)
    return {"family": row["family"], "recipe": row["recipe"], "runs": True, "because": ""}


def test_every_family_has_a_row() -> None:
    """Each folder of recipes with a pretraining recipe stands in the table, and each row's recipe exists."""
    entries = [entry for entry in catalogue.entries() if entry.task == "pretrain"]
    assert {row["family"] for row in ROWS} == {entry.family for entry in entries}
    assert {row["recipe"] for row in ROWS} <= {entry.path for entry in entries}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["recipe"].partition(":")[2])
def test_a_family_trains_or_is_refused_as_the_table_says(
    bridge: Any, runs_directory: Path, row: dict[str, Any]
) -> None:
    """Two steps near ln V with a finite gradient, or a refusal before there are ranks, in the words of the table."""
    assert outcome(row) == row
    assert row["runs"] or not list(runs_directory.glob("*/launch.json"))


@pytest.mark.parametrize("recipe", INSTEAD)
def test_what_a_refusal_proposes_trains(bridge: Any, runs_directory: Path, recipe: str) -> None:
    """Adam where the recipe asks for Muon."""
    row = next(row for row in ROWS if of(row["recipe"].partition(":")[2], {recipe: True}, False))
    sizes, optimizer = INSTEAD[recipe]
    cfg = families.shrink(families.build(row["recipe"]), **sizes)
    for name, value in optimizer.items():
        setattr(cfg.optimizer, name, value)
    assert not row["runs"] and launch.run(cfg, ranks=2, show=None).outcome.status == "succeeded"


@pytest.mark.parametrize(
    "recipe", ["deepseek_v3", "gemma3_1b", "qwen3_600m", "qwen3_next_80b_a3b", "gpt_oss_20b"], ids=lambda recipe: recipe
)
def test_two_tensor_parallel_ranks_train_the_same_model(bridge: Any, runs_directory: Path, recipe: str) -> None:
    """From one checkpoint, with the sequence split too: losses and gradient norms of one rank, to 1e-5.

    Latent attention beside experts, norms counted from one behind a layer and in a window, norms of queries, a gated
    delta net, and experts with biases beside sinks.
    """
    path = next(row["recipe"] for row in ROWS if of(row["recipe"].partition(":")[2], {recipe: True}, False))

    def config(steps: int, **layout: int) -> Any:
        cfg = families.shrink(families.build(path), layers=4 if "next" in recipe else 2, **layout)
        cfg.train.train_iters, cfg.scheduler.lr_decay_iters = steps, 10
        cfg.model.expert_tensor_parallel_size = 1 if cfg.model.add_bias_linear else None
        cfg.checkpoint.load_rng = cfg.checkpoint.load_optim = False
        return cfg

    start = launch.run(config(1), ranks=1, save=True, show=None)
    one, two = (launch.run(config(3, tensor=ranks), ranks=ranks, load=start, show=None) for ranks in (1, 2))
    assert one.metrics.step.tolist() == [2, 3] == two.metrics.step.tolist()
    assert runs.difference(one, two) < 1e-5


@pytest.mark.parametrize("row", [row for row in ROWS if row["runs"]], ids=lambda row: row["recipe"].partition(":")[2])
def test_a_family_that_trains_is_planned(bridge: Any, row: dict[str, Any]) -> None:
    """The planner builds the same specification on the meta device, or refuses it with a reason."""
    cfg = families.shrink(families.build(row["recipe"]), **of(row["recipe"].partition(":")[2], LAYOUTS, {}))
    cfg.model.cuda_graph_impl = "none"  # the pool of a graph is refused by name, and a CPU rank has none
    try:
        assert memory.plan(cfg, ranks=2).total_bytes > 12 * 64 * 512
    except memory.NotPlanned as refused:
        not_counted = (
            "experimental_attention_variant",
            "recompute_modules",
            "mtp",
            "transformer_impl",
            "full_layer_spec",
        )
        assert any(word in str(refused) for word in not_counted)


def test_a_published_model_has_its_parameters(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek V3 as published, 671 billion: norms that Transformer Engine keeps inside a layer are there, once."""
    monkeypatch.setitem(families.SHAPES, "deepseek-ai/DeepSeek-V3", {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    })  # fmt: skip
    recipe = next(row["recipe"] for row in ROWS if "deepseek_v3_pretrain" in row["recipe"])
    cfg = families.build(recipe)
    cfg.model.mtp_num_layers, cfg.tokenizer.vocab_size = None, 129_280
    for name in ("tensor", "pipeline", "expert"):
        setattr(cfg.model, f"{name}_model_parallel_size", 1)
    cfg.model.pipeline_model_parallel_layout, cfg.model.sequence_parallel = None, False
    hidden, heads = 7168, 128
    attention = (
        hidden * 1536 + 1536 + 1536 * heads * 192 + hidden * 576 + 512 + 512 * heads * 256 + heads * 128 * hidden
    )
    experts = 257 * 3 * hidden * 2048 + 256 * hidden
    expected = 61 * (attention + 2 * hidden) + 3 * 3 * hidden * 18432 + 58 * experts + hidden + 2 * 129_280 * hidden
    with meta_model.built(cfg, ranks=1) as chunks:
        named = {name: p.numel() * getattr(p, "stands_for", 1) for name, p in chunks[0].named_parameters()}
    assert sum(named.values()) == expected == 671_026_404_352
    assert named["decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight"] == 1536
    assert named["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"] == hidden


def test_what_has_no_local_form_says_so_when_it_is_used(bridge: Any) -> None:
    """No name of Core's wrappers is left a mock, which would take any argument and do nothing."""
    from unittest.mock import NonCallableMock

    from megatron.core.extensions import transformer_engine

    assert [n for n, value in vars(transformer_engine).items() if isinstance(value, NonCallableMock)] == []
    for use in (transformer_engine.TEDelayedScaling, transformer_engine.te.pytorch.Linear):
        with pytest.raises(RuntimeError, match="needs a package that is not installed here"):
            use()


def test_the_planner_takes_local_layers_where_transformer_engine_is_installed(
    bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node with GPUs, every module's wrapper is exchanged inside the block, and back after it."""
    from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider

    from course_lib.stack import local_layers, patches

    mine, real = transformer_engine.TELinear, type("TELinear", (), {})
    for module in (transformer_engine, transformer_engine_spec_provider):
        monkeypatch.setattr(module, "TELinear", real)
    with patches.applied(local_layers.patches()):
        assert transformer_engine.TELinear is transformer_engine_spec_provider.TELinear is mine
    assert transformer_engine.TELinear is transformer_engine_spec_provider.TELinear is real

"""Levers, usable memory and NVIDIA's own recipes: planned again, held to their closed forms, and to the installed source."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from typing import Any

import pytest

from book.builder import levers as lever_table
from book.builder import plan
from book.builder import recipes as recipe_table
from course_lib import recipes
from course_lib.common.config import UnknownField, diff
from course_lib.common.units import gib
from course_lib.planning import ceiling, closed_forms, fully_sharded, levers, memory, recipe_plans, usable


@pytest.fixture(scope="module")
def models(bridge: Any) -> dict[str, Any]:
    """NVIDIA's recipes for 1B, 3B and 8B as the page plans them."""
    return plan.models()


def lever(name: str) -> levers.Lever:
    """The lever whose name begins so."""
    return next(one for one in levers.LEVERS if one.name.startswith(name))


def test_the_levers_are_what_the_planner_computes(models: dict[str, Any]) -> None:
    """The rows of the largest model again; if upstream moved, `python -m book.builder.levers` writes the file again."""
    found, kept = lever_table.make({"8B": models["8B"]}), lever_table.read()
    assert found["source"] == kept["source"] and found["rows"] == [row for row in kept["rows"] if row["model"] == "8B"]
    assert {row["model"] for row in kept["rows"]} == set(models)


def test_gradients_follow_the_number_formats_object(models: dict[str, Any]) -> None:
    """Set on `ddp` beside a named format nothing changes, because the format overrides it; set on its object, half the bytes."""
    cfg = models["8B"]
    beside = copy.copy(cfg)
    beside.ddp = copy.copy(cfg.ddp)
    beside.ddp.grad_reduce_in_fp32 = False
    before = memory.states(cfg, ranks=8)[0].gradients_bytes
    assert cfg.mixed_precision == "bf16_mixed" and memory.states(beside, ranks=8)[0].gradients_bytes == before
    pulled = levers.applied(cfg, lever("gradients"))
    assert memory.states(pulled, ranks=8)[0].gradients_bytes == before / 2
    assert cfg.mixed_precision == "bf16_mixed", "the recipe stays as it is"


@pytest.mark.parametrize("one", levers.LEVERS, ids=lambda one: one.name)
def test_the_printed_lines_pull_the_lever(models: dict[str, Any], one: levers.Lever) -> None:
    """Executed below a recipe, they give the configuration that was planned."""
    cfg = copy.deepcopy(models["1B"])
    exec(levers.code(one), {"cfg": cfg})  # noqa: S102
    assert diff(cfg, levers.applied(models["1B"], one)).empty
    with pytest.raises(UnknownField, match="grads"):
        levers.applied(models["1B"], levers.Lever("", {"ddp.grads": 1}, "", "", ""))


@pytest.mark.parametrize(("gradients", "each"), [(None, 2 + 2 + 12), ("float32", 2 + 4 + 12)])
def test_fully_sharded_states_are_a_share_of_everything(
    models: dict[str, Any], gradients: str | None, each: int
) -> None:
    """18 bytes over eight ranks are 2.25 a parameter, 16 with bf16 gradients, the default; what is whole follows the limits."""
    import torch

    cfg = copy.copy(models["8B"])
    cfg.ddp = copy.copy(cfg.ddp)
    cfg.ddp.megatron_fsdp_main_grads_dtype = gradients and getattr(torch, gradients)
    found, count = fully_sharded.states(cfg, ranks=8), closed_forms.parameter_count(cfg.model, vocab_size=128_256)
    assert found.sharded_bytes == pytest.approx(count * each / 8, rel=1e-9)
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14_336) + 2 * 4096
    assert found.ends_bytes == 2 * (2 * 128_256 * 4096 + 4096)
    assert found.gathered_bytes == 2 * 4 * layer, "three layers of 218 million are gathered ahead, for a limit of 500"
    assert found.waiting_bytes == (each - 14) * (10**9 + layer)
    assert found.total_bytes == pytest.approx(sum(vars(found).values()), abs=1)


def test_fsdp_limits_are_those_of_the_installed_source() -> None:
    """The two limits that are counted are made of these lines; an upgrade that changes them stops here."""
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel as Adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP

    source = inspect.getsource(MegatronFSDP)
    for line in (
        "total_param_elements // total_fsdp_module * 2",
        "1_000_000_000, suggested_communication_unit_size",
        "self.suggested_RS_queue_capacity = suggested_communication_unit_size",
        "self.suggested_AG_prefetch_size = suggested_communication_unit_size // 2",
    ):
        assert line in source, line
    assert "fsdp_unit_modules = [TransformerLayer, MoETransformerLayer, MambaLayer]" in inspect.getsource(Adapter)


def test_what_fsdp_does_not_count_is_refused(models: dict[str, Any]) -> None:
    """A pipeline is refused by its field; the planner itself refuses FSDP and says who counts it."""
    with pytest.raises(memory.NotPlanned, match="pipeline_model_parallel_size=2 is not planned"):
        fully_sharded.states(memory.with_layout(models["1B"], pp=2), ranks=8)
    with pytest.raises(memory.NotPlanned, match=r"fully_sharded\.states"):
        memory.plan(levers.applied(models["1B"], lever("Megatron FSDP")), ranks=8)


def test_core_warns_of_the_loss_kernel_that_the_recipes_set(models: dict[str, Any]) -> None:
    """The warning is Core's own, and the other kernel earns none."""
    from megatron.core.model_parallel_config import ModelParallelConfig

    for cfg, told in ((models["8B"], True), (levers.applied(models["8B"], lever("loss kernel")), False)):
        assert cfg.model.cross_entropy_loss_fusion and (cfg.model.cross_entropy_fusion_impl == "te") == told
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ModelParallelConfig(
                cross_entropy_loss_fusion=True, cross_entropy_fusion_impl=cfg.model.cross_entropy_fusion_impl
            )
        messages = [str(one.message) for one in caught if "cross entropy loss fusion" in str(one.message)]
        assert bool(messages) == told
        assert all("known stability issues" in one and "cross_entropy_fusion_impl='native'" in one for one in messages)


def test_five_layers_are_what_bf16_needs_without_a_cut(models: dict[str, Any]) -> None:
    """8B at TP=1 DP=8 with bf16 gradients fits from five recomputed layers on, the number in NVIDIA's FP8 recipe."""
    cfg = levers.applied(models["8B"], lever("gradients"))
    block = {"recompute_granularity": "full", "recompute_method": "block"}
    room = usable.of(cfg, ranks=8).usable_bytes
    fits = [
        memory.plan(memory.with_layout(cfg, **block, recompute_num_layers=count), ranks=8).total_bytes <= room
        for count in (4, 5)
    ]
    assert fits == [False, True]
    eight_bit = next(row for row in recipe_table.read()["rows"] if "8b_pretrain_8gpu_h100_fp8cs" in row["recipe"])
    assert eight_bit["recompute"] == "5 layers" and eight_bit["planned_bytes"] <= eight_bit["usable_bytes"]
    assert lever("5 layers").fields["model.recompute_num_layers"] == 5


def test_nvidias_fp8_recipe_needs_one_recomputed_layer(bridge: Any) -> None:
    """Without any the plan is above what it may use, with one below; NVIDIA takes five."""
    from megatron.bridge.perf_recipes.llama.h100.llama3 import llama3_8b_pretrain_8gpu_h100_fp8cs_config

    with recipes.offline():
        cfg = llama3_8b_pretrain_8gpu_h100_fp8cs_config()
    room, none = usable.of(cfg, ranks=8).usable_bytes, dict.fromkeys(["granularity", "method", "num_layers"])
    plain = memory.with_layout(cfg, **{f"recompute_{name}": value for name, value in none.items()})
    one = memory.with_layout(cfg, recompute_num_layers=1)
    assert memory.plan(plain, ranks=8).total_bytes > room > memory.plan(one, ranks=8).total_bytes
    assert cfg.model.recompute_num_layers == 5


def test_usable_memory_is_named_line_by_line(models: dict[str, Any]) -> None:
    """Each line has a source; NCCL counts a group for the world and each cut; the rest is the sum."""
    whole, cut = (usable.of(memory.with_layout(models["8B"], tp=tp), ranks=8) for tp in (1, 2))
    assert all(line.source for line in whole.lines) and gib(whole.total_bytes) == pytest.approx(79.1)
    names = [[line.name for line in one.lines] for one in (whole, cut)]
    assert names[0][1] == "NCCL, 2 groups" and names[1][1] == "NCCL, 3 groups"
    assert whole.lines[-1].taken_bytes == 8192 * (3 * 14_336 + 2 * 4096) * 2 == 2 * cut.lines[-1].taken_bytes
    assert whole.usable_bytes == whole.total_bytes - sum(line.taken_bytes for line in whole.lines)
    facts = json.loads(usable.FILE.read_text(encoding="utf-8"))
    assert all(row["source"] for row in [*facts["allocator_total"], *facts["lines"].values()])
    assert gib(whole.total_bytes) < gib(ceiling.gpus()["H100 SXM 80GB"].memory_bytes), "torch sees less than the driver"


def test_every_recipe_for_eight_h100_is_in_the_table(bridge: Any) -> None:
    """A recipe that an upgrade adds has no row yet: `python -m book.builder.recipes` writes one."""
    rows = {row["recipe"]: row for row in recipe_table.read()["rows"]}
    assert [f"{tree}:{name}" for tree, _, name in recipe_plans.names()] == list(rows)
    assert len(rows) > 40 and {"pretrain", "sft", "peft"} == {row["task"] for row in rows.values()}
    pretraining = {name for name, row in rows.items() if row["task"] == "pretrain" and "states_bytes" in row}
    assert set(recipe_plans.NOTES) == pretraining, "every pretraining recipe that is planned has a reason"
    assert all(row["planned_bytes"] or row["refused"] for row in rows.values() if "states_bytes" in row)


def test_pretraining_recipes_are_planned_again(bridge: Any) -> None:
    """Each row of a pretraining recipe is what the planner says of the installed package."""
    kept = [row for row in recipe_table.read()["rows"] if row["task"] == "pretrain"]
    assert recipe_table.make("pretrain")["rows"] == kept


def test_a_verdict_follows_the_bytes() -> None:
    """What fits, what is cut without need, and what cannot be built, in words."""
    row = {"usable_bytes": 70 * 2**30, "planned_bytes": 60 * 2**30, "states_bytes": 50 * 2**30}
    assert recipe_plans.verdict(row) == "10.0 GiB left"
    assert recipe_plans.verdict(row | {"planned_bytes": 71 * 2**30}) == "does not fit 70.0 GiB"
    assert recipe_plans.verdict(row | {"planned_bytes": None}) == "the states alone: 20.0 GiB left"
    needed = row | {"uncut_states_bytes": 90 * 2**30, "smallest_tp": 2}
    assert "90.0 GiB, and do not fit; TP=2 PP=1 would do" in recipe_plans.verdict(needed)
    assert recipe_plans.verdict({"refused": "no shape"}) == "not planned: no shape"

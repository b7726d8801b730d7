"""The nano3 blueprint, the catalogue of recipes, the census of built models, and upstream's drift."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from course_lib import recipes
from course_lib.planning import census
from course_lib.recipes import blueprint, catalogue

LLAMA = "llama.h100.llama3:llama32_1b_pretrain_1gpu_h100_bf16_config"
COMPUTED = [row for row in blueprint.differences() if row.verdict not in ("undecided", "exercise")]


@pytest.fixture(scope="module")
def nano(bridge: Any) -> Any:
    return blueprint.load(blueprint.NANO)


def drift(row: blueprint.Difference, cfg: Any) -> str:
    """What to read again if the installed packages say something else than the lessons; empty if they agree."""
    computed = blueprint.installed(row, cfg)
    if computed == row.installed:
        return ""
    return (
        f"{row.topic}: lessons {', '.join(row.pages) or 'none'} state {row.installed!r}, "
        f"the installed packages say {computed!r}. "
        "Read the pages again, then change data/nano3_differences.json."
    )


@pytest.mark.parametrize("row", COMPUTED, ids=lambda row: row.id)
def test_upstream_did_not_drift(nano: Any, row: blueprint.Difference) -> None:
    """Each computable fact about upstream is still what the lessons state; an upgrade that changes it names the pages."""
    assert not (message := drift(row, nano)), message


@pytest.mark.parametrize(
    ("planted", "field", "value", "says"),
    [
        ("width", "hidden_size", 3008, "3008 = 2 x 1344"),
        ("depth", "hidden_size", 3008, "52 layers, width 3008"),
        ("experts", "num_moe_experts", 8, "8 experts, top 6"),
        ("layout", "tensor_model_parallel_size", 8, "TP=8 EP=8"),
    ],
)
def test_a_drift_is_noticed_and_names_the_page(nano: Any, planted: str, field: str, value: Any, says: str) -> None:
    """The drift test can fail: a changed fact gives a message with the page, the old value and the new one."""
    row = next(row for row in COMPUTED if row.id == planted)
    changed = dataclasses.replace(nano, model=dataclasses.replace(nano.model, **{field: value}))
    message = drift(row, changed)
    page = f"lessons {', '.join(row.pages) or 'none'} state"
    for part in (row.topic, page, repr(row.installed), repr(says), "data/nano3_differences.json"):
        assert part in message
    assert not drift(row, nano)


def test_differences_have_sources_and_a_verdict() -> None:
    """Each row has a source for what it quotes and a verdict; what nothing computes is refused by name."""
    rows = blueprint.differences()
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert row.verdict in {"two runs", "stale", "same", "undecided", "exercise"}
        quoted = [claim for claim in (row.reported, row.yaml) if claim]
        assert quoted and all("e27b371" in claim["source"] for claim in quoted)
        assert bool(row.installed) == (row in COMPUTED) and bool(row.loses) == bool(row.pages)
        assert row.lesson == ("02" in row.pages)
    undecided = next(row for row in rows if row.verdict == "undecided")
    with pytest.raises(KeyError, match="container.*undecided"):
        blueprint.installed(undecided, None)


def test_every_stage_row_has_its_source() -> None:
    """Four stages, each with what it reads and writes; each row names repository, path and version."""
    plan = blueprint.stages()
    assert plan.stage.nunique() == 4
    assert plan[["repository", "path", "version"]].notna().all().all()
    assert plan[plan.tiny.notna()].path_tiny.notna().all(), "a value of tiny needs its file"
    assert all(Path(path).suffix for path in [*plan.path, *plan.path_tiny.dropna()]), "a folder is no source"
    for _, rows in plan.groupby("stage"):
        assert {"artifact in", "artifact out"} <= set(rows.topic)


def test_recipes_are_listed_without_importing_them() -> None:
    """The catalogue knows task, GPUs and layout of the course's recipes, and which file the others want."""
    known = {entry.path: entry for entry in catalogue.entries()}
    entry = known[blueprint.NANO]
    assert (entry.task, entry.gpus, entry.hardware, entry.asks_hub_for) == ("pretrain", 8, "h100", None)
    assert entry.layout == {"TP": 1, "PP": 1, "CP": 1, "EP": 8}
    assert known[LLAMA].asks_hub_for == "meta-llama/Llama-3.2-1B"
    shapes = catalogue.table().set_index("recipe")["model shape"]
    assert shapes[LLAMA.split(":")[1]] == "data/models/llama32_1b.json"
    assert shapes["qwen3_8b_pretrain_4gpu_h100_bf16_config"] == "data/models/qwen3_8b.json"
    # One that asks through another function, and one whose values nobody has.
    assert shapes["nemotron_3_super_pretrain_config"] == "data/models/nemotron_3_super_120b.json"
    name = "qwen35_text_9b_pretrain_8gpu_gb200_bf16_config"
    assert shapes[name] == "wants config.json of Qwen/Qwen3.5-9B-Base"


def test_the_catalogue_tells_the_truth(bridge: Any, nano: Any) -> None:
    """What was read from the source is what the called recipe says."""
    known = {entry.path: entry for entry in catalogue.entries()}
    for path, cfg in ((blueprint.NANO, nano), (LLAMA, blueprint.load(LLAMA))):
        assert known[path].layout["TP"] == cfg.model.tensor_model_parallel_size
        assert known[path].layout.get("EP", 1) == cfg.model.expert_model_parallel_size


def test_a_recipe_without_values_names_what_it_wants(bridge: Any) -> None:
    """Loading a recipe whose shape is not in data/ says which model is missing, and asks no network."""
    entry = next(entry for entry in catalogue.entries() if entry.name.startswith("qwen35_text_9b_pretrain"))
    with pytest.raises(recipes.UnknownModel, match="Qwen/Qwen3.5-9B-Base"):
        blueprint.load(entry.path)


def test_the_built_model_has_the_published_size() -> None:
    """Nemotron 3 Nano on 8 ranks: 31.6 billion in total, 3.6 active, 3.2 without the input table; Llama by formula."""
    counted = census.count([blueprint.NANO, LLAMA], vocab_size=131072, ranks=8)
    thirty, llama = counted.values()
    assert round(thirty.total / 1e9, 1) == 31.6
    assert round(thirty.active / 1e9, 1) == 3.6
    assert round(thirty.active_without_input_embedding / 1e9, 1) == 3.2
    assert "other" not in {*thirty.parts, *llama.parts}
    assert llama.total == llama.active == llama.on_rank == 1_241_581_568
    # Each of 8 ranks holds an eighth of the experts and all the rest; the sum is what one rank alone would hold.
    experts = thirty.parts["routed experts"]
    assert thirty.on_rank == experts // 8 + thirty.total - experts
    alone = census.count([blueprint.NANO], vocab_size=131072, ranks=1)["nemotron_3_nano_pretrain_8gpu_h100_bf16_config"]
    assert alone.parts == thirty.parts and alone.on_rank == thirty.total


def test_ranks_that_disagree_are_not_summed() -> None:
    """A sum over ranks is honest only if what is not shared out is the same on every rank."""
    assert census._sum_over_ranks([{"norms": 3, "routed experts": 8}], times=4) == {"norms": 3, "routed experts": 32}
    with pytest.raises(census.CensusFailed, match="different parts"):
        census._sum_over_ranks([{"norms": 3}, {"norms": 4}])


def test_a_model_that_cannot_be_built_is_named() -> None:
    """The census stops with the recipe's name and the child's last words."""
    with pytest.raises(census.CensusFailed, match="(?s)no_such_config.*0 could be built.*no_such"):
        census.count(["llama.h100.llama3:no_such_config"])


def test_trl_takes_what_stage_2_asks_for() -> None:
    """Every argument beside nano3's fifteen settings is one of the installed TRL; the sizes are those of the stages' table."""
    from trl import GRPOConfig

    rows = blueprint.in_trl()
    given = {name: value for arguments in rows.trl for name, value in arguments.items()}
    config = GRPOConfig(use_cpu=True, bf16=False, **given)
    assert len(rows) == 15 and {name: getattr(config, name) for name in given} == given
    stage2 = blueprint.stages().query("stage.str.startswith('2')").set_index("key").default
    prompts = config.generation_batch_size // config.num_generations
    assert f"{prompts} x {config.num_generations}" == stage2["prompts x generations per step"]
    assert config.generation_batch_size == stage2["policy.train_global_batch_size"]
    assert config.max_completion_length == stage2["sequence length, tokens"]

"""The page "Before the first step on a node": every field, every word of an installed source, and what a CPU can show."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from book.builder import facts
from course_lib import launch, recipes
from course_lib.common.project import DATA, PROJECT
from course_lib.runs import checkpoints
from support.small import config

NODE = json.loads((DATA / "first_step_on_a_node.json").read_text(encoding="utf-8"))
ROWS = [(section, row) for section, rows in NODE["sections"].items() for row in rows]
FIELD = re.compile(r"`cfg((?:\.\w+)+)")


@pytest.fixture(scope="module")
def recipe(bridge) -> Any:
    """What a learner has in hand: the recipe of Llama 3.2 1B."""
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

    with recipes.offline():
        return llama32_1b_pretrain_config()


def value(cfg: Any, name: str) -> Any:
    """A field by its dotted name; AttributeError if there is none."""
    for part in name.strip(".").split("."):
        cfg = getattr(cfg, part)
    return cfg


def test_each_field_on_the_page_exists(recipe) -> None:
    """Also in the page's own words, and not only in its rows."""
    page = facts.fill((PROJECT / "book" / "before_the_first_step.md").read_text(encoding="utf-8"), root=PROJECT)
    named = set(FIELD.findall(page))
    assert len(named) > 30
    for name in named:
        value(recipe, name)
    with pytest.raises(AttributeError):
        value(recipe, ".train.exit_after_minutes")


@pytest.mark.parametrize(("section", "row"), ROWS, ids=[f"{section}: {row['what']}" for section, row in ROWS])
def test_each_row_has_a_source_that_says_so(section, row, recipe) -> None:
    """An upgrade that moves the words, or changes a default, fails here with the row's name."""
    assert row.get("sources") or row.get("source_urls")
    for source in row.get("sources", ()):
        files = importlib.metadata.distribution(source["repository"])
        assert files.version.split("+")[0] == source["version"]
        assert source["says"] in Path(files.locate_file(source["path"])).read_text(encoding="utf-8")
    for name, default in row.get("defaults", {}).items():
        assert value(recipe, name) == default, name
        assert f"`cfg.{name}" in row["do"], name


def test_the_recipes_set_what_the_page_says(recipe) -> None:
    """The variables of the first table are those of the recipe, and the one that it leaves out is left out."""
    named = {row["what"].strip("`") for row in NODE["sections"]["environment"][1:]}
    assert named - set(recipe.env_vars) == {"CUDA_DEVICE_MAX_CONNECTIONS"}
    assert set(recipe.env_vars) - named == {"TORCH_NCCL_HIGH_PRIORITY"}


def test_the_older_name_of_the_allocators_variable_wins() -> None:
    """torch itself says which of the two it took."""
    code = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    mine = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    older = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def settings(variables: dict[str, str]) -> str:
        environment = {name: text for name, text in os.environ.items() if "ALLOC_CONF" not in name} | variables
        return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()

    assert settings(mine) == "max_split_size_mb:512"
    assert settings(mine | older) == "expandable_segments:True"


def test_rates_are_shares_of_the_dense_peak() -> None:
    """402.51 of 989 are 41%; two rows of one model count 57.9 and 51.5 GFLOP for a token."""
    rows = [line.strip("| ").split(" | ") for line in facts.rates(PROJECT).splitlines()[2:]]
    shares = {row[0]: (row[2], row[4]) for row in rows}
    assert shares["Nemotron 3 Nano 4B, BF16, not tuned"] == ("41% of 989", "20.6")
    assert shares["NeMo 24.12, FP8"] == ("36% of 1,978", "57.9")
    assert shares["Megatron-Bridge 25.11, FP8"] == ("38% of 1,978", "51.5")


def test_a_signal_to_one_rank_saves_and_ends_all(bridge, runs_directory) -> None:
    """Bridge's own handler: the step is finished, a checkpoint is whole, the run ended well before its last step."""

    def stop(run: Any) -> None:
        if run.stage() == "training" and len(run.metrics) > 1 and not sent:
            sent.append(run.ranks()[1]["pid"])
            os.kill(sent[0], signal.SIGTERM)

    sent: list[int] = []
    cfg = config(train_iters=500, train__exit_signal_handler=True, checkpoint__save_interval=500)
    run = launch.run(cfg, ranks=2, name="taken-back", save=True, show=None, watch=stop)
    saved = checkpoints.latest(run)
    assert run.outcome.status == "succeeded" and sent
    assert saved.step == run.metrics.step.iloc[-1] < 500


def test_profilers_write_into_the_runs_own_folder(bridge, runs_directory) -> None:
    """Bridge puts a trace beside TensorBoard's folder, which a run has none of, and a snapshot into NeMo Run's."""
    fields = {"use_pytorch_profiler": True, "profile_step_start": 1, "profile_step_end": 2, "profile_ranks": [0]}
    cfg = config(train_iters=3, **{f"profiling__{name}": field for name, field in fields.items()})
    run = launch.run(cfg, ranks=2, name="profiled", show=None)
    assert [path.name for path in run.path.glob("torch_profile/*")] == ["rank-0.json.gz"]
    assert run.config["profiling"]["memory_snapshot_path"] == str(run.path / "snapshot.pickle")

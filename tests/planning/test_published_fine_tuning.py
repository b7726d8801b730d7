"""Fine-tunings that NVIDIA verified: each row has its source, its recipe is installed, and its numbers fit each other."""

from __future__ import annotations

import pytest

from course_lib.planning import ceiling
from course_lib.recipes import catalogue


def test_each_row_has_its_source_and_an_installed_recipe():
    """A recipe that an upgrade renames is noticed here, and not by who follows the lesson on a node."""
    table = ceiling.published_fine_tuning()
    known = {entry.name: entry for entry in catalogue.entries()}
    assert set(table.index.get_level_values("kind")) == {"full", "LoRA"}
    for (_, kind), row in table.iterrows():
        assert " @ " in row.source and "card.yaml" in row.source
        assert known[row.recipe].task == {"full": "sft", "LoRA": "peft"}[kind]
        assert known[row.recipe].gpus == row.gpus


def test_what_follows_from_the_rows():
    """Tokens a second by hand for one row; every row counts about six operations for each parameter and token."""
    table = ceiling.published_fine_tuning()
    row = table.loc[("Nemotron 3 Nano 4B", "LoRA")]
    assert row.tokens_per_second_per_gpu == pytest.approx(65_536 / 0.38169 / 8)
    for name, parameters in (("Nemotron 3 Nano 4B", 3.97e9), ("Qwen3 8B", 8.19e9)):
        counted = table.loc[name].gflop_per_token
        assert counted.tolist() == pytest.approx([6 * parameters / 1e9] * 2, rel=0.2)

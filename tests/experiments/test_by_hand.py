"""The layers and optimizers that the lessons write by hand are Megatron Core's, and the plain ones."""

from __future__ import annotations

import pytest

from course_lib.experiments import by_hand


def test_tensor_parallel_layers_are_the_plain_ones(bridge):
    """Output and gradients of the hand-written layers and of Megatron Core's equal the unsplit product."""
    table = by_hand.compare_tensor_parallel(ranks=2, hidden_size=16, ffn_hidden_size=32)
    assert list(table.index) == ["output", "gradient of x", "gradient of A", "gradient of B"]
    assert (table[["by hand", "Megatron Core"]].max(axis=1) < 1e-5 * table["largest value"]).all()
    assert (table["largest value"] > 0).all()


def test_features_that_cannot_be_cut_are_refused():
    """The message names the number and what to change, before ranks start."""
    with pytest.raises(ValueError, match="ffn_hidden_size=33 is not a multiple of 2 ranks"):
        by_hand.compare_tensor_parallel(ranks=2, ffn_hidden_size=33)


def test_data_parallel_training_is_training(bridge):
    """Four ways of training on two ranks give one process's weights; a shard holds half of the state."""
    table = by_hand.compare_data_parallel(ranks=2, features=16)
    assert len(table) == 5 and table["largest difference"].max() < 1e-6
    state = table["optimizer state (bytes)"]
    whole = state["one process, whole batch"]
    assert state["by hand"] == state["Megatron Core"] == whole == 2 * 4 * 16**2
    assert state["by hand, sharded"] == state["Megatron Core, distributed optimizer"] == whole / 2


def test_optimizer_holds_twelve_bytes_over_dp(bridge):
    """For a bf16 parameter: 12 bytes, and 12/DP with the distributed optimizer."""
    held = by_hand.optimizer_bytes(ranks=2)["bytes per parameter"]
    assert held.to_dict() == {"optimizer": 12.0, "distributed optimizer": 6.0}

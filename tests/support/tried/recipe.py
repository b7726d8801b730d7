"""Answers to the exercises of lesson 02."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from course_lib.lesson.exercises import recipe
from support.tried import Tried

PATTERN = "MEMEM*EMEMEM*EMEMEM*E"


def ranks_needed(folder: Path) -> Tried:
    """All sizes multiplied, two of them, and the experts alone."""
    wrong = [(128, "no ranks of their own"), (4, "Context parallelism"), (8, "experts alone"), (12, "Multiply")]
    return Tried(16, wrong, [{"TP": 2, "PP": 2, "CP": 4, "EP": 8}])


def small_recipe(folder: Path) -> Tried:
    """Still large, another learning rate, two sequence lengths, and heads that do not fit."""

    def cfg(
        layers: int = 2, hidden: int = 64, rate: float = 3e-4, *, heads: int = 4, length: int = 128, data: int = 128
    ) -> Any:
        model = {
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": 2 * hidden,
            "num_attention_heads": heads,
        }
        model |= {"num_query_groups": 2, "kv_channels": hidden // 4, "seq_length": length, "normalization": "RMSNorm"}
        model |= {"gated_linear_unit": True, "add_bias_linear": False, "share_embeddings_and_output_weights": True}
        model |= {"position_embedding_type": "rope", "vocab_size": None}
        return OmegaConf.create({"model": model, "optimizer": {"lr": rate}, "dataset": {"seq_length": data}})

    wrong = [
        (cfg(28, 3072), "the limit is"),
        (cfg(rate=1e-3), "optimizer.lr"),
        (cfg(data=8192), "disagree on the sequence length"),
        (cfg(heads=6), "query groups"),
    ]
    return Tried(cfg(), wrong, [cfg(28, 3072), 2_000_000])


def whole_pattern(folder: Path) -> Tried:
    """Nothing mended, a letter added at the end, and a layer of another kind."""
    short = recipe.short_of_a_layer(PATTERN)
    place = short.index("MM") + 1
    wrong = [
        (short, "letters, and the model has 21"),
        (short + "E", "both Mamba layers"),
        (short[:place] + "*" + short[place:], "which kind of layer"),
        (PATTERN[::-1], "another order"),
    ]
    return Tried(PATTERN, wrong, [len(PATTERN), PATTERN])

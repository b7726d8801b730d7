"""Answers to the exercises of lesson 03."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import tried
from support.tried import Tried


def data_parallel_size(folder: Path) -> Tried:
    """All ranks, and the ranks of one copy."""
    return Tried(2, [(8, "whole model"), (4, "share one copy"), (1, "PP is 1")], [4, 8])


def same_losses(folder: Path) -> Tried:
    """The old size, other ranks, other steps, another learning rate."""

    def run(name: str, size: int, ranks: int = 8, **more: Any) -> Any:
        launch = {"ranks": ranks, "layout": {"tensor_model_parallel_size": size}}
        return tried.run(folder, name, launch=launch, **more)

    wrong = [
        (run("same", 2), "TP is 2"),
        (run("few", 4, 4), "on 4 ranks"),
        (run("short", 4, losses=[7.0]), "1 steps"),
        (run("rate", 4, losses=[7.0, 6.5, 6.2]), "besides the layout"),
    ]
    return Tried(run("yours", 4), wrong, [run("before", 2), 4])


def legal_layout(folder: Path) -> Tried:
    """Nothing mended, the batch forgotten, the pipeline given up, and a model that was cut to fit."""

    def cfg(stages: int, batch: int, layers: int = 4) -> dict[str, Any]:
        model = {"num_layers": layers, "hidden_size": 128, "num_attention_heads": 8, "tensor_model_parallel_size": 2}
        model |= {"pipeline_model_parallel_size": stages}
        return {"model": model, "train": {"global_batch_size": batch, "micro_batch_size": 2}}

    wrong = [
        (cfg(3, 18), "PP=3 does not divide"),
        (cfg(2, 18), "18 samples a step"),
        (cfg(1, 16), "without the pipeline"),
        (cfg(2, 16, layers=6), "model.num_layers changed"),
    ]
    return Tried(cfg(2, 16), wrong, [cfg(1, 16), 8])

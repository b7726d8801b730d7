"""Tensor and data parallelism by hand, a few lines each, beside Megatron Core's own: run in ranks, compared by number.

The functions of the first two parts are what lessons 11 and 12 print.  The rest lets ranks run them next to Megatron
Core's layers and optimizers, with the same weights and the same data; what a rank does then is in `by_hand_ranks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from course_lib import launch

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CopyIn",
    "SumOut",
    "column_parallel",
    "compare_data_parallel",
    "compare_tensor_parallel",
    "data_parallel_step",
    "optimizer_bytes",
    "row_parallel",
    "sharded_step",
]


# torch before 2.13, which NVIDIA's containers carry, knows these two by longer names
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# ------------------------------------------------------------------------------------------------- tensor parallel, by hand


class CopyIn(torch.autograd.Function):
    """Every rank gets the same input, so its gradient is the sum of what the ranks found."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SumOut(torch.autograd.Function):
    """Every rank holds one summand of the output; all need the sum, and its gradient is the same for all."""

    @staticmethod
    def forward(ctx: Any, summand: torch.Tensor) -> torch.Tensor:
        total = summand.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def column_parallel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Some output features of a linear layer: `weight` holds rows of W, so the output is a slice of x W^T."""
    return CopyIn.apply(x) @ weight.T


def row_parallel(x_slice: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All output features, from a slice of the input: `weight` holds columns of W, so each rank has a summand."""
    return SumOut.apply(x_slice @ weight.T)


# --------------------------------------------------------------------------------------------------- data parallel, by hand


def data_parallel_step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """All ranks hold the parameter: average its gradient, and step everywhere alike."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
    optimizer.step()


def sharded_step(parameter: torch.Tensor, shard: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """All ranks hold the parameter, but each steps only its shard, and holds Adam's moments for that alone."""
    gradient = parameter.grad.view(-1) / dist.get_world_size()
    shard.grad = torch.empty_like(shard)
    reduce_scatter_single(shard.grad, gradient)
    optimizer.step()
    all_gather_single(parameter.data.view(-1), shard.data)


# ----------------------------------------------------------------------------------------------------- beside Megatron Core


def compare_tensor_parallel(*, ranks: int = 4, hidden_size: int = 64, ffn_hidden_size: int = 256) -> pd.DataFrame:
    """Run a two-layer MLP by hand, by Megatron Core's layers, and plain, with the same weights and input.

    Args:
        ranks: Tensor-parallel size.
        ffn_hidden_size: Features between the layers; a multiple of `ranks`.

    Returns:
        One row a tensor (`output`, `gradient of x`, `gradient of A`, `gradient of B`): `largest value` of the plain
        result, and the largest absolute difference over all ranks of `by hand` and of `Megatron Core` from it.

    Raises:
        ValueError: If the ranks do not divide the features.
    """
    if ffn_hidden_size % ranks:
        raise ValueError(f"ffn_hidden_size={ffn_hidden_size} is not a multiple of {ranks} ranks: change one of them")
    return _compare("tensor_parallel", ranks, hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size)


def compare_data_parallel(*, ranks: int = 4, features: int = 64, steps: int = 3) -> pd.DataFrame:
    """Train a matrix by AdamW: in one process on the whole batch, by hand, and by Megatron Core.

    Args:
        ranks: Data-parallel size; each rank reads a slice of the batch.

    Returns:
        One row a way of training: `largest difference` of the weights, over all ranks, from those of one process, and
        `optimizer state (bytes)` that one rank holds.
    """
    return _compare("data_parallel", ranks, features=features, steps=steps)


def optimizer_bytes(*, ranks: int = 4, features: int = 128) -> pd.DataFrame:
    """What Megatron Core's optimizer holds for each bf16 parameter: fp32 master copy and two moments, or a shard of them.

    Args:
        ranks: Data-parallel size.

    Returns:
        One row an optimizer: bytes per parameter on one rank, the largest over the ranks.
    """
    return _compare("optimizer_bytes", ranks, features=features)


def _compare(target: str, ranks: int, **sizes: int) -> pd.DataFrame:
    """Run a function of `by_hand_ranks` in so many ranks; the largest value over the ranks of each cell."""
    import pandas as pd

    answers = launch.call(f"course_lib.experiments.by_hand_ranks:{target}", sizes, ranks=ranks)
    frames = [pd.DataFrame.from_dict(answer, orient="index") for answer in answers]
    return pd.concat(frames).groupby(level=0, sort=False).max()

"""What each rank does for `by_hand`: the same work by hand and by Megatron Core, and the distance between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from course_lib.experiments.by_hand import column_parallel, data_parallel_step, row_parallel, sharded_step
from course_lib.ranks import train


def _begin(*, tensor_parallel: bool) -> None:
    """Let the ranks meet, and start Megatron Core in each."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    train.meet()
    parallel_state.initialize_model_parallel(dist.get_world_size() if tensor_parallel else 1)
    model_parallel_cuda_manual_seed(1)


def tensor_parallel(sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """In each rank: forward and backward three times, and the distances from the plain result."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    _begin(tensor_parallel=True)
    hidden, middle = sizes["hidden_size"], sizes["ffn_hidden_size"]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(middle, hidden, generator=generator).cuda() / hidden**0.5  # W of the first layer, [out, in]
    b = torch.randn(hidden, middle, generator=generator).cuda() / middle**0.5
    x = torch.randn(16, 2, hidden, generator=generator).cuda()  # [sequence, batch, hidden]
    mine = slice(rank * middle // ranks, (rank + 1) * middle // ranks)

    def trained(layers: Any, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Output, and gradients of the input and of both weights, of the mean square of the output."""
        own_x = x.clone().requires_grad_()
        output = layers(own_x, *weights)
        output.square().mean().backward()
        return [output.detach(), own_x.grad, *(weight.grad for weight in weights)]

    def leaf(weight: torch.Tensor) -> torch.Tensor:
        return weight.clone().requires_grad_()

    plain = trained(lambda x, a, b: torch.relu(x @ a.T) @ b.T, [leaf(a), leaf(b)])
    plain = [*plain[:2], plain[2][mine], plain[3][:, mine]]
    hand = trained(
        lambda x, a, b: row_parallel(torch.relu(column_parallel(x, a)), b), [leaf(a[mine]), leaf(b[:, mine])]
    )
    config = ModelParallelConfig(
        tensor_model_parallel_size=ranks, use_cpu_initialization=True, gradient_accumulation_fusion=False
    )
    options = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": False}
    column = ColumnParallelLinear(hidden, middle, gather_output=False, **options).cuda()
    row = RowParallelLinear(middle, hidden, input_is_parallel=True, **options).cuda()
    column.weight.data.copy_(a[mine])
    row.weight.data.copy_(b[:, mine])
    core = trained(lambda x, a, b: row(torch.relu(column(x)[0]))[0], [column.weight, row.weight])
    names = ("output", "gradient of x", "gradient of A", "gradient of B")
    return {
        name: {
            "largest value": float(p.abs().max()),
            "by hand": float((h - p).abs().max()),
            "Megatron Core": float((c - p).abs().max()),
        }
        for name, p, h, c in zip(names, plain, hand, core, strict=True)
    }


def data_parallel(sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """In each rank: the same training five times, and the distance of the weights from those of one process."""
    _begin(tensor_parallel=False)
    features, rank, ranks = sizes["features"], dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(features, features, generator=generator).cuda() / features**0.5
    batches = torch.randn(sizes["steps"], 8 * ranks, features, generator=generator).cuda()
    adam = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    def loss(weight: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (batch @ weight.T - batch.roll(1, dims=1)).square().mean()

    def train(weight: torch.Tensor, held: torch.Tensor, step: Any, slices: int) -> tuple[torch.Tensor, int]:
        """Train `weight`, of which the optimizer holds `held`; returns the weight and the bytes of Adam's moments."""
        optimizer = torch.optim.AdamW([held], **adam)
        for batch in batches:
            weight.grad = None
            loss(weight, batch.chunk(slices)[rank % slices]).backward()
            step(optimizer)
        return weight.detach(), _bytes_of(optimizer)

    alone = start.clone().requires_grad_()
    reference, state_bytes = train(alone, alone, lambda optimizer: optimizer.step(), 1)
    answer = {"one process, whole batch": {"largest difference": 0.0, "optimizer state (bytes)": state_bytes}}
    weight = start.clone().requires_grad_()
    found = {"by hand": train(weight, weight, lambda optimizer: data_parallel_step(weight, optimizer), ranks)}
    sharded = start.clone().requires_grad_()
    shard = sharded.detach().view(-1).chunk(ranks)[rank].clone().requires_grad_()
    found["by hand, sharded"] = train(sharded, shard, lambda opt: sharded_step(sharded, shard, opt), ranks)
    for name, distributed in (("Megatron Core", False), ("Megatron Core, distributed optimizer", True)):
        model, optimizer = _core(start, adam, distributed=distributed)
        for batch in batches:
            model.zero_grad_buffer()
            optimizer.zero_grad()
            loss(model.module.weight, batch.chunk(ranks)[rank]).backward()
            model.finish_grad_sync()
            optimizer.step()
        found[name] = (model.module.weight.detach(), _bytes_of(optimizer.chained_optimizers[0].optimizer))
    for name, (trained, state_bytes) in found.items():
        difference = float((trained - reference).abs().max())
        answer[name] = {"largest difference": difference, "optimizer state (bytes)": state_bytes}
    return answer


def optimizer_bytes(sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """In each rank: one step of a bf16 matrix, and the fp32 bytes that the optimizer holds for it."""
    _begin(tensor_parallel=False)
    features = sizes["features"]
    start = torch.randn(features, features, generator=torch.Generator().manual_seed(1)).cuda() / features**0.5
    answer = {}
    for name, distributed in (("optimizer", False), ("distributed optimizer", True)):
        model, optimizer = _core(start.bfloat16(), {"lr": 1e-2}, distributed=distributed)
        batch = torch.ones(8, features, dtype=torch.bfloat16, device="cuda")
        (batch @ model.module.weight.T).square().mean().backward()
        model.finish_grad_sync()
        optimizer.step()
        inner = optimizer.chained_optimizers[0].optimizer
        held_bytes = _bytes_of(inner) + sum(p.nbytes for group in inner.param_groups for p in group["params"])
        answer[name] = {"bytes per parameter": held_bytes / features**2}
    return answer


def _bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of Adam's two moments; its step counter, one number for each parameter tensor, is left out."""
    return sum(
        state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq") if name in state
    )


def _core(start: torch.Tensor, adam: dict[str, Any], *, distributed: bool) -> tuple[Any, Any]:
    """A one-matrix model in Megatron Core's DistributedDataParallel, and Megatron Core's optimizer for it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import MegatronModule, TransformerConfig

    half = start.dtype == torch.bfloat16
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=half)

    class Matrix(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(start.clone())

    options = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, options, Matrix())
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=adam["lr"],
            weight_decay=0.0,
            bf16=half,
            clip_grad=0.0,
            use_distributed_optimizer=distributed,
        ),
        [model],
    )
    return model, optimizer

"""On 8 real ranks: the same seed gives the same weights in every layout, and gloo does what Megatron asks of NCCL."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

RANKS = 8
SIZES = (1, 2, 4, 8)
SEED = 1234

# ------------------------------------------------------------------------------------------- what the ranks do


def provider(tensor_parallel: int) -> object:
    """A small Llama-shaped model whose weights depend on the seed alone."""
    import torch
    import torch.nn.functional as F
    from megatron.bridge.models import GPTModelProvider
    from megatron.bridge.models.gpt_provider import local_layer_spec

    return GPTModelProvider(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=8,
        ffn_hidden_size=128,
        seq_length=16,
        vocab_size=128,
        make_vocab_size_divisible_by=8,
        activation_func=F.silu,
        gated_linear_unit=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
        transformer_layer_spec=local_layer_spec,
        transformer_impl="local",
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def full_weights(model: object, group: object) -> dict:
    """Every parameter of the whole model, put together from the shards of a tensor-parallel group."""
    import torch

    size, full = torch.distributed.get_world_size(group), {}
    for name, parameter in model.named_parameters():
        shards = [torch.empty_like(parameter) for _ in range(size)]
        torch.distributed.all_gather(shards, parameter.detach().contiguous(), group=group)
        if not getattr(parameter, "tensor_model_parallel", False):
            assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs between ranks"
            full[name] = shards[0]
            continue
        # a gated layer's shard holds a part of the gate, then a part of the rest: two strides
        parts = [shard.chunk(parameter.partition_stride, parameter.partition_dim) for shard in shards]
        ordered = [part[stride] for stride in range(parameter.partition_stride) for part in parts]
        full[name] = torch.cat(ordered, parameter.partition_dim)
    return full


def build_in_every_layout(directory: str) -> None:
    """Build the same model at each tensor-parallel size; rank 0 saves the whole weights of each."""
    import torch
    from megatron.bridge.training.initialize import _set_random_seed
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch.distributed.init_process_group("gloo")
    for size in SIZES:
        recipe = provider(size)
        recipe.finalize()
        recipe.initialize_model_parallel()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        _set_random_seed(SEED, False, False, False, False, pg_collection=groups)
        # What Megatron draws on the GPU before it builds: amounts depend on the layout and must not matter.
        torch.rand(5 * size, device="cuda")
        torch.nn.functional.dropout(torch.ones(3 * size), 0.5)
        (model,) = recipe.provide_distributed_model(wrap_with_ddp=False)
        full = full_weights(model, groups.tp)
        if torch.distributed.get_rank() == 0:
            torch.save(full, f"{directory}/tp{size}.pt")
        parallel_state.destroy_model_parallel()
    collectives(Path(directory))
    torch.distributed.destroy_process_group()


def collectives(directory: Path) -> None:
    """Collectives that gloo lacks; each rank writes what it got."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    summed, scattered = torch.full((2,), float(rank)), torch.empty(1)
    handle = dist.all_reduce(summed, op=dist.ReduceOp.AVG, async_op=True)
    handle.wait()
    scaled = torch.full((2,), float(rank))
    dist.all_reduce(scaled, op=dist._make_nccl_premul_sum(0.5))
    given = torch.arange(RANKS, dtype=torch.float32) + rank
    dist.reduce_scatter_tensor(scattered, given, op=dist.ReduceOp.AVG)
    # the sizes as a tensor, as Megatron's token dispatcher has them: rank r sends r+1 elements to everyone
    received = torch.empty(sum(range(1, RANKS + 1)))
    sent = torch.full((RANKS * (rank + 1),), float(rank))
    dist.all_to_all_single(received, sent, torch.arange(1, RANKS + 1), torch.full((RANKS,), rank + 1))
    # parts of different sizes, as MoE with tensor parallelism has them: rank r has r+1 rows
    rows = [torch.empty(r + 1, 2) for r in range(RANKS)]
    dist.all_gather(rows, torch.full((rank + 1, 2), float(rank)))
    reduced = torch.empty(rank + 1, 2)
    dist.reduce_scatter(reduced, [torch.full((r + 1, 2), float(r)) for r in range(RANKS)])
    numbers = torch.empty(RANKS)
    dist.all_gather_into_tensor(numbers, torch.tensor(float(rank)))
    answer = {
        "numbers": numbers.tolist(),
        "backends": [dist.get_backend(dist.new_group(backend=name)) for name in ("nccl", "cpu:gloo,cuda:nccl", "ucc")],
        "gathered": [part.tolist() for part in rows],
        "reduced": reduced.tolist(),
        "average": summed.tolist(),
        "scaled": scaled.tolist(),
        "scattered": scattered.tolist(),
        "unchanged": given.tolist(),
        "received": received.tolist(),
    }
    (directory / f"collectives{rank}.json").write_text(json.dumps(answer))


def optimizer_round_trip(directory: str) -> None:
    """Two steps, save the distributed optimizer, two more; then load into a fresh one and take the last two again."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    torch.distributed.init_process_group("gloo")
    recipe = provider(1)
    recipe.finalize()
    recipe.initialize_model_parallel(seed=SEED)

    def make() -> tuple:
        torch.manual_seed(SEED)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        (model,) = recipe.provide_distributed_model(ddp_config=ddp)
        assert isinstance(model, DistributedDataParallel)
        config = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, params_dtype=torch.float32)
        return model, get_megatron_optimizer(config, [model])

    def step(model: object, optimizer: object) -> float:
        optimizer.zero_grad()
        model.zero_grad_buffer()
        tokens = (torch.arange(16) * (1 + torch.distributed.get_rank()) % 128).reshape(1, 16)
        loss = model(tokens, torch.arange(16).reshape(1, 16), None, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        model.finish_grad_sync()
        optimizer.step()
        return float(loss)

    model, optimizer = make()
    for _ in range(2):
        step(model, optimizer)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    saved, state = optimizer.state_dict(), f"{directory}/state{torch.distributed.get_rank()}.pt"
    optimizer.save_parameter_state(state)
    straight = [step(model, optimizer) for _ in range(3)]
    again, second = make()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(kept[name])
    with torch.no_grad():
        second.load_state_dict(saved)
        second.load_parameter_state(state)
    resumed = [step(again, second) for _ in range(3)]
    if torch.distributed.get_rank() == 0:
        Path(directory, "losses.json").write_text(json.dumps([straight, resumed]))
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def eight_ranks(in_ranks, tmp_path_factory):
    """One launch of eight ranks serves the tests of weights and of collectives."""
    directory = tmp_path_factory.mktemp("init")
    in_ranks(build_in_every_layout, directory, ranks=RANKS)
    return directory


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_same_seed_gives_the_same_weights_in_every_layout(eight_ranks, size):
    """Initialisation is bitwise the same at TP 1, 2, 4 and 8, whatever Megatron drew "on the GPU" before."""
    import torch

    one, many = (torch.load(eight_ranks / f"tp{n}.pt") for n in (1, size))
    assert one.keys() == many.keys()
    kinds = ("word_embeddings", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer", "layernorm")
    for kind in kinds:
        assert any(kind in name for name in one), f"the model has no {kind}"
    different = [name for name in one if not torch.equal(one[name], many[name])]
    assert different == []


def test_weights_are_random(eight_ranks):
    """The comparison above compares something: weights are spread as configured, and layers differ."""
    import torch

    weights = torch.load(eight_ranks / "tp1.pt")
    first, second = (weights[f"decoder.layers.{n}.mlp.linear_fc1.weight"] for n in (0, 1))
    assert abs(first.std().item() - 0.02) < 0.002
    assert not torch.equal(first, second)


def test_averages_on_gloo(eight_ranks):
    """`ReduceOp.AVG`, which gloo refuses, is an average, leaves a separate input alone, and may be asynchronous."""
    answers = [json.loads((eight_ranks / f"collectives{rank}.json").read_text()) for rank in range(RANKS)]
    for rank, answer in enumerate(answers):
        assert answer["average"] == [3.5, 3.5] and answer["scaled"] == [14.0, 14.0]
        assert answer["numbers"] == list(range(RANKS)), "of tensors without a dimension"
        assert answer["backends"] == ["gloo"] * 3
        assert answer["scattered"] == [rank + 3.5]
        assert answer["unchanged"] == [i + rank for i in range(RANKS)]


def test_all_to_all_takes_sizes_as_tensors(eight_ranks):
    """Megatron's token dispatcher hands over split sizes as a tensor, which gloo refuses."""
    expected = [float(sender) for sender in range(RANKS) for _ in range(sender + 1)]
    for rank in range(RANKS):
        assert json.loads((eight_ranks / f"collectives{rank}.json").read_text())["received"] == expected


def test_gathers_take_parts_of_different_sizes(eight_ranks):
    """MoE gathers and reduces as many rows as the router gave each rank; gloo alone wants equal parts."""
    for rank in range(RANKS):
        answer = json.loads((eight_ranks / f"collectives{rank}.json").read_text())
        assert answer["gathered"] == [[[float(r)] * 2] * (r + 1) for r in range(RANKS)]
        assert answer["reduced"] == [[float(rank * RANKS)] * 2] * (rank + 1)


def test_the_distributed_optimizer_resumes_exactly(in_ranks, tmp_path):
    """Torch's AdamW in the distributed optimizer: after loading its state the losses are bitwise those without a stop."""
    in_ranks(optimizer_round_trip, tmp_path, ranks=2)
    straight, resumed = json.loads((tmp_path / "losses.json").read_text())
    assert straight == resumed
    assert straight[-1] < straight[0]
    assert os.path.exists(tmp_path / "state0.pt")

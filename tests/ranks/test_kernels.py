"""What makes a CPU rank faster gives the numbers of what it replaces, and is seen to save what it says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

SEQUENCE, BATCH, WIDTH, HEADS = 12, 3, 32, 4


def gradients(function, *inputs):
    """The value of a function, and what each of its inputs gets back."""
    import torch

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def the_same(one, other) -> None:
    """All tensors agree to the last few bits."""
    import torch

    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def torch(bridge):
    import torch

    torch.manual_seed(1)
    return torch


def test_the_norm_gives_torchs_numbers(torch):
    """Values and gradients of input and weight; without a weight or an epsilon it is torch's own."""
    from course_lib.ranks.cpu import kernels

    original = torch.nn.functional.rms_norm
    mine = partial(kernels.rms_norm, original)
    x, weight = torch.randn(SEQUENCE, BATCH, WIDTH), 1 + 0.1 * torch.randn(WIDTH)
    the_same(
        gradients(lambda x, w: original(x, [WIDTH], w, 1e-5), x, weight),
        gradients(lambda x, w: mine(x, [WIDTH], w, 1e-5), x, weight),
    )
    sliced = x[:, :, :16]  # not contiguous
    the_same(
        gradients(lambda x, w: original(x[..., :16], [16], w[:16], 1e-5), x, weight),
        gradients(lambda x, w: mine(x[..., :16], [16], w[:16], 1e-5), x, weight),
    )
    assert torch.equal(mine(sliced, [16]), original(sliced, [16]))
    assert torch.equal(
        mine(x.double(), [WIDTH], weight.double(), 1e-5), original(x.double(), [WIDTH], weight.double(), 1e-5)
    )


STRIDES = {
    "contiguous": lambda torch, *shape: torch.randn(shape),
    "transposed": lambda torch, *shape: torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1),
    "every second": lambda torch, *shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "last dimension outermost": lambda torch, *shape: torch.randn(shape[-1], *shape[:-1]).movedim(0, -1),
    "one row for all": lambda torch, *shape: torch.randn(1, *shape[1:]).expand(shape),
    "one number for all": lambda torch, *shape: torch.ones(()).expand(shape),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_fast_functions_take_any_strides(torch, dtype):
    """Values and gradients for every layout of input and gradient in memory, in each dtype.

    A norm of queries gets the transposed gradient that attention hands back; a sum hands back one number for all.
    """
    from itertools import product

    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.common.embeddings import rope_utils

    from course_lib.ranks.cpu import kernels

    dtype = getattr(torch, dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-6}
    shape, weight, angles = (6, 2, 4, 16), torch.randn(16, dtype=dtype), torch.randn(6, 1, 1, 16)
    norm, rotate = torch.nn.functional.rms_norm, rope_utils._apply_rotary_pos_emb_bshd
    swiglu_back = fused_bias_swiglu.swiglu_back
    functions = {
        kernels.rms_norm: (norm, lambda f, x, w: f(x, [16], w, 1e-6), (weight,)),
        kernels.rotate: (rotate, lambda f, x: f(x, angles), ()),
    }
    for (mine, (original, call, others)), one, two in product(functions.items(), STRIDES.values(), STRIDES.values()):
        x, grad = (make(torch, *shape).to(dtype) for make in (one, two))
        results = []
        for function in (original, partial(mine, original)):
            leaves = [tensor.detach().requires_grad_() for tensor in (x, *others)]
            out = call(function, *leaves)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, **tolerance)
    for one, two, finer in product(STRIDES.values(), STRIDES.values(), (dtype, torch.float32)):
        y, g = one(torch, 6, 4, 16).to(dtype), two(torch, 6, 4, 8).to(finer)
        torch.testing.assert_close(kernels.swiglu_back(swiglu_back, g, y), swiglu_back(g, y), **tolerance)


def test_a_norm_keeps_one_tensor(torch):
    """The planner counts on it: the normal form and one number a token, and no second copy of the input."""
    from course_lib.ranks.cpu import kernels

    x = torch.randn(SEQUENCE, BATCH, WIDTH, requires_grad=True)
    weight = torch.ones(WIDTH, requires_grad=True)

    def kept(function) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x, [WIDTH], weight, 1e-5)
        del out
        return sum(sizes.values())

    tokens = SEQUENCE * BATCH
    assert kept(partial(kernels.rms_norm, torch.nn.functional.rms_norm)) == 4 * (tokens * WIDTH + tokens + WIDTH)
    assert kept(torch.nn.functional.rms_norm) > 4 * 2 * tokens * WIDTH


def test_rotary_embedding_gives_megatrons_numbers(torch):
    """Plain rotation, with different angles in the two halves as well, on a slice of a larger tensor.

    The same angles serve at every scale and in every format.
    """
    from megatron.core.models.common.embeddings import rope_utils

    from course_lib.ranks.cpu import kernels

    original = rope_utils._apply_rotary_pos_emb_bshd
    mine = partial(kernels.rotate, original)
    angles = torch.randn(SEQUENCE, 1, 1, 8)
    for dtype in (torch.float32, torch.float64):
        t = torch.randn(SEQUENCE, BATCH, 3 * HEADS, 8, dtype=dtype)
        for scale in (1.0, 1.3):
            the_same(
                gradients(lambda t, s=scale: original(t[:, :, :HEADS], angles, mscale=s), t),
                gradients(lambda t, s=scale: mine(t[:, :, :HEADS], angles, mscale=s), t),
            )


@pytest.mark.parametrize("options", [{"rotary_interleaved": True}, {"mla_rotary_interleaved": True}, {"narrow": True}])
def test_other_rotations_are_megatrons_own(torch, options):
    """Interleaved pairs, latent attention, and a rotation of a part of each head go the way they always went."""
    from megatron.core.models.common.embeddings import rope_utils

    from course_lib.ranks.cpu import kernels

    original = rope_utils._apply_rotary_pos_emb_bshd
    narrow = options.pop("narrow", False)
    angles, t = torch.randn(SEQUENCE, 1, 1, 4 if narrow else 8), torch.randn(SEQUENCE, BATCH, HEADS, 8)
    assert torch.equal(kernels.rotate(original, t, angles, **options), original(t, angles, **options))


def test_the_gradient_of_swiglu_is_megatrons(torch):
    """The formula upstream writes out is the one torch has."""
    from megatron.core.fusions import fused_bias_swiglu

    from course_lib.ranks.cpu import kernels

    original = fused_bias_swiglu.swiglu_back
    original = getattr(original, "__wrapped__", original)
    g, y = torch.randn(SEQUENCE, BATCH, WIDTH), torch.randn(SEQUENCE, BATCH, 2 * WIDTH)
    the_same([original(g, y)], [kernels.swiglu_back(original, g, y)])


def test_the_largest_logit_is_the_largest(torch):
    """The same maximum, and the same tensor of logits."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    from course_lib.ranks.cpu import kernels

    original = VocabParallelCrossEntropy.calculate_logits_max
    logits = torch.randn(SEQUENCE, BATCH, 50)
    mine = kernels.calculate_logits_max(original, logits)
    assert mine[0] is logits and torch.equal(mine[1], original(logits)[1])


def test_loggers_know_their_new_level(bridge):
    """Whoever asked a logger before Bridge set its level, asks it again."""
    import logging

    from megatron.training.utils import log_utils

    from course_lib.ranks.cpu import megatron

    logger = logging.getLogger("megatron.bridge.of_a_test")
    logger.setLevel(logging.ERROR)
    before = logging.root.level
    assert not logger.isEnabledFor(logging.INFO)
    try:
        megatron.setup_logging(log_utils.setup_logging, logging_level=logging.INFO, filter_warning=False)
        assert logger.isEnabledFor(logging.INFO)
        assert "_clear_cache" not in vars(logging.root.manager)
    finally:
        logging.root.setLevel(before)


def test_a_configuration_is_made_of_plain_values(bridge, tmp_path, monkeypatch):
    """Field by field, and in its refusals, it is what upstream makes with OmegaConf."""
    import yaml
    from megatron.bridge.recipes import llama, nemotronh, qwen
    from megatron.bridge.training.config import ConfigContainer
    from megatron.training.config import container
    from megatron.training.config import instantiate_utils as upstream

    from course_lib import recipes
    from course_lib.ranks.cpu import megatron

    def made(how, content):
        try:
            return how(content, mode=upstream.InstantiationMode.STRICT)
        except upstream.InstantiationException as refused:
            return str(refused.__cause__ or refused).splitlines()[0]

    plain, first, second = partial(megatron.instantiate, None), tmp_path / "first.yaml", tmp_path / "second.yaml"
    for recipe in (
        llama.llama32_1b_peft_config,
        nemotronh.nemotron_3_nano_pretrain_config,
        qwen.qwen3_30b_a3b_sft_config,
    ):
        with recipes.offline():
            cfg = recipe()
        cfg.to_yaml(str(first))
        content = yaml.load(first.read_text(), Loader=yaml.CSafeLoader)
        one = ConfigContainer.from_dict(content)
        with monkeypatch.context() as patched:
            patched.setattr(container, "instantiate", plain)
            other = ConfigContainer.from_dict(content)
        for section, value in vars(one).items():
            assert type(value) is type(getattr(other, section)), section
        other.to_yaml(str(second))
        assert first.read_text() == second.read_text()
    activation = "torch.nn.functional.silu"
    for content in (
        {"_target_": activation, "_call_": False},
        {"_target_": activation, "_call_": False, "inplace": True},
        {"a": {"_target_": activation, "_call_": False, "_partial_": False}},
        {"_target_": "megatron.core.transformer.enums.AttnMaskType", "_args_": [1], "_name_": "causal"},
        {"_target_": activation, "_partial_": True, "inplace": True},
        {"_target_": "os.system", "command": "true"},
        {"_target_": "torch.no_such_thing"},
        {"_target_": "megatron.core.optimizer.OptimizerConfig", "no_such_field": 1},
        {"_target_": "megatron.core.optimizer.OptimizerConfig", "lr": 0.5, "optimizer": "sgd"},
        {"a": [1, {"_target_": "torch.bfloat16", "_call_": False}, [None, {"b": 2}]]},
    ):
        one, other = made(upstream.instantiate, content), made(plain, content)
        assert repr(one) == repr(other), content


def rank_losses(_: str) -> None:
    """In each of two ranks, with half of the ids: values, gradients and messages are upstream's."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import cross_entropy

    from course_lib.ranks.cpu import kernels

    dist.init_process_group("gloo")
    group, size = dist.group.WORLD, 40
    mine = cross_entropy._VocabParallelCrossEntropy
    upstream = mine.__bases__[0]
    assert upstream.__module__ == cross_entropy.__name__ and mine.__module__ == kernels.__name__
    kernels.IN_CACHE = 5 * size  # several blocks of rows, the last one short
    logits = 9 * torch.randn(12, 3, 2 * size, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(36).view(12, 3) * 7 % (2 * size)
    here = logits[..., group.rank() * size :][..., :size]
    for smoothing in (0.0, 0.1):
        both = [
            gradients(lambda x, k=kind, s=smoothing: k.apply(x * 1, ids, s, group), here) for kind in (upstream, mine)
        ]
        the_same(*both)
        assert both[0][1].abs().sum() > 1
    whole = torch.nn.functional.cross_entropy(logits.view(36, -1), ids.view(-1), reduction="none").view(12, 3)
    the_same([whole], [mine.apply(here.clone(), ids, 0.0, group)])
    dist.destroy_process_group()


def test_the_loss_over_a_divided_vocabulary_is_megatrons(in_ranks, tmp_path: Path):
    """Ids of both halves, in blocks of rows; smoothed labels too."""
    in_ranks(rank_losses, tmp_path, ranks=2)


def rank_shards(_: str) -> None:
    """In each of four ranks: both collectives against what they must give, and other reductions as torch does them."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import dist_reduce_scatter_func as distributed_optimizers_own
    from torch.distributed.distributed_c10d import _coalescing_manager

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group, alone = dist.group.WORLD, dist.new_group([rank], use_local_synchronization=True)
    whole = torch.arange(8.0) * 10**rank
    ones = sum(10**r for r in range(size))
    expected = torch.arange(8.0)[2 * rank : 2 * rank + 2] * ones

    apart = torch.full((2,), -1.0)
    for output in (apart, whole[2 * rank : 2 * rank + 2]):  # the last one lies within its own input
        with _coalescing_manager(group):
            dist.reduce_scatter_tensor(output, whole, group=group)
        assert torch.equal(output, expected), (output, expected)
    mean = torch.zeros(2)
    with _coalescing_manager(group):
        distributed_optimizers_own(mean, torch.arange(8.0) * 10**rank, op=dist.ReduceOp.AVG, group=group)
    assert torch.equal(mean, expected / size), mean
    gathered = torch.zeros(8)
    for target in (gathered, whole):
        with _coalescing_manager(group):
            dist.all_gather_into_tensor(target, expected.clone(), group=group)
        assert torch.equal(target, torch.arange(8.0) * ones), target

    largest = torch.zeros(2)
    with _coalescing_manager(group):
        dist.reduce_scatter_tensor(largest, torch.arange(8.0) + rank, op=dist.ReduceOp.MAX, group=group)
    assert torch.equal(largest, torch.arange(8.0)[2 * rank : 2 * rank + 2] + size - 1), largest

    mine, copy = torch.arange(4.0), torch.zeros(4)
    with _coalescing_manager(alone):
        dist.reduce_scatter_tensor(copy, mine, group=alone)
    assert torch.equal(copy, mine)
    dist.destroy_process_group()


def test_shards_go_straight_to_where_they_belong(in_ranks, tmp_path: Path):
    """Sums and gathers are exact, within their own buffer too; a maximum and a group of one work as before."""
    in_ranks(rank_shards, tmp_path, ranks=4)


def rank_groups(_: str) -> None:
    """In each of two ranks: many groups work, keep their own limit of time, and wake one thread."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    def loops() -> int:
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return sum(name.startswith("gloo_tcp_loop") for name in names)

    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=60 + number)) for number in range(5)]
    for number, group in enumerate(groups):
        gathered = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(gathered, torch.tensor([float(dist.get_rank())]), group=group)
        assert gathered == [torch.zeros(1), torch.ones(1)]
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=60 + number)
    assert loops() == 1, loops()
    dist.destroy_process_group()


def test_groups_share_one_thread_that_watches(in_ranks, tmp_path: Path):
    """gloo would start one for each group, and each would wake up a hundred times a second."""
    in_ranks(rank_groups, tmp_path, ranks=2)

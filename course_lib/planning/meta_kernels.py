"""What stands in for a GPU while a model without memory is built and run: a device, kernels, and a router's choice.

Every stand-in takes the place of a name inside Megatron Core, for the duration of one block.  torch itself, and with it
`torch.cuda`, stays as it is: Megatron's modules look at torch through `_Torch`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from course_lib.stack import local_layers
from course_lib.stack.patches import Patches, applied

if TYPE_CHECKING:
    import torch

_CORE = "megatron.core"


class _Torch:
    """torch, as a module sees it that asks for the current GPU and is to get the meta device."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self.cuda = SimpleNamespace(**(vars(torch.cuda) | {"current_device": lambda: torch.device("meta")}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


@contextmanager
def standing_in(*, fused: bool, experts: int, chosen: int, one_for_all: bool = True) -> Iterator[None]:
    """Build and run Megatron's layers on the meta device inside this block.

    Args:
        fused: Kernels keep what Transformer Engine's keep; else what the local layers of a CPU rank keep.
        experts: Routed experts of a layer, 0 for none.
        chosen: Routed experts that a token goes to.
        one_for_all: Build one of a rank's experts, marked with how many it stands for; they are alike.
    """
    import torch

    def norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
        return _norm(config, hidden_size, eps=eps, fused=fused)

    random, moe = f"{_CORE}.tensor_parallel.random", f"{_CORE}.transformer.moe"
    answers = {
        f"{random}.CudaRNGStatesTracker.fork": lambda self, name="": contextlib.nullcontext(),
        f"{random}._get_all_rng_states": lambda: (),
        f"{_CORE}.transformer.dot_product_attention.DotProductAttention.forward": _attention(fused),
        f"{_CORE}.transformer.attention.Attention._checkpointed_attention_forward": _recomputed_attention,
        f"{_CORE}.transformer.torch_norm.WrappedTorchNorm.__new__": norm,
        f"{_CORE}.models.common.language_module.language_module.te_parallel_cross_entropy": _loss,
        f"{moe}.moe_logging._MOE_METRICS_TRACKER": None,  # losses of the router are logged in a global object
        f"{_CORE}.transformer.multi_token_prediction.MTPLossLoggingHelper.tracker": {},  # as those of tokens ahead
        f"{moe}.token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream": object(),
        f"{moe}.token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": _stays_here,
        f"{moe}.token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess": _balanced(experts, chosen),
        f"{moe}.token_dispatcher.MoEAllGatherTokenDispatcher.dispatch_postprocess": _balanced_here(experts, chosen),
        f"{moe}.moe_layer.HAVE_TE": True,  # upstream demands its linear layer around experts in a latent space
        f"{moe}.moe_layer.TELinear": _duplicated(),
        f"{_CORE}.ssm.gated_delta_net.common.HAVE_FLA": True,  # it can be built, and not run
        f"{_CORE}.ssm.gated_delta_net.gdn.chunk_gated_delta_rule": object(),
        "megatron.bridge.peft.utils.version": lambda _: local_layers.VERSION,
        **_mamba(fused),
        **_meta_torch(),
    }
    mine, gemma = Patches(local_layers.PATCHES), "megatron.bridge.models.gemma.gemma2_provider"
    flex, why = f"{gemma}.Gemma2FlexDotProductAttention.forward", "flex attention keeps what flash attention keeps"
    mine.sets(_attention(fused), flex, why=why, late=gemma)
    for target, answer in answers.items():
        mine.sets(answer, target, why="a model without memory has no GPU")
    if one_for_all:
        mine.replaces(f"{moe}.experts.SequentialMLP.__init__", why="the experts of a rank are alike")(
            _one_expert_for_all
        )
    with applied(local_layers.patches()), applied(mine), torch.device("meta"):
        yield


def _meta_torch() -> dict[str, Any]:
    """torch as each module of Megatron sees it: who asks for the current GPU, whatever the model's own device, gets meta."""
    import torch

    mine, modules = _Torch(), [name for name in sys.modules if name.startswith("megatron.")]
    return {f"{name}.torch": mine for name in modules if vars(sys.modules[name]).get("torch") is torch}


def _keeping(keep: Any, shape: Any) -> Any:
    """A function for autograd that computes nothing and keeps the tensors that a fused kernel keeps."""
    import torch

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            out = shape(*inputs)
            ctx.save_for_backward(*keep(out, *inputs))
            ctx.like = [tensor.shape for tensor in inputs]
            return out

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(grad.new_empty(size) for size in ctx.like)

    return Kernel.apply


def _attention(fused: bool) -> Any:
    """Flash attention keeps its inputs, its output and one fp32 number for each row of scores.

    The values are a view of the product of query, key and value, which then lives as long as they do.  Transformer Engine
    copies them where they lie in memory in another way than the keys, as after rotary positions, and the product goes.

    Source: Transformer Engine ``pytorch/attention/dot_product_attention/utils.py`` ``get_qkv_layout``.
    """
    import torch

    def forward(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        if fused and key.stride() != value.stride():
            value = value.contiguous()
        rows = query.shape[0] * query.shape[1] * query.shape[2]
        with torch.no_grad():  # the two products, so that a counter of operations sees them; on meta they cost nothing
            heads = [tensor.movedim(0, 2) for tensor in (query, key, value)]
            heads[1:] = [tensor.repeat_interleave(query.shape[2] // key.shape[2], dim=1) for tensor in heads[1:]]
            torch.matmul(torch.matmul(heads[0], heads[1].transpose(2, 3)), heads[2])
        return _keeping(
            lambda out, *inputs: (*inputs, out, query.new_empty(rows, dtype=torch.float32)),
            lambda *_: query.new_empty(*query.shape[:2], query.shape[2] * value.shape[3]),
        )(query, key, value)

    return forward


def _recomputed_attention(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Attention that is computed again in the backward pass keeps its inputs only."""
    return _keeping(
        lambda _, *inputs: inputs, lambda *_: query.new_empty(*query.shape[:2], query.shape[2] * value.shape[3])
    )(query, key, value)


def _loss(logits: Any, labels: Any, *_: Any, **__: Any) -> Any:
    """Transformer Engine's loss keeps the logits in the model's dtype, and writes their gradient over them."""
    import torch

    return _keeping(
        lambda _, logits: (logits,),
        lambda logits: logits.new_empty(logits.shape[:2], dtype=torch.float32),
    )(logits)


def _norm(config: Any, hidden_size: int, *, eps: float, fused: bool) -> Any:
    """A fused norm keeps its input and one fp32 number for each token; that of a CPU rank keeps the normal form."""
    import torch

    if not fused and config.normalization == "LayerNorm":
        return torch.nn.LayerNorm(hidden_size, eps=eps, dtype=config.params_dtype)

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
            if config.normalization == "LayerNorm":
                self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            numbers = x.new_empty(x.shape[:-1], dtype=torch.float32)
            kept = x if fused else torch.empty_like(x)
            return _keeping(lambda *_: (kept, numbers), lambda x, _: torch.empty_like(x))(x, self.weight)

    return Norm()


def _one_expert_for_all(original: Any, self: Any, num_local_experts: int, *others: Any, **named: Any) -> None:
    """One expert is built, marked with how many it stands for, and gets the tokens of all."""
    original(self, 1, *others, **named)
    for parameter in self.parameters():
        parameter.stands_for = num_local_experts


def _spread(total: int, parts: int) -> torch.Tensor:
    """A number of tokens over so many experts, as evenly as whole numbers allow."""
    import torch

    sizes = [total // parts + (part < total % parts) for part in range(parts)]
    return torch.tensor(sizes, dtype=torch.long, device="cpu")


def _balanced(experts: int, chosen: int) -> Any:
    """Sizes that the all-to-all dispatcher reads off the routing map, if every expert gets equally many tokens."""

    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        self.num_out_tokens = routing_map.shape[0] * chosen
        mine = self.local_expert_indices
        by_rank = _spread(self.num_out_tokens, experts).view(self.ep_size, self.num_local_experts)
        to_me = by_rank[mine[0] // self.num_local_experts]
        self.input_splits = by_rank.sum(1).tolist()
        self.output_splits = [int(to_me.sum())] * self.ep_size
        if self.ep_size > 1 or self.tp_size > 1:
            self.output_splits_tp = to_me.sum().repeat(self.tp_size) * self.ep_size
        self.num_global_tokens_per_local_expert = to_me.repeat(self.tp_size * self.ep_size, 1)
        return to_me * self.tp_size * self.ep_size

    return preprocess


def _stays_here(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Sizes are on the CPU already: there is nothing to copy and nothing to wait for."""
    return tokens_per_expert


def _balanced_here(experts: int, chosen: int) -> Any:
    """As the all-gather dispatcher, which counts the tokens of its experts, if each expert gets equally many."""

    def dispatch_postprocess(self: Any, hidden_states: Any, probs: Any) -> tuple[Any, Any, Any]:
        from megatron.core.transformer.moe.moe_utils import permute

        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        self.hidden_shape_before_permute = hidden_states.shape
        self.local_map = self.routing_map[:, mine].contiguous()
        sizes = _spread(self.local_map.shape[0] * chosen, experts)[mine]
        tokens = int(sizes.sum())
        permuted, _, self.reversed_local_input_permutation_mapping, _, _ = permute(
            hidden_states, self.local_map, num_out_tokens=tokens
        )
        mask = self.local_map.T.contiguous()
        select = _keeping(lambda _, flat: (flat, mask), lambda flat: flat.new_empty(tokens))  # masked_select keeps both
        self.local_probs = select(probs[:, mine].contiguous().T.contiguous())
        self.routing_map = None
        return permuted, sizes, self.local_probs

    return dispatch_postprocess


def _duplicated() -> type:
    import torch

    class Duplicated(torch.nn.Module):
        """The shape of Transformer Engine's linear layer: one weight, the same on every rank."""

        def __init__(self, inputs: int, outputs: int, **_: object) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype)), None

    return Duplicated


def _mamba(fused: bool) -> dict[str, Any]:
    """Mamba layers: a GPU's kernels keep their inputs and the output before the gate; those of a CPU rank are torch's own.

    Source: state-spaces/mamba ``mamba_ssm/ops/triton/ssd_combined.py`` and ``layernorm_gated.py``, Dao-AILab/causal-conv1d
    ``causal_conv1d_interface.py``: what each function saves for its backward pass.
    """
    import torch
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from course_lib.stack import state_space

    def whole(projected: Any, _: Any, __: Any, ___: Any, A: Any, *, D: Any, headdim: int | None, **____: Any) -> Any:
        like = projected.new_empty((*projected.shape[:2], len(A) * (headdim or D.shape[1])))
        return _keeping(lambda _, kept: (kept, torch.empty_like(like)), lambda _: like)(projected)

    def scan(x: Any, dt: Any, _: Any, B: Any, C: Any, chunk_size: int, *, z: Any = None, **__: Any) -> Any:
        batch, length, heads, _ = x.shape
        decays = x.new_empty(batch, heads, -(-length // chunk_size), chunk_size, dtype=torch.float32)
        before_the_gate = [] if z is None else [z, torch.empty_like(x)]
        return _keeping(
            lambda out, *them: (*them, decays, *(before_the_gate or [out])), lambda x, *_: torch.empty_like(x)
        )(x, dt, B, C)

    def convolution(x: Any, weight: Any, bias: Any, **_: Any) -> Any:
        return _keeping(lambda _, *them: them, lambda x, *_: torch.empty_like(x))(x, weight, bias)

    class GatedNorm(torch.nn.Module):
        """The shape of mamba-ssm's gated RMSNorm, which keeps its input and one fp32 number for each token and group."""

        def __init__(self, channels: int, *, group_size: int, device: Any = None, dtype: Any = None, **_: Any) -> None:
            super().__init__()
            self.groups = channels // group_size
            self.weight = torch.nn.Parameter(torch.empty(channels, device=device, dtype=dtype))

        def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
            numbers = x.new_empty((*x.shape[:-1], self.groups), dtype=torch.float32)
            kept = [x] if z is None else [x, z]
            return _keeping(lambda *_: (*kept, numbers), lambda x, *_: torch.empty_like(x))(*kept, self.weight)

    here = {
        "mamba_split_conv1d_scan_combined": whole,
        "mamba_chunk_scan_combined": scan,
        "causal_conv1d_fn": convolution,
        "ExtendedRMSNorm": GatedNorm,
        "MAMBA_HAS_STATE_DTYPE": True,  # the states of chunks, in whatever dtype, are computed again
    }
    if not fused:
        here = {name: getattr(state_space, name) for name in here if hasattr(state_space, name)}
        here["ExtendedRMSNorm"] = state_space.GatedRMSNorm
    here["HAVE_MAMBA_SSM"] = True
    norm = f"{_CORE}.post_training.modelopt.hybrid.model_specs.Norm"
    return {f"{_CORE}.ssm.mamba_mixer.{name}": value for name, value in here.items()} | {norm: WrappedTorchNorm}

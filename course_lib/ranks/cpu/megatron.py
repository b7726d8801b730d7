"""Redirections of Megatron Core 0.19.2 and Megatron-Bridge 0.6.2 beyond the device.

Most of them answer a fault that pip users meet on GPUs too; the reason says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from course_lib.ranks.cpu import context, delta, gloo, rng
from course_lib.stack import local_layers
from course_lib.stack.redirection import Redirection

__all__ = ["redirections"]


def _no_compile(_: object) -> Callable:
    def compile_helpers() -> None:
        return None

    return compile_helpers


def _initialise_on_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_model(*args: object, **kwargs: object) -> object:
        kwargs["use_cpu_initialization"] = True
        return original(*args, **kwargs)

    return get_model


def _plain_queue(_: object) -> Callable:
    def get_write_results_queue(mp_mode: str | None = None) -> object:
        import queue

        return queue.Queue()

    return get_write_results_queue


def _state_with_empty_adam(original: Callable) -> Callable:
    @functools.wraps(original)
    def state_dict(self: object) -> dict:
        import torch

        if self.optimizer is not None and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }
        return original(self)

    return state_dict


def _state_keeps_step(original: Callable) -> Callable:
    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self: object, model_param: object, tensors: dict) -> None:
        # None tells upstream to keep what is there
        tensors = tensors if "step" in tensors else {**tensors, "step": None}
        original(self, model_param, tensors)

    return _set_main_param_and_optimizer_states


def _own_step_each(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_state_dict(self: object, state_dict: dict) -> None:
        import torch

        original(self, state_dict)
        if self.optimizer is not None:
            step = float(state_dict["optimizer"]["param_groups"][0]["step"])
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(step)

    return load_state_dict


def _fp8_if_asked(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: object, fp8: object = None) -> None:
        original(self, fp8 or None)

    return init


def _share_by_copy(_: object) -> Callable:
    def _get_share_storage() -> Callable:
        def share_storage(to: object, source: object) -> None:
            memory = source.untyped_storage()
            to.untyped_storage().resize_(memory.nbytes())
            to.untyped_storage().copy_(memory)

        return share_storage

    return _get_share_storage


def _an_experts_bias_is_no_part(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: object, *args: object, **options: object) -> None:
        original(self, *args, **options)
        if self.bias is not None and (self.is_expert or self.tp_group.size() == 1):
            self.bias.sequence_parallel = False

    return init


def _te_gathers_no_norm(original: Callable) -> Callable:
    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        return "1.4" if distribution_name == "transformer-engine" else original(distribution_name)

    return version


def _norm_with_sequence_parallel(_: object) -> Callable:
    def new_norm(
        cls: type,
        config: object,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str | None = None,
        **_: object,
    ) -> object:
        import torch

        class ZeroCentredRMSNorm(torch.nn.RMSNorm):
            def reset_parameters(self) -> None:
                torch.nn.init.zeros_(self.weight)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)

        class ZeroCentredLayerNorm(torch.nn.LayerNorm):
            def reset_parameters(self) -> None:
                torch.nn.init.zeros_(self.weight)
                torch.nn.init.zeros_(self.bias)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                weight = 1 + self.weight
                return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)

        kinds = {
            ("RMSNorm", False): torch.nn.RMSNorm,
            ("RMSNorm", True): ZeroCentredRMSNorm,
            ("LayerNorm", False): torch.nn.LayerNorm,
            ("LayerNorm", True): ZeroCentredLayerNorm,
        }
        kind = kinds.get((config.normalization, bool(config.layernorm_zero_centered_gamma)))
        if kind is None:
            raise ValueError(f"normalization={config.normalization!r} is unknown: use 'RMSNorm' or 'LayerNorm'")
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return new_norm


def redirections() -> list[Redirection]:
    """Every redirection of Megatron that a CPU rank needs, in the order in which they are applied."""
    optimizer = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    without_te = "torch's AdamW keeps `step` per parameter, which upstream loses on resume without Transformer Engine"
    prebuilt = "the wheel ships helpers_cpp built but no Makefile: `make` fails and rank 0 exits, on GPUs too"
    return [
        Redirection("megatron.core.datasets.utils.compile_helpers", _no_compile, "no effect", prebuilt),
        Redirection("megatron.bridge.training.initialize.compile_helpers", _no_compile, "no effect", prebuilt),
        *rng.megatron_redirections(),
        Redirection(
            "megatron.bridge.models.model_provider.get_model",
            _initialise_on_cpu,
            "use_cpu_initialization=True",
            "the model is on the CPU anyway, and the same seed then gives the same weights at every TP size",
            ("use_cpu_initialization",),
        ),
        Redirection(
            "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
            _plain_queue,
            "a plain queue",
            "upstream spawns a manager process that re-imports the main module (65 s, then EOFError)",
            ("mp_mode",),
        ),
        Redirection(
            f"{optimizer}.state_dict", _state_with_empty_adam, "creates Adam's state first", without_te, ("self",)
        ),
        Redirection(
            f"{optimizer}._set_main_param_and_optimizer_states",
            _state_keeps_step,
            "keeps `step` where the checkpoint has none",
            without_te,
            ("self", "model_param", "tensors"),
        ),
        Redirection(
            f"{optimizer}.load_state_dict",
            _own_step_each,
            "one `step` tensor per parameter",
            "upstream shares one tensor, which every parameter then increments: the loss drifts silently",
            ("self", "state_dict"),
        ),
        *gloo.redirections(),
        *context.redirections(),
        *delta.redirections(),
        Redirection(
            "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
            _fp8_if_asked,
            "FP8 only if asked for",
            "upstream takes the default for FP8 (`is not None`) and then misses Transformer Engine",
            ("self", "fp8"),
        ),
        Redirection(
            "megatron.core.tensor_parallel.random._get_share_storage",
            _share_by_copy,
            "copies the storage",
            "upstream compiles a C++ extension on first use, in every rank",
            (),
        ),
        Redirection(
            "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
            _norm_with_sequence_parallel,
            "marks its parameters as sequence parallel; a weight may be counted from one",
            "upstream's plain norm refuses sequence parallelism, which MoE with TP>1 demands, and Gemma's weights",
            ("cls", "config", "hidden_size", "eps"),
        ),
        Redirection(
            "megatron.core.tensor_parallel.layers.RowParallelLinear.__init__",
            _an_experts_bias_is_no_part,
            "an expert's bias is not marked as sequence parallel",
            "its gradient is added up by the expert's own groups; upstream adds it up once more for each TP rank",
            ("input_size", "output_size", "is_expert"),
        ),
        *(
            Redirection(
                f"megatron.core.tensor_parallel.layers.{name}",
                local_layers.unless_alone,
                "nothing, in a group of one",
                "upstream returns its input from a function of autograd, to which an expert's bias cannot be added in place",
                ("input_", "group"),
            )
            for name in ("reduce_from_tensor_model_parallel_region", "reduce_scatter_to_sequence_parallel_region")
        ),
        Redirection(
            "megatron.core.models.hybrid.hybrid_block.TENorm",
            lambda _: _torch_norm(),
            "torch's norm",
            "Transformer Engine is absent",
        ),
        Redirection(
            "megatron.bridge.models.gemma.gemma2_provider._HAVE_FLEX_ATTN",
            lambda _: False,
            "False: Gemma 2's own plain attention",
            "torch's flex attention has no gradient on a CPU",
            late=True,
        ),
        *(
            Redirection(
                f"megatron.bridge.peft.utils.{name}",
                lambda kinds: tuple(kind for kind in kinds if kind is not None),
                "without None",
                "LoRA asks isinstance for each class; the grouped one is absent without Transformer Engine",
            )
            for name in ("TECL", "TERL")
        ),
        Redirection(
            "megatron.bridge.peft.utils.version",
            _te_gathers_no_norm,
            "1.4 for transformer-engine",
            "its metadata is absent; from 1.5 on LoRA expects the norm's output gathered, which Core's layers never do",
            ("distribution_name",),
        ),
        Redirection(
            "megatron.bridge.training.comm_overlap.HAVE_TE",
            lambda _: False,
            "False",
            "upstream takes the stand-in for the package",
        ),
    ]


def _torch_norm() -> type:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm

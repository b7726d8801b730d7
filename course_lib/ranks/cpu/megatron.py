"""What Megatron Core 0.19.2 and Megatron-Bridge 0.6.2 need beyond the device.

Most of it answers a fault that pip users meet on GPUs too; `why` says which.
"""

from __future__ import annotations

import json
import logging
import os
import secrets

import numpy as np
import torch
import torch.distributed as dist

from course_lib import stack
from course_lib.stack import local_layers
from course_lib.stack.patches import Patches

PATCHES = Patches([*local_layers.PATCHES, *stack.HELPERS])
CORE, BRIDGE = "megatron.core", "megatron.bridge"
OPTIMIZER = f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer"
LAYERS, RANDOM = f"{CORE}.tensor_parallel.layers", f"{CORE}.tensor_parallel.random"
BUFFERS: dict[str, object] = {}
LOSES_STEP = "torch's AdamW keeps `step` per parameter, which upstream loses on resume without Transformer Engine"

PATCHES.sets(
    False,
    f"{BRIDGE}.training.comm_overlap.HAVE_TE",
    why="upstream takes the stand-in for the package",
)
PATCHES.sets(
    False,
    f"{BRIDGE}.models.gemma.gemma2_provider._HAVE_FLEX_ATTN",
    why="torch's flex attention has no gradient on a CPU: Gemma 2's own plain attention has",
    late=f"{BRIDGE}.models.gemma.gemma2_provider",
)


@PATCHES.replaces(
    "megatron.training.config.container.instantiate",
    why="it makes an OmegaConf node of each value first, in four fifths of the time that reading a configuration takes, and "
    "what only OmegaConf could answer was refused",
)
def instantiate(_, config, *, mode):
    """The same objects, made of the plain values."""
    return _made(config, "", mode)


def _made(node, place, mode):
    """What upstream's `instantiate_node` makes of a node, by upstream's own steps.

    Source: megatron-core 0.19.2 `megatron/training/config/instantiate_utils.py`, `instantiate_node`.
    """
    from megatron.training.config import instantiate_utils as upstream

    if isinstance(node, list):
        return [_made(item, f"{place}[{number}]", mode) for number, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    within = {key: (value, f"{place}.{key}".removeprefix("."), mode) for key, value in node.items()}
    if "_target_" not in node:
        return {key: _made(*each) for key, each in within.items()}
    called = node.get("_call_", True)
    target = upstream._resolve_target(node["_target_"], place, check_callable=called)
    if not called:
        if extra := node.keys() - {"_target_", "_call_"}:
            words = f"_call_ was set to False for target {node['_target_']}, but extra keys were found: {extra}"
            raise upstream.InstantiationException(words)
        return target
    says_how = ("_target_", "_call_", "_partial_", "_name_")
    values = {key: _made(*each) for key, each in within.items() if key not in says_how}
    values = upstream._filter_kwargs_for_target(target, values, place, mode)
    return upstream._call_target(target, node.get("_partial_", False), (), values, place)


@PATCHES.replaces(
    f"{BRIDGE}.models.model_provider.get_model",
    why="the model is on the CPU anyway, and the same seed then gives the same weights at every TP size",
)
def get_model(original, *args, use_cpu_initialization=None, **kwargs):
    """use_cpu_initialization=True."""
    return original(*args, use_cpu_initialization=True, **kwargs)


@PATCHES.replaces(
    f"{CORE}.parallel_state.get_global_memory_buffer",
    why="Core's own attention asks for it even where a model gets its groups as arguments; Transformer Engine's does not",
)
def get_global_memory_buffer(original):
    """One of the rank's own until Megatron has set up its groups."""
    from megatron.core import parallel_state, utils

    if parallel_state._GLOBAL_MEMORY_BUFFER is not None:
        return original()
    return BUFFERS.setdefault("own", utils.GlobalMemoryBuffer())


@PATCHES.replaces(
    f"{BRIDGE}.training.initialize._warmup_jit_function",
    why="nothing is compiled in a CPU rank, and twenty passes of the model's size cost a tenth of a start",
)
def warm_up(_, model_config, micro_batch_size):
    """Nothing; what dropout draws for a seed begins without its draws."""


@PATCHES.replaces(
    f"{BRIDGE}.training.setup.setup_logging",
    why="after each of some hundred loggers upstream has all loggers of a process forget what they know of their levels",
)
def setup_logging(original, *args, **options):
    """They forget it once, at the end."""
    manager = logging.root.manager
    manager._clear_cache = lambda: None
    try:
        original(*args, **options)
    finally:
        del manager._clear_cache
        manager._clear_cache()


@PATCHES.replaces(f"{OPTIMIZER}.state_dict", why=LOSES_STEP)
def state_dict(original, self):
    """Creates Adam's state first."""
    if self.optimizer is not None and not self.optimizer.state:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
    return original(self)


@PATCHES.replaces(f"{OPTIMIZER}._set_main_param_and_optimizer_states", why=LOSES_STEP)
def set_states(original, self, model_param, tensors):
    """Keeps `step` where the checkpoint has none: None tells upstream to keep what is there."""
    original(self, model_param, tensors if "step" in tensors else {**tensors, "step": None})


@PATCHES.replaces(
    f"{OPTIMIZER}.load_state_dict",
    why="upstream shares one tensor, which every parameter then increments: the loss drifts silently",
)
def load_state_dict(original, self, state_dict):
    """One `step` tensor per parameter."""
    original(self, state_dict)
    if self.optimizer is not None:
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)


@PATCHES.makes(f"{RANDOM}._get_share_storage", why="upstream compiles a C++ extension on first use, in every rank")
def get_share_storage(_):
    """Copies the storage."""

    def share_storage(to, source):
        memory = source.untyped_storage()
        to.untyped_storage().resize_(memory.nbytes())
        to.untyped_storage().copy_(memory)

    return lambda: share_storage


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """A norm whose weight is counted from one, as the next."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


NORMS = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCentredRMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCentredLayerNorm,
}


@PATCHES.replaces(
    f"{CORE}.transformer.torch_norm.WrappedTorchNorm.__new__",
    why="upstream's plain norm refuses sequence parallelism, which MoE with TP>1 demands, and Gemma's weights",
)
def norm(_, cls, config, hidden_size, eps=1e-5, **__):
    """Marks its parameters as sequence parallel; a weight may be counted from one."""
    kind = NORMS.get((config.normalization, bool(config.layernorm_zero_centered_gamma)))
    if kind is None:
        raise ValueError(f"normalization={config.normalization!r} is unknown: use 'RMSNorm' or 'LayerNorm'")
    made = kind(hidden_size, eps=eps)
    for parameter in made.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return made


@PATCHES.replaces(
    f"{LAYERS}.RowParallelLinear.__init__",
    why="its gradient is added up by the expert's own groups; upstream adds it up once more for each TP rank",
)
def row_parallel_init(original, self, *args, **options):
    """An expert's bias is not marked as sequence parallel."""
    original(self, *args, **options)
    if self.bias is not None and (self.is_expert or self.tp_group.size() == 1):
        self.bias.sequence_parallel = False


@PATCHES.replaces(
    f"{BRIDGE}.peft.utils.version",
    why="its metadata is absent; from 1.5 on LoRA expects the norm's output gathered, which Core's layers never do",
)
def version(original, distribution_name):
    """1.4 for transformer-engine."""
    return "1.4" if distribution_name == "transformer-engine" else original(distribution_name)


@PATCHES.replaces(
    f"{CORE}.datasets.gpt_dataset.GPTDataset._build_document_sample_shuffle_indices",
    why="mock data is 205 million tokens: with short sequences each rank would spend longer on their order than on a step",
)
def sample_order(original, self):
    """The order of mock samples is built by rank 0, and seen there by the ranks of its machine; of no samples there is none."""
    if self.config.mock and not self.config.path_to_cache and self.num_samples == 0:
        self.indices = self.indices[:1]  # a run that does not validate asks for none: one document of 100,000 will do
    if not self.config.mock or self.config.path_to_cache or not dist.is_initialized() or dist.get_world_size() == 1:
        return original(self)
    store = dist.distributed_c10d._get_default_store()
    key = f"order-{self.unique_description_hash}-{self.index_split.name}"
    try:
        if dist.get_rank() == 0:  # upstream has it build first, with a barrier after it
            store.set(key, json.dumps([_shown(array) for array in original(self)]))
        return tuple(_seen(*place) for place in json.loads(store.get(key))) if store.check([key]) else original(self)
    except OSError:  # on another machine, in a container of its own, or where a sandbox gives no such memory
        return original(self)


def _shown(array: np.ndarray) -> tuple[str, str]:
    """A path at which other processes see a copy of an array while this one lives, and the name that they must find there."""
    name = f"order-{secrets.token_hex(8)}"
    descriptor = os.memfd_create(name)
    with open(descriptor, "wb", closefd=False) as file:
        np.save(file, array)
    return f"/proc/{os.getpid()}/fd/{descriptor}", name


def _seen(path: str, name: str) -> np.ndarray:
    """Another process's array, in its memory.

    Raises:
        OSError: If it cannot be seen from here, or is something else.
    """
    if name not in os.readlink(path):
        raise OSError(f"{path} is not {name}")
    return np.load(path, mmap_mode="r")

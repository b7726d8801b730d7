"""A small model in any layout, what the course says of it, and what Megatron says, without other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course_lib.planning import layout

LLAMA = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 128}


def reasons(cfg: Any, ranks: int) -> list[str]:
    """The refusals of a configuration, as a learner reads them."""
    return [str(refusal) for refusal in layout.check(cfg, ranks)]


def sizes(tensor: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1) -> dict[str, int]:
    """The four sizes of a layout, by the names of their fields."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
        "expert_model_parallel_size": expert,
    }


@contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """A torch process group without other processes: enough for every constructor and group builder of Megatron."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "another test left a process group behind"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Group:
    """A process group of any size: constructors ask only for its size and rank."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def provider(**changed: Any) -> Any:
    """The small model as Bridge's provider, built on a CPU, with some fields changed."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    fields = dict(LLAMA) | {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "params_dtype": torch.float32,
        "transformer_layer_spec": local_layer_spec,
        "transformer_impl": "local",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "vocab_size": 256,
        "seq_length": 32,
    }
    return GPTModelProvider(**(fields | changed))


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message with which Megatron refuses, or nothing."""
    try:
        call(*args, **kwargs)
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""

"""What the ranks of a check do: the only processes of a check that touch a GPU.

A GPU rank imports what it needs while the check before it still has the GPU, and waits at a gate.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import stack
from course_lib.common import files
from course_lib.machine.gpu.check import GATE
from course_lib.ranks import train

if TYPE_CHECKING:
    import torch


def wait_at_the_gate() -> None:
    """Until the check that has the GPU has left it; CPU ranks are started later instead."""
    gate = os.environ.get(GATE)
    while gate and not os.path.exists(gate):
        time.sleep(0.05)


def rank_main(run_directory: str, cfg: Any = None) -> None:
    """The course's own training, after the gate; leaves what the allocator reserved in `allocator.json`."""
    import torch
    from megatron.bridge.training.pretrain import pretrain  # noqa: F401

    wait_at_the_gate()
    keys = {"reserved_bytes": "reserved_bytes.all.peak", "allocated_bytes": "allocated_bytes.all.peak"}
    keys |= {"retries": "num_alloc_retries"}

    class Watching:
        peaks: dict[str, int] = dict.fromkeys(keys, 0)

        def on_train_step_end(self, context: object) -> None:
            if stack.device(1) == "cuda":
                stats = torch.cuda.memory_stats()
                self.peaks = {name: max(self.peaks[name], stats.get(key, 0)) for name, key in keys.items()}
                files.write_text(Path(run_directory) / "allocator.json", json.dumps(self.peaks))

    train.rank_main(run_directory, cfg, callbacks=[Watching()])


def rates(asked: dict[str, Any]) -> dict[str, Any]:
    """bf16 products of random matrices, and copies within the GPU: medians, by the GPU's own events."""
    import torch

    wait_at_the_gate()
    device = torch.device("cpu" if asked["dry"] else "cuda")
    size, size_bytes, repeats = (64, 2**16, 3) if asked["dry"] else (8192, 2**32, 20)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    found: dict[str, Any] = {"bf16_tflops": 2 * size**3 / _seconds(lambda: a @ b, repeats, asked["dry"]) / 1e12}
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_second"] = 2 * size_bytes / _seconds(lambda: target.copy_(source), repeats, asked["dry"]) / 1e9
    if not asked["dry"]:
        found |= {"capability": list(torch.cuda.get_device_capability()), "nccl": list(torch.cuda.nccl.version())}
        found |= {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    return found


def _seconds(work: Callable[[], object], repeats: int, dry: bool) -> float:
    """Median seconds of one call, after three that warm up."""
    import torch

    times = []
    for number in range(repeats + 3):
        if dry:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        if number >= 3:
            times.append(seconds)
    return statistics.median(times)


def layers(asked: dict[str, Any]) -> dict[str, Any]:
    """One layer by Transformer Engine's names and one by Core's own, equal weights, forward and backward.

    On a GPU both compute in bf16 and are held against Core's own layer in fp32; on a CPU both are fp32, and the names of
    Transformer Engine are stand-ins.
    """
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    wait_at_the_gate()
    train.meet()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    hidden, length, dry = (64, 32, True) if asked["dry"] else (2048, 1024, False)
    device = torch.device("cpu" if dry else "cuda")

    def layer(spec: object, dtype: torch.dtype) -> torch.nn.Module:
        shape = TransformerConfig(
            num_layers=1, hidden_size=hidden, num_attention_heads=hidden // 16 if dry else 32, num_query_groups=4 if dry else 8,
            ffn_hidden_size=4 * hidden, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
            add_bias_linear=False, normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype,
            bf16=dtype == torch.bfloat16, persist_layer_norm=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
            gradient_accumulation_fusion=False, layernorm_epsilon=1e-5,
        )  # fmt: skip
        return build_module(spec, config=shape, layer_number=1).to(device=device, dtype=dtype)

    low = torch.float32 if dry else torch.bfloat16
    reference = layer(specs.get_gpt_layer_local_spec(normalization="RMSNorm"), torch.float32)
    built = {"local": layer(specs.get_gpt_layer_local_spec(normalization="RMSNorm"), low),
             "te": layer(specs.get_gpt_layer_with_transformer_engine_spec(), low)}  # fmt: skip
    weights = {_fused(name): value for name, value in reference.state_dict().items() if value is not None}
    for module in built.values():
        own = module.state_dict()
        module.load_state_dict(
            {name: weights[_fused(name)].to(low) for name in own if _fused(name) in weights}, strict=False
        )
        missing = [name for name, one in module.named_parameters() if _fused(name) not in weights]
        if missing:
            raise KeyError(f"no counterpart of {missing} among {sorted(weights)}")
    torch.manual_seed(1)
    x = torch.randn(length, 1, hidden, device=device)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
    wanted = _passed(reference, x, mask)
    found: dict[str, Any] = {
        name: {part: _off(value, wanted[part]) for part, value in _passed(module, x.to(low), mask).items()}
        for name, module in built.items()
    }
    classes = {name: type(module.self_attention.linear_qkv).__name__ for name, module in built.items()}
    return found | {"notes": {"hidden": hidden, "tokens": length, "dtype": str(low), "linear_qkv": classes}}


def _fused(name: str) -> str:
    """Transformer Engine keeps a norm inside the layer behind it; Core's own is a layer beside it."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def _passed(layer: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    x = x.clone().requires_grad_()
    out, _ = layer(x, attention_mask=mask)
    out.float().square().mean().backward()
    gradients = {_fused(name): one.grad.float().flatten() for name, one in layer.named_parameters()}
    return {"output": out.detach(), "gradient of the input": x.grad,
            "gradient of the weights": torch.cat([gradients[name] for name in sorted(gradients)])}  # fmt: skip


def _off(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error ||value - wanted|| / ||wanted||."""
    return float((value.float() - wanted.float()).norm() / wanted.float().norm())


def save_fresh(asked: dict[str, Any]) -> str:
    """Build a configuration's model with fresh weights and save it as Bridge does, without an optimizer.

    Args:
        asked: `config`, a file that Bridge wrote, and `to`, the folder of the checkpoint.
    """
    import torch
    from megatron.bridge.training.model_load_save import save_megatron_model

    from course_lib.planning import activations
    from course_lib.stack import devices

    cfg = train.read_config(Path(asked["config"]))
    devices.apply(cfg, stack.device(1))
    model = activations.as_a_gpu_has_it(cfg).model
    wait_at_the_gate()
    train.meet()
    model.finalize()
    modules = model.provide_distributed_model(wrap_with_ddp=False)
    save_megatron_model(modules, asked["to"])
    torch.distributed.barrier()
    return asked["to"]

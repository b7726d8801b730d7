"""In a rank: how many tokens chose which expert, by NVIDIA's own tracer of routers.

`RouterTracer` hooks every router and keeps the choices of each token.  Megatron-LM's training loop drives it; Bridge has
none, so a callback does it here.  What is written is the count for each expert, not each token's choices: a row a layer and
microbatch, because each microbatch sends its own messages.

Source: megatron-core transformer/moe/router_trace.py @ 0.19.2
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.common import files
from course_lib.common.config import Fields

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import CallbackContext

ONLY = "router"
"""The value of `record` that asks for the routers' choices and nothing else."""


def unrecorded(cfg: Any, device: str) -> str:
    """Why the routers of a configuration cannot be recorded, and the fix; empty if they can.

    Args:
        cfg: A Bridge `ConfigContainer`, or `config.yaml` read back.
        device: Where the ranks are, `"cpu"` or `"cuda"`; CPU ranks capture no graphs.
    """
    get = Fields.of(cfg).model
    if not get("num_moe_experts"):
        return "the model has no experts, so it has no routers: record=True records its messages"
    if (factor := get("moe_expert_capacity_factor")) is not None:
        return (
            f"moe_expert_capacity_factor={factor} drops choices, and NVIDIA's tracer leaves out every microbatch in which a "
            "token has fewer than its top-k experts: set it to None"
        )
    if get("mtp_num_layers") or "/" in get("hybrid_layer_pattern", ""):
        return "layers that predict tokens ahead have routers of their own, which are not counted: set mtp_num_layers to None"
    if device == "cuda" and (graphs := get("cuda_graph_impl", "none")) != "none":
        return f"cuda_graph_impl={graphs!r} replays the routers without the hooks of NVIDIA's tracer: set it to 'none'"
    return ""


def _note_in_forward(note: Callable, *choices: Any) -> None:
    """Leave out a router that runs again inside of a backward pass, where its layer is recomputed: it chooses the same."""
    import torch

    if torch._C._current_autograd_node() is None:
        note(*choices)


class RouterLosses:
    """Bridge's event for Megatron's record of the routers' losses, which the stages of a pipeline add up.

    A router makes the record with one number for each layer of the model.  In a stage of a hybrid without experts Bridge
    makes it with one for each layer of experts; arrays of different lengths would then meet, which NCCL does not notice.

    Source: megatron-bridge 0.6.2 `training/utils/train_utils.py`; megatron-core 0.19.2 `transformer/moe/moe_logging.py`.
    """

    def on_train_start(self, context: CallbackContext) -> None:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        model = context.state.cfg.model
        if model.num_moe_experts:
            for name in ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss"):
                get_moe_metrics_tracker().ensure_initialized(name, model.num_layers + (model.mtp_num_layers or 0))


class Routers:
    """Bridge's events for NVIDIA's tracer: appends to `router.jsonl` after each training step of this rank.

    Raises:
        RuntimeError: In a step for which the tracer does not have every microbatch once.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path, rank
        self.chunks: list[tuple[Any, Any]] = []

    def on_train_start(self, context: CallbackContext) -> None:
        from megatron.core.transformer.moe.router_trace import RouterTracer
        from megatron.core.utils import unwrap_model

        for chunk in context.model:
            with tempfile.TemporaryDirectory() as folder:  # for the tracer's own file, which stays empty
                tracer = RouterTracer(folder, max_steps=sys.maxsize, rank=self._rank, training_mode=True)
            tracer._record = functools.partial(_note_in_forward, tracer._record)
            tracer.register_hooks(chunk)
            self.chunks.append((tracer, unwrap_model(chunk).decoder.layers))

    def on_train_step_start(self, context: CallbackContext) -> None:
        for tracer, _ in self.chunks:
            tracer.records.clear()  # an evaluation's

    def on_train_step_end(self, context: CallbackContext) -> None:
        import torch
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        torch.cuda.synchronize()  # a GPU may still be copying choices; no effect in a CPU rank
        rows, expected = [], get_num_microbatches()
        for tracer, layers in self.chunks:
            chosen = defaultdict(list)
            for record in tracer.records:
                chosen[layers[record["layer"]].layer_number].append(record["_top_indices_tensor"])
            for layer, microbatches in chosen.items():
                if len(microbatches) != expected:
                    raise RuntimeError(
                        f"NVIDIA's tracer has {len(microbatches)} microbatches of the router in layer {layer} instead of "
                        f"{expected}: it leaves out those in which a token has fewer than its top-k experts"
                    )
                for microbatch, indices in enumerate(microbatches):
                    tokens = indices.flatten().bincount(minlength=context.state.cfg.model.num_moe_experts).tolist()
                    row = {"rank": self._rank, "step": context.state.train_state.step + 1, "layer": layer}
                    rows.append(json.dumps(row | {"microbatch": microbatch, "tokens": tokens}))
            tracer.records.clear()
        files.append_lines(self._path / "router.jsonl", rows)

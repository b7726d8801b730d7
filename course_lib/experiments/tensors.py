"""What a rank really holds: bytes of live tensors after a step, and of what one forward pass leaves for the backward.

A run whose target is :data:`TARGET` trains as every run does, and each rank answers what it held::

    run = launch.run(cfg, ranks=8, name="measured", target=tensors.TARGET)
    tensors.read(run)

States are summed over the objects that hold them, and only what lies on the rank's device counts.  Activations are
measured another way than they are planned: torch's profiler reports every allocation and release while the first
micro-batch of a step goes forward.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

from course_lib import stack

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from course_lib.runs import Run

__all__ = ["TARGET", "beside_the_plan", "rank_main", "read"]

TARGET = "course_lib.experiments.tensors:rank_main"
COLUMNS = ("rank", "weights_bytes", "gradients_bytes", "optimizer_bytes", "live_bytes", "activations_bytes")


def read(run: Run) -> pd.DataFrame:
    """What each rank of a run held.

    Args:
        run: A run that was started with ``target=tensors.TARGET`` and had at least two steps.

    Returns:
        One row a rank: ``weights_bytes``, ``gradients_bytes``, ``optimizer_bytes``; ``live_bytes`` of all tensors that
        Python can reach after a step; ``activations_bytes`` that the forward pass of one micro-batch left allocated.

    Raises:
        ValueError: If the run did not measure its tensors.
    """
    import pandas as pd

    rows = [answer for answer in run.answers() if answer]
    if not rows:
        raise ValueError(f"run {run.name!r} measured no tensors: start it with target=tensors.TARGET, 2 steps or more")
    return pd.DataFrame(rows, columns=list(COLUMNS)).sort_values("rank").set_index("rank")


def beside_the_plan(cfg: Any, run: Run) -> dict[str, tuple[int, int]]:
    """Planned and measured bytes of rank 0 by component, the plan made for the number formats of the run's own device.

    Args:
        run: As for `read`.
    """
    from course_lib.planning import memory
    from course_lib.stack import devices

    ranks, in_ranks = len(read(run)), devices.applied(cfg, run.launch["device"])
    states = memory.states(in_ranks, ranks=ranks)[0]
    kept = memory.activations(in_ranks, ranks=ranks)
    held = read(run).loc[0]
    return {
        "weights": (states.weights_bytes, int(held.weights_bytes)),
        "gradients": (states.gradients_bytes, int(held.gradients_bytes)),
        "optimizer": (states.optimizer_bytes, int(held.optimizer_bytes)),
        "activations": (kept.per_microbatch_bytes + kept.loss_bytes, int(held.activations_bytes)),
    }


def rank_main(run_directory: str, cfg: Any = None) -> dict[str, int] | None:
    """One rank: `course_lib.ranks.train.rank_main`, and a callback that measures tensors."""
    from course_lib.ranks import train

    measuring = _Measuring()
    train.rank_main(run_directory, cfg, callbacks=[measuring])
    return {"rank": int(os.environ["RANK"])} | measuring.found if measuring.found else None


class _Measuring:
    """Measures in the second step: the buffers exist then, and the optimizer has its states."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_train_step_start(self, context: Any) -> None:
        if context.state.train_state.step == 1:
            _watch_one_forward(_as_list(context.model), self.found)

    def on_train_step_end(self, context: Any) -> None:
        if context.state.train_state.step == 1:
            self.found |= _states(_as_list(context.model), context.optimizer)
            self.found["live_bytes"] = _bytes(item for item in gc.get_objects() if _counts(item))


def _states(chunks: list[Any], optimizer: Any) -> dict[str, int]:
    weights = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer.grad_data for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    mine = {tensor.untyped_storage().data_ptr() for tensor in (*weights, *buffers)}
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    moments = [
        tensor
        for part in parts
        if part.optimizer is not None
        for parameter, state in part.optimizer.state.items()
        for tensor in (parameter, *state.values())
        if _counts(tensor) and tensor.untyped_storage().data_ptr() not in mine
    ]
    return {
        "weights_bytes": _bytes(weights),
        "gradients_bytes": _bytes(buffers),
        "optimizer_bytes": _bytes(moments),
    }


def _watch_one_forward(chunks: list[Any], found: dict[str, int]) -> None:
    from megatron.core.utils import unwrap_model
    from torch.autograd.profiler import profile  # torch.profiler, around it, imports the compiler: half a second a rank

    watched = profile(profile_memory=True, use_kineto=True)
    handles = []

    def begin(*_: Any) -> None:
        handles.pop(0).remove()
        watched.__enter__()

    def end(chunk: Any, inputs: Any, output: torch.Tensor) -> None:
        handles.pop(0).remove()
        watched.__exit__(None, None, None)
        on_gpu = stack.device(1) == "cuda"
        # The records themselves.  torch's table of events gives a record to every operation that runs at the time, so
        # what gloo's threads allocate and release while a rank waits would count twice.
        records = watched.kineto_results.events()
        found["activations_bytes"] = sum(
            record.nbytes()
            for record in records
            if record.name() == "[memory]" and (str(record.device_type()) == "DeviceType.CUDA") == on_gpu
        )
        if not getattr(unwrap_model(chunk), "post_process", True):
            found["activations_bytes"] -= output.nbytes  # freed as soon as the next stage has it

    handles += [chunks[0].register_forward_pre_hook(begin), chunks[0].register_forward_hook(end)]


def _as_list(model: Any) -> list[Any]:
    return list(model) if isinstance(model, list | tuple) else [model]


def _counts(item: object) -> bool:
    """True for a tensor in the memory of the rank's device: a GPU rank has a few on the CPU, too."""
    import torch

    is_real = isinstance(item, torch.Tensor) and type(item).__name__ != "FakeTensor"
    return is_real and item.device.type == stack.device(1)


def _bytes(tensors: Any) -> int:
    """Bytes of the storages behind tensors, each counted once however many tensors look at it."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return sum(storages.values())

"""Checkpoints that are written while the training goes on hold the step at which they were asked for."""

from __future__ import annotations

from pathlib import Path

from course_lib import launch, runs
from course_lib.runs import checkpoints
from support import small


def rank_saves(directory: str) -> None:
    """Save, change the weights at once as the next step does, and load: by a writer for each save, and by one that stays."""
    import multiprocessing

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor, load, save
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    worker = multiprocessing.Process(target=lambda: None)  # which no process but a fork can be given
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    rank, size = dist.get_rank(), dist.get_world_size()

    def sharded(weight: torch.Tensor) -> dict[str, ShardedTensor]:
        return {"weight": ShardedTensor.from_rank_offsets("weight", weight, (0, rank, size))}

    for persistent in (False, True):
        calls = AsyncCallsQueue(persistent)
        for step in (1, 2):
            where = Path(directory) / f"{persistent}-{step}"
            where.mkdir(exist_ok=True)
            dist.barrier()
            weight = torch.arange(6.0).view(2, 3) + 10 * rank + 100 * step
            before = weight.clone()
            calls.schedule_async_request(save(sharded(weight), where, async_sharded_save=True, async_strategy="mcore"))
            weight.zero_()
            calls.maybe_finalize_async_calls(blocking=True)
            loaded = load(sharded(torch.empty(2, 3)), where)["weight"]
            assert torch.equal(loaded, before), f"{persistent=}: {loaded} is not {before}"
        calls.close()
        assert multiprocessing.active_children() == []
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_a_checkpoint_holds_the_step_that_asked_for_it(in_ranks, tmp_path: Path) -> None:
    """Upstream's two kinds of writer, twice each, in two ranks."""
    in_ranks(rank_saves, tmp_path, ranks=2)


def test_a_run_goes_on_from_what_was_written_meanwhile(bridge: object, runs_directory: Path) -> None:
    """Every digit after an asynchronous save is that of the run that was not interrupted."""
    fields = {"checkpoint__save_interval": 2, "checkpoint__async_save": True}
    whole = launch.run(small.config(tp=1, train_iters=4, **fields), ranks=2, name="whole", save=True, show=None)
    saved = checkpoints.at(whole, 2).path
    resumed = launch.run(small.config(tp=1, train_iters=4), ranks=2, name="resumed", load=saved, show=None)
    assert resumed.metrics.step.tolist() == [3, 4] and runs.difference(resumed, whole) == 0

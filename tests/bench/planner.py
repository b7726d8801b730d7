"""How long the planner takes for one layout: states of an 8B model, its whole plan, and states of a model with experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from course_lib import recipes
from course_lib.planning import memory
from tests import bench

__all__ = ["figures"]


def figures(*, ranks: int = 8) -> list[bench.Figure]:
    """Seconds for each layout of Llama 3 8B and of Nemotron 3 Nano on eight ranks; the median of all layouts."""
    from course_lib import stack

    stack.prepare_imports()
    from megatron.bridge.recipes.llama import llama3_8b_pretrain_config
    from megatron.bridge.recipes.nemotronh.h100.nemotron_3_nano import (
        nemotron_3_nano_pretrain_8gpu_h100_bf16_config,
    )

    with recipes.offline():
        llama = llama3_8b_pretrain_config()
    nano = nemotron_3_nano_pretrain_8gpu_h100_bf16_config()
    llama.tokenizer.vocab_size, nano.tokenizer.vocab_size = 128_256, 131_072
    llama.model.context_parallel_size = 1
    cut = [memory.with_layout(llama, tp=tp, pp=pp, sequence_parallel=tp > 1) for tp in (1, 2, 4) for pp in (1, 2)]
    dealt = [memory.with_layout(nano, ep=ep) for ep in (1, 2, 4, 8)]
    return [
        _seconds("planner: states of 8B", memory.states, cut, ranks, must="at most 1", aim="0.1"),
        _seconds("planner: whole plan of 8B", memory.plan, cut, ranks, must="-", aim="1"),
        _seconds("planner: states of Nemotron 3 Nano", memory.states, dealt, ranks, must="at most 1", aim="0.3"),
    ]


def _seconds(name: str, plan: Callable[..., Any], cfgs: list[Any], ranks: int, *, must: str, aim: str) -> bench.Figure:
    plan(cfgs[0], ranks=ranks)  # the first one imports
    samples = []
    for cfg in cfgs:
        begin = time.perf_counter()
        plan(cfg, ranks=ranks)
        samples.append(time.perf_counter() - begin)
    return bench.figure(name, samples, "s", must, aim, "each layout once")

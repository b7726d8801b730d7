"""The smallest thing that N ranks can do together: say who they are, and add up their numbers."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from course_lib import launch
from course_lib.ranks import train

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ranks"]


def ranks(count: int, *, wait_seconds: float = 180.0) -> pd.DataFrame:
    """Start so many ranks, let them add their numbers over gloo, or over NCCL on GPUs, and show what each of them saw.

    Args:
        count: Number of ranks, at least 1.

    Returns:
        One row a rank: `rank`, `pid`, `sum` (what the all-reduce returned), `cuda` (what `torch.cuda.is_available()`
        says in the rank), `seconds` (from the request until the rank was ready), `import_seconds` (how long the process
        that it is a copy of had imported the stack; a rank on a GPU is no copy, and has imported it itself).

    Raises:
        ValueError: If `count` is below 1.
        RunFailed: If a rank did not answer; names the first one and its cause.
    """
    import pandas as pd

    started = time.time()
    answers = launch.call("course_lib.experiments.hello:say_hello", ranks=count, limit_seconds=wait_seconds)
    frame = pd.DataFrame(answers)
    frame["seconds"] = (frame.pop("alive") - started).round(2)
    frame["import_seconds"] = frame.pop("import_seconds").round(1)
    return frame.set_index("rank")


def say_hello(_: None) -> dict:
    """What each rank does."""
    alive = time.time()
    import torch

    train.meet()
    rank = torch.distributed.get_rank()
    number = torch.tensor(float(rank), device="cuda")  # which is the CPU in a CPU rank
    torch.distributed.all_reduce(number)
    answer = {"rank": rank, "pid": os.getpid(), "sum": int(number), "cuda": torch.cuda.is_available(), "alive": alive}
    return answer | {"import_seconds": _import_seconds(alive)}


def _import_seconds(alive: float) -> float:
    """What importing the stack took: in the process of which this one is a fork, or in this one since it began."""
    import psutil

    preload = sys.modules.get("course_lib.ranks.preload")
    return preload.import_seconds if preload else alive - psutil.Process().create_time()

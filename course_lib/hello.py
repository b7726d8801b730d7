"""The smallest thing that N ranks can do together: say who they are, and add up their numbers."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib import runs, warm

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ranks"]


def ranks(count: int, *, wait_seconds: float = 180.0) -> pd.DataFrame:
    """Start so many CPU ranks, let them add their numbers over gloo, and show what each of them saw.

    Args:
        count: Number of ranks, at least 1.
        wait_seconds: Give up after so long.

    Returns:
        One row a rank: `rank`, `pid`, `sum` (what the all-reduce returned), `cuda` (what `torch.cuda.is_available()`
        says in the rank), `seconds` (from the request until the rank was alive), `import_seconds` (how long the process
        that it is a copy of had imported the stack).

    Raises:
        ValueError: If `count` is below 1.
        RuntimeError: If a rank did not answer; the end of the launcher's log says why.
    """
    import pandas as pd

    if count < 1:
        raise ValueError(f"count={count}: there must be at least one rank")
    with tempfile.TemporaryDirectory(prefix="course-hello-") as work:
        started = time.time()
        answers = warm.answers("course_lib.hello:say_hello", Path(work), ranks=count, limit_seconds=wait_seconds)
    frame = pd.DataFrame(answers)
    frame["seconds"] = (frame.pop("alive") - started).round(2)
    frame["import_seconds"] = frame.pop("import_seconds").round(1)
    return frame.set_index("rank")


def say_hello(work: str) -> None:
    """What each rank does; `RANK` is in the environment."""
    alive = time.time()
    import torch

    from course_lib import preload  # this process is a fork of one that has imported it

    torch.distributed.init_process_group("gloo")
    number = torch.tensor(float(os.environ["RANK"]))
    torch.distributed.all_reduce(number)
    rank = torch.distributed.get_rank()
    answer = {"rank": rank, "pid": os.getpid(), "sum": int(number), "cuda": torch.cuda.is_available(), "alive": alive}
    answer["import_seconds"] = preload.import_seconds
    runs.write_json(Path(work) / f"rank_{rank}.json", answer)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

"""What a step frees is there for the next one."""

from __future__ import annotations

import subprocess
import sys

from course_lib.common.project import PROJECT

PAGES = """
import resource
import torch
from course_lib.common import heap

def pages(rounds):
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        made = [torch.zeros(2**22) for _ in range(8)] + [torch.zeros(2**24)]
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = pages(6)
heap.keep_memory()
print(by_default, pages(10))
"""


def test_a_tensor_of_the_next_step_takes_the_place_of_the_last():
    """By default a tensor of 64 MiB gets pages that the kernel clears first; kept, a step's tensors get the old ones."""
    ran = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, cwd=PROJECT, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    by_default, kept = map(int, ran.stdout.split())
    assert by_default > 10 * max(kept, 1), (by_default, kept)

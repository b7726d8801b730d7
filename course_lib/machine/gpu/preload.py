"""What the process imports that the checks' processes are forked from; it never touches a GPU.

Configurations are built and planned there as on a laptop: the kernels of a GPU are hidden, so that nothing reaches CUDA
before a rank does.  Ranks are processes of their own, which see everything.
"""

from __future__ import annotations

import contextlib
import sys

__all__: list[str] = []

if sys.argv == ["-c"]:  # multiprocessing starts its fork server so; in any other process importing this does nothing
    with contextlib.suppress(Exception):  # a check that needs it says why it does not import
        from course_lib import recipes, stack
        from course_lib.machine.gpu import jobs  # noqa: F401

        stack.hide_gpu_packages()
        stack.prepare_imports()
        import megatron.bridge.recipes.llama
        import megatron.bridge.recipes.nemotronh  # noqa: F401

        with recipes.offline():  # what it changes, each check would import by itself
            pass

"""Imported once by the fork server; every CPU rank is a fork of that process.

This module and `preload_automodel` do something when they are imported: they are what a fork server preloads.  Rules for
what happens here: nothing that starts threads, one torch thread, and `host.imported_once`.  How long it took stays in
`import_seconds`, which every fork inherits.
"""

from __future__ import annotations

import os
import time

from course_lib.ranks.cpu import host

_begin = time.monotonic()
os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

with host.imported_once():
    from course_lib import runs  # noqa: F401
    from course_lib.common.project import untested_allowed
    from course_lib.planning import layout  # noqa: F401
    from course_lib.ranks import cpu, recording, routing, train  # noqa: F401
    from course_lib.runs import checkpoints, failures  # noqa: F401
    from course_lib.stack import devices  # noqa: F401

    cpu.activate(allow_untested=untested_allowed())
    import torch

    torch.set_num_threads(1)
    import torch.distributed.launcher.api
    from megatron.bridge.data import megatron_mimo  # noqa: F401 (this and the next: each rank would import them late)
    from megatron.bridge.training.finetune import finetune  # noqa: F401
    from megatron.bridge.training.gpt_step import forward_step  # noqa: F401
    from megatron.bridge.training.pretrain import pretrain  # noqa: F401
    from megatron.core.tokenizers.text import models  # noqa: F401
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend  # noqa: F401 (as would each agent)

import_seconds = time.monotonic() - _begin

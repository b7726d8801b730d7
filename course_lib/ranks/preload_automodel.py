"""Imported once by a fork server of its own; the ranks that train with NeMo AutoModel are forks of that process.

As `preload`, with torch changed and nothing else: AutoModel asks for Transformer Engine by looking for its name, and would
take a stand-in for it.
"""

from __future__ import annotations

import os
import time

from course_lib.ranks.cpu import host

_begin = time.monotonic()
os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

with host.imported_once():
    from course_lib.common.project import untested_allowed
    from course_lib.ranks import cpu, recording, train  # noqa: F401
    from course_lib.runs import failures  # noqa: F401

    cpu.activate(allow_untested=untested_allowed(), torch_alone=True)
    import torch

    torch.set_num_threads(1)
    import nemo_automodel.components.datasets.llm  # noqa: F401  each run looks for its data here, and patches peft
    import peft  # noqa: F401
    import torch.distributed.launcher.api
    from nemo_automodel.recipes.llm import train_ft  # noqa: F401

import_seconds = time.monotonic() - _begin

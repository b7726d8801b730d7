"""The order of mock samples is upstream's, and rank 0 builds it for the ranks of its machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


def orders(sizes: tuple[int, int, int] = (40, 8, 8)) -> list[tuple[Any, Any, Any]]:
    """Documents, samples and their order of the three splits, as this rank gets them from upstream's builder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers import MegatronTokenizer

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=512,
        split="8,1,1",
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=1024),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    built = BlendedMegatronDatasetBuilder(MockGPTDataset, list(sizes), lambda: True, config).build()
    return [(each.document_index, each.sample_index, each.shuffle_index) for each in built]


def rank_orders(_: str) -> None:
    """What a rank builds where rank 0 cannot show it, or the rank cannot see it; and what all see of rank 0's."""
    import numpy as np
    import torch.distributed as dist

    from course_lib.ranks.cpu import megatron

    alone = orders()
    dist.init_process_group("gloo")

    def refused(*_: Any) -> Any:
        raise OSError("not here")

    for what in ("_shown", "_seen", ""):  # what a rank cannot do
        with mock.patch.object(megatron, what, refused) if what else contextlib.nullcontext():
            together = orders()
        for split in range(3):
            assert all(np.array_equal(*pair) for pair in zip(alone[split], together[split], strict=True))
            assert all(isinstance(array, np.memmap) is not bool(what) for array in together[split])
    trained, unused, _ = orders((40, 0, 8))
    assert all(np.array_equal(*pair) for pair in zip(alone[0], trained, strict=True))
    assert len(unused[0]) == 1 and len(unused[2]) < 100 < len(alone[1][2]), "of a split that nobody reads"
    dist.barrier()
    dist.destroy_process_group()


def test_rank_0_builds_the_order_for_all(in_ranks, tmp_path: Path):
    """Equal to what one rank builds, and where rank 0 cannot be seen each rank builds its own."""
    in_ranks(rank_orders, tmp_path, ranks=3)


def test_another_processes_file_is_not_taken_for_it():
    """On another machine the same path may exist, and be something else."""
    import numpy as np

    from course_lib.ranks.cpu import megatron

    path, name = megatron._shown(np.arange(5))
    assert megatron._seen(path, name).tolist() == [0, 1, 2, 3, 4]
    for where, called in ((path, "order-of-another"), ("/proc/self/fd/9999", name)):
        with pytest.raises(OSError, match="is not|No such file"):
            megatron._seen(where, called)

"""What lesson A breaks: small token files, data sets, checkpoints and packages, made in a second and without ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from course_lib import stack
from course_lib.runs import checkpoints

__all__ = ["checkpoint_with_code", "corpus", "hollow_package", "interrupted_save", "overheard", "samples", "tokenizer"]

LENGTH = 33  # ids of a document
SEQUENCE = 16  # tokens of a sample
VOCABULARY = 64


class _Tokenizer:
    """What Megatron's data sets ask of a tokenizer."""

    eod = 0
    vocab_size = VOCABULARY
    unique_identifiers = {"class": "museum"}  # noqa: RUF012


def tokenizer() -> Any:
    """A fast tokenizer of transformers that knows two words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"museum": 0, "failure": 1}, unk_token="museum"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@contextmanager
def overheard(shows: Callable[[str], object]) -> Iterator[None]:
    """Hand the errors of a `make` that the block starts by `subprocess.run` to `shows`, when the block ends.

    What a child process writes of itself reaches a notebook late, and may be printed below the next cell.
    """

    def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        done = start(*command, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        heard.extend(line for line in done.stdout.splitlines() if "***" in line)
        return done

    start, heard = subprocess.run, []
    try:
        with mock.patch.object(subprocess, "run", run):
            yield
    finally:
        for line in heard:
            shows(line)


def hollow_package(folder: Path, name: str) -> Path:
    """A folder in which an empty package has this name; returns the folder, to be put first on the path."""
    package = folder / name
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    return folder


def corpus(prefix: Path, documents: int) -> Path:
    """Write so many documents of 33 ids as `.bin` and `.idx`, over what was there; returns the prefix."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(np.arange(LENGTH) % (VOCABULARY - 1) + 1, [LENGTH])
    builder.finalize(f"{prefix}.idx")
    return prefix


def samples(prefix: Path, *, cache: Path, count: int = 40) -> list[Any]:
    """So many samples of Megatron's own `GPTDataset`, which keeps its order of documents in the cache."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    with stack.quietly():
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=SEQUENCE,
            blend=([str(prefix)], None),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        training, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config).build()
        return [training[number] for number in range(count)]


def interrupted_save(folder: Path, cfg: Any) -> Path:
    """Checkpoints of which step 10 ended and step 20 did not: its directory is empty, and the tracker says 10."""
    for step in (10, 20):
        (folder / f"iter_{step:07d}").mkdir(parents=True, exist_ok=True)
    cfg.to_yaml(str(folder / "iter_0000010" / "run_config.yaml"))
    (folder / checkpoints.TRACKERS[1]).write_text("10")
    return folder


def checkpoint_with_code(folder: Path, marker: Path) -> Path:
    """The index of a checkpoint that makes a file when it is read, and is a valid index otherwise; returns its folder."""
    import pickle

    place = folder / "iter_0000002"
    place.mkdir(parents=True, exist_ok=True)
    (place / ".metadata").write_bytes(pickle.dumps(_Planted(marker)))
    (folder / checkpoints.TRACKERS[1]).write_text("2")
    return place


class _Planted:
    """Pickled as a call of `_run`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return _run, (str(self.marker),)


def _run(marker: str) -> Any:
    """What a stranger may put there: here it makes an empty file."""
    from torch.distributed.checkpoint.metadata import Metadata

    Path(marker).touch()
    return Metadata({}, storage_data={})

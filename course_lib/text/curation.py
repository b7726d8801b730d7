"""NeMo Curator's stages, stepped one after the other in this process, and what they took away.

Curator runs stages on Ray; a stage itself is an object with `setup`, `process` and `teardown`, and needs no cluster.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from nemo_curator.stages.base import ProcessingStage

__all__ = [
    "Stepped",
    "extra",
    "identify",
    "kept",
    "near_duplicates",
    "quiet",
    "sha256",
    "step",
    "taken",
    "tokenizers_of_transformers_5",
    "write",
]

SHINGLE_WORDS = 5
"""Words of a shingle: fewer make common phrases look like copies, more make one changed word count for more."""
PERMUTATIONS = 128
LARGEST_THRESHOLD = 0.98
"""Of so many permutations at least two bands can be made up to here.  Source: datasketch lsh.py @ 2.0, `_optimal_param`."""


@dataclass(frozen=True)
class Stepped:
    """What came out of stages.

    Attributes:
        table: One row a stage: `stage`, `rows` that were left, and `seconds`.
        left: The ids after each stage of documents, in the order of the table.
        tasks: What the last stage returned.
    """

    table: pd.DataFrame
    left: tuple[frozenset[int], ...]
    tasks: tuple[Any, ...]


def quiet() -> None:
    """Let Curator log nothing, and Ray neither report its use nor write an access token into your home."""
    from loguru import logger

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    logger.disable("nemo_curator")


def write(frame: pd.DataFrame, folder: Path, *, partitions: int) -> list[str]:
    """Deal documents out to JSONL files, as shards of a crawl hold them.

    Returns:
        The paths; documents that were made from one another lie in different ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{number}.jsonl" for number in range(partitions)]
    for number, path in enumerate(paths):
        frame.iloc[number::partitions].to_json(path, orient="records", lines=True, force_ascii=False)
    return [str(path) for path in paths]


def flat(stages: Iterable[ProcessingStage]) -> list[ProcessingStage]:
    """The stages that run: a composite one, such as a reader, stands for several."""
    from nemo_curator.stages.base import CompositeStage

    return [
        one
        for stage in stages
        for one in (stage.decompose_and_apply_with() if isinstance(stage, CompositeStage) else [stage])
    ]


def step(stages: Iterable[ProcessingStage]) -> Stepped:
    """Run Curator's stages in this process, one after the other, as its executors do on a cluster.

    Args:
        stages: What you would give `nemo_curator.pipeline.Pipeline`.
    """
    import pandas as pd
    from nemo_curator.tasks import DocumentBatch, EmptyTask

    tasks, rows, left = [EmptyTask()], [], []
    for number, stage in enumerate(flat(stages)):
        begin = time.perf_counter()
        stage.setup_on_node()
        stage.setup()
        tasks = [out for task in tasks for out in _outputs(stage.process(task), task)]
        stage.teardown()
        documents = [task.to_pandas() for task in tasks if isinstance(task, DocumentBatch)]
        left.append(frozenset(id for frame in documents if "id" in frame for id in frame["id"].tolist()))
        count = sum(map(len, documents)) if documents else sum(task.num_items for task in tasks)
        rows.append((f"{number} {stage.name}", count, time.perf_counter() - begin))
    return Stepped(pd.DataFrame(rows, columns=["stage", "rows", "seconds"]), tuple(left), tuple(tasks))


def _outputs(result: Any, task: Any) -> Iterator[Any]:
    """Tasks that came of one task, each named after it; a name decides what a writer calls its file."""
    results = result if isinstance(result, list) else [] if result is None else [result]
    for number, out in enumerate(results):
        out._set_task_id(task.task_id, out.get_deterministic_id() or number)
        yield out


def kept(folder: Path) -> pd.DataFrame:
    """All documents of the JSONL files in a folder, by their id."""
    import pandas as pd

    frames = [pd.read_json(path, lines=True) for path in sorted(folder.glob("*.jsonl")) if path.stat().st_size]
    return pd.concat(frames).sort_values("id", ignore_index=True)


def identify(groups: Iterable[Sequence[int]], path: Path) -> int:
    """Write down which ids to remove: of each group all but the smallest; the file is what Curator's removal stage reads.

    Returns:
        How many ids were written.
    """
    import pandas as pd

    ids = extra(groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"id": pd.Series(ids, dtype="int64")}).to_parquet(path)
    return len(ids)


def extra(groups: Iterable[Sequence[int]]) -> list[int]:
    """Of each group all ids but the smallest.

    >>> extra([[5, 1], [9, 2, 3]])
    [3, 5, 9]
    """
    return sorted({id for group in groups for id in sorted(group)[1:]})


def sha256(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def near_duplicates(frame: pd.DataFrame, *, threshold: float = 0.5) -> list[list[int]]:
    """Groups of documents of which each shares, by estimate, so much of its shingles with another of its group.

    MinHash signatures in bands (LSH), so that only documents that agree in a band are ever compared; `datasketch` does it.

    Args:
        frame: Documents with `id` and `text`.
        threshold: Jaccard similarity of the sets of shingles above which two documents count as one.

    Raises:
        ValueError: If it is no share above 0, or so near 1 that the signatures have no two bands for it.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold={threshold}: a share of common shingles is asked for, above 0 and below 1, such as 0.5"
        )
    from datasketch import MinHash, MinHashLSH
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    try:
        index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    except ValueError:  # its own words are of bands, which nobody gave it
        raise ValueError(
            f"threshold={threshold} is too near 1: {PERMUTATIONS} numbers a document make no two bands for it. "
            f"Give at most {LARGEST_THRESHOLD}; copies that are equal are found by `sha256`"
        ) from None
    signatures = MinHash.bulk([_shingles(text) for text in frame.text], num_perm=PERMUTATIONS)
    for number, signature in enumerate(signatures):
        index.insert(number, signature)
    pairs = [
        (number, other)
        for number, signature in enumerate(signatures)
        for other in index.query(signature)
        if other < number and signature.jaccard(signatures[other]) >= threshold
    ]
    if not pairs:
        return []
    one, other = zip(*pairs, strict=True)
    links = coo_array(([1] * len(pairs), (one, other)), shape=(len(frame), len(frame)))
    _, label = connected_components(links, directed=False)
    groups = frame["id"].groupby(label).agg(list)
    return groups[groups.map(len) > 1].tolist()


def _shingles(text: str) -> set[bytes]:
    words = text.split()
    return {" ".join(words[at : at + SHINGLE_WORDS]).encode() for at in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def taken(frame: pd.DataFrame, removed: dict[str, Iterable[int]]) -> pd.DataFrame:
    """How many documents of each kind each filter takes.

    Args:
        frame: Documents with `id` and `kind`.
        removed: For each filter the ids that it takes.

    Returns:
        One row a filter, one column a kind, in the order of the frame.
    """
    import pandas as pd

    kinds = list(dict.fromkeys(frame.kind))
    kind = frame.set_index("id").kind
    counts = {name: kind.loc[list(ids)].value_counts() for name, ids in removed.items()}
    return pd.DataFrame(counts).T.reindex(columns=kinds).fillna(0).astype(int)


@contextmanager
def tokenizers_of_transformers_5() -> Iterator[None]:
    """Give tokenizers the method back that Curator 1.4's writer calls and transformers 5 took away.

    Source: nemo-curator 1.4.0 `stages/text/io/writer/megatron_tokenizer.py`, transformers 5.12.1 `tokenization_utils_base.py`.
    """
    from transformers import PreTrainedTokenizerBase

    PreTrainedTokenizerBase.batch_encode_plus = lambda self, texts, **options: self(list(texts), **options)
    try:
        yield
    finally:
        del PreTrainedTokenizerBase.batch_encode_plus

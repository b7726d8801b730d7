"""What is inside `.bin` and `.idx`, byte by byte, and what Megatron makes of it: documents, samples, a blend."""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.quiet import quietly

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["ForeignFile", "Index", "datasets", "document", "pieces", "read", "realised_blend"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
WINDOW = 8


class ForeignFile(ValueError):
    """A file is no whole indexed data set; the message names the offset and the reason."""


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says.

    Attributes:
        prefix: Path without suffix.
        type_name: NumPy's name of the type of a token, such as `"uint16"`.
        lengths: Tokens of each document, shape (documents,).
        pointers: Byte offset of each document in `.bin`, shape (documents,).
        table: The layout of the file: offset, bytes, field, value.
    """

    prefix: Path
    type_name: str
    lengths: np.ndarray
    pointers: np.ndarray
    table: pd.DataFrame


def read(prefix: Path) -> Index:
    """Read the index, and refuse files that Megatron would read as nonsense.

    Args:
        prefix: Path without suffix.

    Raises:
        ForeignFile: If a file is missing, foreign, truncated, or the two do not fit each other; names the offset.

    Source: megatron-core 0.19.2 `datasets/indexed_dataset.py`, `_IndexWriter`.
    """
    import numpy as np

    path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for each in (path, data_path):
        if not each.exists():
            raise ForeignFile(f"{each} does not exist: .bin and .idx belong together")
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise ForeignFile(f"{path}, offset 0: begins with {data[:9]!r}, needed {MAGIC!r}: no index of Megatron")
    if len(data) < HEADER_BYTES:
        raise ForeignFile(f"{path}, offset {len(data)}: the file ends inside the header of {HEADER_BYTES} bytes")
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", data, len(MAGIC))
    if version != 1:
        raise ForeignFile(f"{path}, offset 9: version {version}, needed 1")
    if code not in TYPES:
        raise ForeignFile(f"{path}, offset 17: type code {code}, needed one of {sorted(TYPES)}")
    fields, offset = {}, HEADER_BYTES
    for name, kind, count in (
        ("lengths", "<i4", sequences),
        ("pointers", "<i8", sequences),
        ("ends", "<i8", boundaries),
    ):
        size = count * np.dtype(kind).itemsize
        if offset + size > len(data):
            raise ForeignFile(
                f"{path}, offset {len(data)}: the file ends inside the {name}, which need bytes {offset} to "
                f"{offset + size}: it was cut off, write it again"
            )
        fields[name] = np.frombuffer(data, kind, count, offset)
        offset += size
    if offset != len(data):
        raise ForeignFile(f"{path}, offset {offset}: {len(data) - offset} bytes follow the last boundary")
    ends = fields["ends"]
    if not boundaries or ends[0] or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise ForeignFile(
            f"{path}, offset {len(data) - 8 * boundaries}: the document boundaries do not run from 0 to {sequences}"
        )
    item = np.dtype(TYPES[code]).itemsize
    _require_data(data_path, int(fields["lengths"].sum()) * item)
    expected = np.concatenate([[0], np.cumsum(fields["lengths"][:-1], dtype=np.int64)]) * item if sequences else []
    if not np.array_equal(fields["pointers"], expected):
        raise ForeignFile(f"{path}, offset {HEADER_BYTES + 4 * sequences}: pointers do not follow from the lengths")
    return Index(
        prefix, TYPES[code], fields["lengths"], fields["pointers"], _table(code, sequences, boundaries, fields)
    )


def _require_data(path: Path, needed: int) -> None:
    size = path.stat().st_size
    if size != needed:
        what = "was cut off" if size < needed else "belongs to another index"
        raise ForeignFile(f"{path}, offset {min(size, needed)}: has {size} bytes, the index wants {needed}: it {what}")


def _table(code: int, sequences: int, boundaries: int, fields: Mapping[str, np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    def some(values: np.ndarray) -> str:
        return f"{', '.join(map(str, values[:3].tolist()))}, ..."

    rows = [
        (0, 9, "magic", "MMIDIDX and two zeros"),
        (9, 8, "version", "1"),
        (17, 1, "type of a token", f"{code}, {TYPES[code]}"),
        (18, 8, "number of sequences", f"{sequences:,}"),
        (26, 8, "number of boundaries", f"{boundaries:,}"),
        (34, 4 * sequences, "tokens of each sequence", some(fields["lengths"])),
        (34 + 4 * sequences, 8 * sequences, "where each begins in .bin, bytes", some(fields["pointers"])),
        (34 + 12 * sequences, 8 * boundaries, "document boundaries", some(fields["ends"])),
    ]
    return pd.DataFrame(rows, columns=["offset", "bytes", "field", "value"])


def document(index: Index, number: int) -> np.ndarray:
    """The token ids of one document, its end included, read from `.bin`.

    Raises:
        IndexError: If there is no such document.
    """
    import numpy as np

    if not 0 <= number < len(index.lengths):
        raise IndexError(f"document {number}: there are 0 to {len(index.lengths) - 1}")
    return np.fromfile(
        f"{index.prefix}.bin", index.type_name, int(index.lengths[number]), offset=int(index.pointers[number])
    )


def datasets(cfg: Any, *, cache: Path) -> tuple[Any, Any, Any]:
    """The training, validation and test data sets that a run with this configuration reads, built by Bridge.

    Args:
        cfg: Bridge's configuration; it stays as it is.
        cache: Where the document, sample and shuffle indices go.

    Returns:
        Megatron's `GPTDataset` or `BlendedDataset`, or None for a split without data.

    Source: megatron-bridge 0.6.2 `data/loaders.py`, `data/utils.py`.
    """
    from megatron.bridge.data.loaders import get_train_valid_test_num_samples
    from megatron.bridge.data.utils import pretrain_train_valid_test_datasets_provider
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    mine = copy.deepcopy(cfg.dataset)
    with quietly():
        mine.tokenizer, mine.path_to_cache = build_tokenizer(cfg.tokenizer), str(cache)
        mine.finalize()
        return pretrain_train_valid_test_datasets_provider(list(get_train_valid_test_num_samples(cfg)), mine)


def pieces(dataset: Any, number: int) -> pd.DataFrame:
    """From which documents one sample is cut: the way through shuffle, sample and document index.

    Args:
        dataset: One source's `GPTDataset`.
        number: The sample, in the order in which it is asked for.

    Returns:
        One row a piece: document, first token in it, number of tokens (the last piece has the extra label).
    """
    import pandas as pd

    place = int(dataset.shuffle_index[number])
    (first, start), (last, stop) = (tuple(map(int, dataset.sample_index[place + i])) for i in (0, 1))
    rows = []
    for position in range(first, last + 1):
        which = int(dataset.document_index[position])
        begin = start if position == first else 0
        end = stop + 1 if position == last else int(dataset.dataset.sequence_lengths[which])
        rows.append((which, begin, end - begin))
    return pd.DataFrame(rows, columns=["document", "first token", "tokens"])


def realised_blend(samples: Sequence[np.ndarray], prefixes: Mapping[str, Path]) -> pd.DataFrame:
    """Which source does each sample come from?  Found by its ids alone, not by what the loader says.

    Every window of 8 ids in a source has a hash; a sample belongs to the source that knows most of its windows.

    Args:
        samples: Token ids, one array a sample, each at least 8 long.
        prefixes: Paths without suffix by source name.

    Returns:
        One row a source: samples, share.

    Raises:
        ValueError: If a sample is known to no source.
    """
    import numpy as np
    import pandas as pd

    known = {}
    for name, prefix in prefixes.items():
        index = read(prefix)
        known[name] = np.unique(_hashes(np.fromfile(f"{prefix}.bin", index.type_name)))
    counts = dict.fromkeys(prefixes, 0)
    for number, sample in enumerate(samples):
        hashes = _hashes(np.asarray(sample))
        # Sorted already: np.isin would sort a million windows again for every sample.
        found = {
            name: (windows[np.searchsorted(windows, hashes) % len(windows)] == hashes).mean()
            for name, windows in known.items()
        }
        best = max(found, key=found.get)
        if not found[best]:  # some are always unknown: documents are shuffled, and windows reach across their ends
            raise ValueError(f"sample {number} has ids that stand in no source: another tokenizer or other files?")
        counts[best] += 1
    rows = [(name, count, count / len(samples)) for name, count in counts.items()]
    return pd.DataFrame(rows, columns=["source", "samples", "share"])


def _hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit polynomial hash of every window, by arithmetic that wraps."""
    import numpy as np

    ids = ids.astype(np.uint64)
    total, factor = np.zeros(len(ids) - WINDOW + 1, np.uint64), np.uint64(1)
    for step in range(WINDOW):
        total += ids[step : len(ids) - WINDOW + 1 + step] * factor
        factor = np.uint64(int(factor) * 6364136223846793005 % 2**64)
    return total

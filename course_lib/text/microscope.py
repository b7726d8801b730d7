"""What is inside `.bin` and `.idx`, byte by byte, and what Megatron makes of it: documents, samples, a blend."""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import stack
from course_lib.common import files
from course_lib.common.config import Fields, changed
from course_lib.planning.layout.rules import embedding_rows

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "ForeignFile",
    "Index",
    "datasets",
    "document",
    "labels",
    "sample_pieces",
    "read",
    "realised_blend",
    "require",
]

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
WINDOW = 8


class ForeignFile(ValueError):
    """A file is no whole indexed data set, or none for this model; the message names the file, the offset and the reason."""


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
    data = b""
    if path.stat().st_size:  # what is empty cannot be mapped
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
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


def require(cfg: Any) -> None:
    """Refuse data that a run would read as nonsense: before its ranks start, with the file's name.

    Of every `.bin` and `.idx` that the configuration names, in a blend or in blends for each split: the two are whole and
    fit each other; no token id lies beyond the model's embedding, where tensor parallel ranks would read zeros without a
    word; no index that Megatron keeps for them is older than they are, because its name does not follow from their
    content.  Texts for fine-tuning become ids only in the ranks: of each of them the index of its lines has to be its own.
    Mock data has nothing to look at.

    The largest id is searched once and kept in `cache/` beside the data, with size and time of the file.  An id that is
    beyond the tokenizer and inside the embedding's padded rows passes.

    Args:
        cfg: A Bridge `ConfigContainer`, or the same as nested mappings.

    Raises:
        ForeignFile: If data is missing, cut, foreign, of another tokenizer, or newer than its index.
    """
    fields = Fields.of(cfg)
    try:
        rows = embedding_rows(fields)
    except ValueError:
        rows = None  # only the tokenizer knows
    for prefix in _prefixes(fields):
        index = read(Path(prefix))
        _refuse_old_indices(prefix, fields.get("dataset", "path_to_cache"))
        if rows is not None and len(index.lengths) and _most(index) >= rows:
            largest = _largest_id(index)
            if not 0 <= largest < rows:
                raise ForeignFile(
                    f"{prefix}.bin has token id {largest:,}, and the model's embedding has {rows:,} rows: the data was written "
                    "with another tokenizer. Give cfg.tokenizer (and cfg.tokenizer.vocab_size, if it is set) those of the "
                    "data, or write the data again"
                )

    if root := fields.get("dataset", "dataset_root"):
        for text in sorted(Path(root).glob("*.jsonl")):
            _refuse_old_lines(text)


def _refuse_old_lines(text: Path) -> None:
    """Bridge finds the lines of a JSONL by an index that it makes once and never compares with the file again.

    Source: megatron-bridge 0.6.2 `data/datasets/utils.py`, `_build_memmap_index_files`.
    """
    import numpy as np

    index = Path(f"{text}.idx.npy")
    if not (index.is_file() and index.with_suffix(".info").is_file() and text.stat().st_size):
        return
    stack.prepare_imports()
    from megatron.bridge.data.datasets.utils import build_index_from_memdata

    try:
        ends = np.load(index)
    except (ValueError, EOFError):  # cut
        ends = None
    if not np.array_equal(ends, build_index_from_memdata(str(text), ord("\n"))):
        raise ForeignFile(
            f"{index} is the index of another {text.name}: Bridge would cut the new lines where the old ones ended. Delete "
            f"{index} and {index.with_suffix('.info')}, and Bridge makes new ones"
        )


def _prefixes(fields: Fields) -> list[str]:
    """The paths without suffix that a run reads ids from, each once."""
    from megatron.core.datasets.utils import get_blend_from_list

    blends = [fields.get("dataset", "blend"), *(fields.get("dataset", "blend_per_split") or ())]
    if paths := fields.get("dataset", "data_path"):
        blends.append(get_blend_from_list(paths.split() if isinstance(paths, str) else list(paths)))
    return list(dict.fromkeys(str(prefix) for blend in blends if blend for prefix in blend[0]))


def _most(index: Index) -> int:
    """The largest number that the type of a token can hold."""
    import numpy as np

    return np.iinfo(index.type_name).max if np.dtype(index.type_name).kind in "iu" else 2**63


def _largest_id(index: Index) -> int:
    """The largest id of a `.bin`, or a negative one; found by reading it all, once for each size and time of the file."""
    import numpy as np

    path = Path(f"{index.prefix}.bin")
    kept, known = Path(index.prefix) / "cache" / "largest_id.json", path.stat()
    mark = {"size_bytes": known.st_size, "time_ns": known.st_mtime_ns}
    try:
        found = json.loads(kept.read_text())
        if mark.items() <= found.items():
            return int(found["largest_id"])
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    ids, step = np.memmap(path, index.type_name, "r"), 2**26
    lowest, largest = 0, 0
    for begin in range(0, len(ids), step):
        part = ids[begin : begin + step]
        lowest, largest = min(lowest, int(part.min())), max(largest, int(part.max()))
    with contextlib.suppress(OSError):  # a folder that only others may write to is searched again
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(kept, json.dumps(mark | {"largest_id": lowest or largest}))
    return lowest or largest


def _refuse_old_indices(prefix: str, cache: str | None) -> None:
    """Megatron names its document, sample and shuffle indices after path and settings, not after content.

    Source: megatron-core 0.19.2 `datasets/gpt_dataset.py`, `_build_document_sample_shuffle_indices`.
    """
    written = max(Path(f"{prefix}.{suffix}").stat().st_mtime_ns for suffix in ("bin", "idx"))
    folder = Path(cache) if cache else Path(prefix) / "cache" / "GPTDataset_indices"
    for described in folder.glob("*-description.txt"):
        try:
            of = json.loads(described.read_text()).get("dataset_path")
        except (OSError, ValueError, AttributeError):
            continue
        if of == prefix and described.stat().st_mtime_ns < written:
            raise ForeignFile(
                f"{described} describes an index that is older than {prefix}.bin: Megatron would read the new data by the old "
                f"index. Delete {described.with_name(described.name.removesuffix('description.txt'))}*, and it makes a new one"
            )


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

    with stack.quietly():
        mine = changed(cfg.dataset, {"tokenizer": build_tokenizer(cfg.tokenizer), "path_to_cache": str(cache)})
        mine.finalize()
        return pretrain_train_valid_test_datasets_provider(list(get_train_valid_test_num_samples(cfg)), mine)


def pairs(cfg: Any) -> tuple[Any, Any]:
    """The training and validation sets that a fine-tuning with this configuration reads, Bridge's own `GPTSFTDataset`.

    Args:
        cfg: Bridge's configuration with a `GPTSFTDatasetConfig`; it stays as it is.

    Source: megatron-bridge 0.6.2 `data/builders/gpt_sft.py`.
    """
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    messages = ("Could not determine rank", "`build_tokenizer` is deprecated")  # Bridge's builders have no other yet
    with stack.quietly(messages=messages):
        mine = changed(cfg.dataset, {})
        mine.finalize()
        train, validation, _ = GPTSFTDatasetBuilder(mine, build_tokenizer(cfg.tokenizer)).build()
    return train, validation


def labels(dataset: Any, numbers: Sequence[int]) -> pd.DataFrame:
    """What a batch of prompt and answer pairs asks of the model, one row a label.

    Args:
        dataset: Bridge's `GPTSFTDataset`; its `collate_fn` makes the batch, so the padding is the real one.
        numbers: The pairs, in the order of the batch.

    Returns:
        Columns `row, position, token, kind, loss`: the label's text, what it belongs to (`prompt`, `separator`, `answer`,
        `end of document`, `padding`), and the loss mask, 0 or 1.

    Source: megatron-bridge 0.6.2 `data/datasets/gpt_sft.py`: labels are the ids from the second on, the mask as well.
    """
    import pandas as pd

    items = [dataset[number] for number in numbers]
    batch, rows = dataset.collate_fn(items), []
    for row, item in enumerate(items):
        first, end = int(item["answer_start_idx"]) - 1, len(item["input_ids"]) - 2
        for position, (label, loss) in enumerate(
            zip(batch["labels"][row].tolist(), batch["loss_mask"][row].tolist(), strict=True)
        ):
            ends = [(first, "prompt"), (first + 1, "separator"), (end, "answer"), (end + 1, "end of document")]
            kind = next((name for before, name in ends if position < before), "padding")
            rows.append((row, position, dataset.tokenizer.detokenize([label]), kind, int(loss)))
    return pd.DataFrame(rows, columns=["row", "position", "token", "kind", "loss"])


def sample_pieces(dataset: Any, number: int) -> pd.DataFrame:
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

"""Look into a checkpoint directory: what is there, is it whole, which tensors are in which file, and do two agree.

Bridge writes one directory a save, `iter_0000006` and so on, and beside them a tracker that names the latest one.  The
shards come first, `.metadata` after them, the tracker last: whoever dies in between leaves a torn directory, and a
tracker that still names the save before.

Source: megatron-bridge `training/checkpointing.py` @ 0.6.2, torch `distributed/checkpoint/filesystem.py` @ 2.13.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.runs import Run

if TYPE_CHECKING:
    import pandas as pd
    import torch

__all__ = [
    "Checkpoint",
    "NoCheckpoint",
    "at",
    "compare",
    "files",
    "hugging_face_rank",
    "latest",
    "listing",
    "read",
    "require",
    "tensors",
]

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's tracker; Bridge writes the same step into `latest_train_state.pt`."""

ITERATION_MARKS = ("run_config.yaml", "train_state.pt", "metadata.json", ".metadata")
"""Any of these makes Bridge take a directory for one checkpoint, and not for a directory of checkpoints."""

HOLDS = {
    ".metadata": "index of all tensors: shapes, pieces, places",
    "metadata.json": "format of the checkpoint",
    "run_config.yaml": "configuration of the run that saved it",
    "train_state.pt": "step, consumed samples",
}

PARTS = (
    ("optimizer.state.exp_avg_sq.", "Adam's second moment"),
    ("optimizer.state.exp_avg.", "Adam's first moment"),
    ("optimizer.state.param.", "the optimizer's fp32 weights"),
    ("optimizer.", "optimizer, in its own order"),
    ("", "weights"),
)


class NoCheckpoint(FileNotFoundError):
    """There is no such checkpoint; Bridge would start from random weights without an error."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved step.

    Attributes:
        path: Its directory.
        step: The step after which it was saved.
        latest: True if the tracker names it, so that a run which loads the parent directory starts here.
    """

    path: Path
    step: int
    latest: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @property
    def missing(self) -> list[str]:
        """What it lacks to be whole, each as `file: reason`; empty if nothing is missing.

        A shard that was cut short counts: `.metadata` knows how far each tensor reaches.
        """
        if not (self.path / ".metadata").exists():
            return [".metadata: not written, the save did not end"]
        try:
            pieces = _index(self.path).storage_data.values()
        except Exception as error:  # a cut pickle raises whatever its last byte makes of it
            return [f".metadata: cannot be read ({type(error).__name__})"]
        reaches: dict[str, int] = {}
        for piece in pieces:
            reaches[piece.relative_path] = max(reaches.get(piece.relative_path, 0), piece.offset + piece.length)
        found = []
        for name, needed_bytes in sorted(reaches.items()):
            file = self.path / name
            if not file.exists():
                found.append(f"{name}: not there")
            elif file.stat().st_size < needed_bytes:
                found.append(f"{name}: {file.stat().st_size:,} bytes of {needed_bytes:,}")
        return found + [f"{name}: not written" for name in ("train_state.pt",) if not (self.path / name).exists()]


def listing(place: Run | Path) -> pd.DataFrame:
    """All checkpoints of a run, the oldest first: `step, files, size_bytes, missing, latest`.

    Args:
        place: A run, or the directory that holds the `iter_...` directories.
    """
    import pandas as pd

    rows = [
        (c.step, sum(f.is_file() for f in c.path.rglob("*")), c.size_bytes, "; ".join(c.missing), c.latest)
        for c in _all(_root(place))
    ]
    return pd.DataFrame(rows, columns=["step", "files", "size_bytes", "missing", "latest"]).set_index("step")


def latest(place: Run | Path) -> Checkpoint:
    """The checkpoint that the tracker names, which is where Bridge resumes.

    Raises:
        NoCheckpoint: If there is no tracker, or nothing where it points.
    """
    root = _root(place)
    step = _tracked_step(root)
    if step is None:
        raise NoCheckpoint(
            f"no {TRACKER} in {root}: no save was completed there. Is the path right, and did the run that should have "
            "saved use save=True and a cfg.checkpoint.save_interval of at most its number of steps?"
        )
    return at(root, step)


def at(place: Run | Path, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        NoCheckpoint: If that step was not saved; lists those that were.
    """
    found = {checkpoint.step: checkpoint for checkpoint in _all(_root(place))}
    if step not in found:
        known = ", ".join(str(known) for known in found) or "none"
        raise NoCheckpoint(f"no checkpoint of step {step} in {_root(place)}; saved are: {known}")
    return found[step]


def require(place: Run | Path) -> Path:
    """The path to load from, or an error: Bridge itself would start from random weights and say so in a log line only.

    Args:
        place: A run, a directory of checkpoints, or one checkpoint's directory.

    Raises:
        NoCheckpoint: If Bridge would find nothing there.
    """
    root = _root(place)
    if not any((root / mark).exists() for mark in ITERATION_MARKS):
        latest(root)
    return root


def files(checkpoint: Checkpoint) -> pd.DataFrame:
    """The files of a checkpoint: `file, size_bytes, holds`."""
    import pandas as pd

    rows = []
    for file in sorted(checkpoint.path.iterdir()):
        shard = re.match(r"__(\d+)_\d+\.distcp$", file.name)
        holds = f"tensors that rank {shard[1]} wrote" if shard else HOLDS.get(file.name, "files of the tokenizer")
        parts = file.rglob("*") if file.is_dir() else [file]
        rows.append((file.name, sum(p.stat().st_size for p in parts if p.is_file()), holds))
    return pd.DataFrame(rows, columns=["file", "size_bytes", "holds"]).set_index("file")


def tensors(checkpoint: Checkpoint) -> pd.DataFrame:
    """The tensors of a checkpoint: `name, part, shape, dtype, pieces, files, size_bytes`.

    A tensor is stored whole in meaning and in pieces on disk: `pieces` is how many, `files` which shards hold them.
    """
    import math

    import pandas as pd

    index = _index(checkpoint.path)
    places: dict[str, set[str]] = {}
    for key, piece in index.storage_data.items():
        places.setdefault(key.fqn, set()).add(piece.relative_path)
    rows = []
    for name, entry in index.state_dict_metadata.items():
        if not hasattr(entry, "size"):
            continue  # a few pickled bytes: random states, empty extra states
        part = next(part for prefix, part in PARTS if name.startswith(prefix))
        dtype = entry.properties.dtype
        size_bytes = math.prod(entry.size) * dtype.itemsize
        kind, where = str(dtype).removeprefix("torch."), ", ".join(sorted(places[name]))
        rows.append((name, part, tuple(entry.size), kind, len(entry.chunks), where, size_bytes))
    columns = ["name", "part", "shape", "dtype", "pieces", "files", "size_bytes"]
    return pd.DataFrame(rows, columns=columns).set_index("name").sort_index()


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One whole tensor of a checkpoint, put together from its pieces; the other tensors stay on disk.

    Raises:
        KeyError: If there is no tensor of that name.
    """
    known = _index(checkpoint.path).state_dict_metadata
    if not hasattr(known.get(name), "size"):
        raise KeyError(f"no tensor {name!r} in {checkpoint.path.name}; see checkpoints.tensors()")
    return _load(checkpoint.path, [name])[name]


def compare(one: Checkpoint, other: Checkpoint) -> pd.DataFrame:
    """Two checkpoints tensor by tensor: `name, part, largest_difference`; `nan` where only one has the tensor, or another shape.

    Whatever layout saved them: a tensor is read whole.
    """
    import pandas as pd

    both = [tensors(checkpoint) for checkpoint in (one, other)]
    shared = sorted(set(both[0].index) & set(both[1].index))
    mine, theirs = (_load(checkpoint.path, shared) for checkpoint in (one, other))
    rows = []
    for name in sorted(set(both[0].index) | set(both[1].index)):
        same_shape = name in shared and mine[name].shape == theirs[name].shape
        difference = float((mine[name] - theirs[name]).abs().max()) if same_shape else float("nan")
        part = next(frame.part[name] for frame in both if name in frame.index)
        rows.append((name, part, difference))
    return pd.DataFrame(rows, columns=["name", "part", "largest_difference"]).set_index("name")


def hugging_face_rank(request: dict) -> None:
    """What the one rank of a conversion does: a checkpoint to Hugging Face's format, and from there back to Megatron's.

    Args:
        request: `checkpoint` to read, `shape` of the model in Hugging Face's names, and the places to write: `hugging-face`
            and `back`.
    """
    from types import SimpleNamespace

    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from transformers import LlamaConfig

    from course_lib import devices, stack

    bridge = AutoBridge.from_hf_config(LlamaConfig(architectures=["LlamaForCausalLM"], **request["shape"]))
    bridge.export_ckpt(request["checkpoint"], request["hugging-face"], show_progress=False)

    bridge = AutoBridge.from_hf_pretrained(request["hugging-face"])
    provider = bridge.to_megatron_provider()
    for row in devices.differences(SimpleNamespace(model=provider), stack.device(1)):  # none on a GPU
        setattr(provider, row.field.removeprefix("model."), row.in_ranks)
    provider.finalize()
    with temporary_distributed_context(backend="gloo"):
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, request["back"])


def _load(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp

    known = _index(path).state_dict_metadata
    state = {name: torch.empty(tuple(known[name].size), dtype=known[name].properties.dtype) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
        dcp.load(state, storage_reader=dcp.FileSystemReader(str(path)), no_dist=True)
    return state


def _index(path: Path) -> object:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(str(path)).read_metadata()


def _root(place: Run | Path) -> Path:
    return place.path / "checkpoints" if isinstance(place, Run) else Path(place)


def _tracked_step(root: Path) -> int | None:
    try:
        return int((root / TRACKER).read_text())
    except (FileNotFoundError, ValueError):  # Megatron writes "release" there for converted weights
        return None


def _all(root: Path) -> list[Checkpoint]:
    tracked = _tracked_step(root)
    steps = {int(match[1]): path for path in root.glob("iter_*") if (match := re.match(r"iter_(\d+)$", path.name))}
    return [Checkpoint(path, step, step == tracked) for step, path in sorted(steps.items())]

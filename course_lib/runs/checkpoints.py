"""Look into a checkpoint directory: what is there, is it whole, which tensors are in which file, and do two agree.

Bridge writes one directory a save, `iter_0000006` and so on, and beside them two trackers that name the latest one.  The
shards come first, `.metadata` after them, the trackers last: whoever dies in between leaves a torn directory, and
trackers that still name the save before.

A checkpoint may come from anybody, and torch reads some of its files with pickle, which runs code where a file names it.
Nothing here does: `.metadata` is read by an unpickler that knows torch's own classes, everything else as tensors and
plain data.

Source: megatron-bridge `training/checkpointing.py` @ 0.6.2, torch `distributed/checkpoint/filesystem.py` @ 2.13.0.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import stack
from course_lib.common.config import ConfigError, Fields
from course_lib.planning.layout.rules import embedding_rows
from course_lib.runs import Run, foreign_code
from course_lib.runs.config_file import content_of

if TYPE_CHECKING:
    import pandas as pd
    import torch

__all__ = [
    "Checkpoint",
    "NoCheckpoint",
    "WrongCheckpoint",
    "at",
    "compare",
    "files_of",
    "global_batch_size",
    "latest",
    "listing",
    "read",
    "refuse",
    "refuse_another_model",
    "require",
    "root",
    "run_config",
    "tensors",
]

TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")
"""Bridge's tracker and Megatron's, in the order in which Bridge asks them; each holds a step, the second one may say
`release` instead.

Source: megatron-bridge `training/checkpointing.py`, `_resolve_checkpoint_iteration` @ 0.6.2."""

INDEX_CLASSES = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": (
        "_StorageInfo",
        "_StoragePrefix",  # of a second save of one run, with ckpt_assume_constant_structure
    ),
    "pathlib": ("PosixPath",),  # where it was saved, if that was given as a path
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    ),
    "torch.serialization": ("_get_layout",),
}
"""All that a `.metadata` names, besides torch's data types, by module.

Source: torch `distributed/checkpoint/metadata.py` and `controls.py` @ 2.13.0; megatron-core adds the plans @ 0.19.2."""

SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_num_layers"),
    *("gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "normalization"),
    *("share_embeddings_and_output_weights", "multi_latent_attention", "hybrid_layer_pattern"),
    *("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
)
"""Fields of a model that decide which tensors it has, and their shapes."""

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


WHOM_TO_TRUST = (
    "reading it would run that code. Take the checkpoint from whoever wrote it, or do without; book/trust.md says why"
)


class NoCheckpoint(FileNotFoundError):
    """There is no such checkpoint; Bridge would start from random weights without an error."""


class WrongCheckpoint(ValueError):
    """There is a checkpoint, and it cannot or must not be loaded: it is torn, names foreign code, or fits another model."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved step.

    Attributes:
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
            pieces = [
                (Path(p.relative_path).name, p.offset + p.length) for p in _index(self.path).storage_data.values()
            ]
        except WrongCheckpoint as error:
            return [str(error).removeprefix(f"{self.path}/")]
        except Exception as error:  # a cut pickle raises whatever its last byte makes of it
            return [f".metadata: cannot be read ({type(error).__name__})"]
        reaches: dict[str, int] = {}
        for name, end in pieces:
            reaches[name] = max(reaches.get(name, 0), end)
        found = []
        for name, needed_bytes in sorted(reaches.items()):
            file = self.path / name
            if not file.exists():
                found.append(f"{name}: not there")
            elif file.stat().st_size < needed_bytes:
                found.append(f"{name}: {file.stat().st_size:,} bytes of {needed_bytes:,}")
        # Megatron-LM keeps what Bridge writes into two files in its own common.pt
        others = ("metadata.json",) if (self.path / "common.pt").exists() else tuple(HOLDS)[1:]
        return found + [f"{name}: not written" for name in others if not (self.path / name).exists()]


def listing(place: Run | Path) -> pd.DataFrame:
    """All checkpoints of a run or of a directory of `iter_...`, the oldest first: `step, files, size_bytes, missing, latest`."""
    import pandas as pd

    rows = [
        (c.step, sum(f.is_file() for f in c.path.rglob("*")), c.size_bytes, "; ".join(c.missing), c.latest)
        for c in _all(root(place))
    ]
    return pd.DataFrame(rows, columns=["step", "files", "size_bytes", "missing", "latest"]).set_index("step")


def latest(place: Run | Path) -> Checkpoint:
    """The checkpoint that the trackers name, which is where Bridge resumes.

    Raises:
        NoCheckpoint: If there is no tracker, or nothing where it points.
    """
    top = root(place)
    if not top.is_dir():
        raise NoCheckpoint(f"there is no directory {top}: is the path right, and did its run use save=True?")
    saved = ", ".join(f"iter_{known.step:07d}" for known in _all(top)) or "nothing"
    tracker, says = _tracker(top)
    if tracker is None:
        raise NoCheckpoint(
            f"no save was completed in {top}: neither {TRACKERS[0]} nor {TRACKERS[1]} is there, which are written last, "
            f"and saved is {saved}. Did the run that should have saved use save=True and a cfg.checkpoint.save_interval of "
            "at most its number of steps?"
        )
    found = top / "release" if says == "release" else top / f"iter_{says:07d}" if isinstance(says, int) else None
    if found is None:
        raise NoCheckpoint(
            f"{top / tracker} names no step but {says!r}: give the directory of one save; saved is {saved}"
        )
    if not found.is_dir():
        raise NoCheckpoint(
            f"{top / tracker} names {found.name}, which is not there: give the directory of one save; saved is {saved}"
        )
    return Checkpoint(found, 0 if says == "release" else says, latest=True)


def at(place: Run | Path, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        NoCheckpoint: If that step was not saved; lists those that were.
    """
    found = {checkpoint.step: checkpoint for checkpoint in _all(root(place))}
    if step not in found:
        known = ", ".join(str(known) for known in found) or "none"
        raise NoCheckpoint(f"no checkpoint of step {step} in {root(place)}; saved are: {known}")
    return found[step]


def require(place: Run | Path, *, step: int | None = None) -> Checkpoint:
    """The checkpoint that Bridge would load from there, looked through: it is whole, and no file of it names foreign code.

    A shard with the right size and wrong bytes passes: only its length is compared.

    Args:
        place: A run, a directory of checkpoints, or one checkpoint's directory.
        step: `cfg.checkpoint.ckpt_step`; the trackers' by default.

    Raises:
        NoCheckpoint: If Bridge would find nothing there, and start from random weights.
        WrongCheckpoint: If it is torn, or reading it could run code; names the file.
    """
    top = root(place)
    if any((top / mark).exists() for mark in ITERATION_MARKS):
        number = re.fullmatch(r"iter_(\d+)", top.name)
        found = Checkpoint(top, int(number[1]) if number else 0, latest=False)
    else:
        found = latest(top) if step is None else at(top, step)
    _refuse_foreign_code(found.path)
    if found.missing:
        raise WrongCheckpoint(
            f"the checkpoint in {found.path} is torn, so nothing was started: {'; '.join(found.missing)}. Load another save "
            f"(checkpoints.listing({str(found.path.parent)!r}) says which are whole), or copy this one again"
        )
    return found


def refuse(cfg: Any, *, load: Run | Path | None, ranks: int) -> Checkpoint | None:
    """Refuse what a run would load and cannot, or must not: looked at before its ranks start, and by each rank before Bridge.

    Args:
        load: Where it resumes from; its `pretrained_checkpoint` stands in `cfg`.

    Returns:
        The checkpoint that the run resumes from; `None` if it starts anew.

    Raises:
        NoCheckpoint: As `require()`, like `WrongCheckpoint`.
        WrongCheckpoint: As `refuse_another_model()`, too.
    """
    fields = Fields.of(cfg)
    pretrained = fields.get("checkpoint", "pretrained_checkpoint")
    resumed = require(load, step=fields.get("checkpoint", "ckpt_step")) if load else None
    if resumed:
        refuse_another_model(resumed, cfg, ranks=ranks)
    if (
        pretrained and not (Path(pretrained) / "config.json").exists()
    ):  # Hugging Face's weights are read as weights only
        refuse_another_model(require(Path(pretrained)), cfg, ranks=ranks, weights_only=True)
    return resumed


def refuse_without_state(cfg: Any) -> None:
    """Refuse a run that would save or load a model whose state Megatron Core cannot collect: it would stop at its first save.

    In stages, a model that predicts ahead has an output layer of its own on the last one, which tying expects to be absent.

    Raises:
        ConfigError: What meets, and which one to change.

    Source: megatron-core models/common/language_module/language_module.py @ 0.19.2 `tie_embeddings_and_output_weights_state_dict`
    """
    fields = Fields.of(cfg)
    if not any(fields.get("checkpoint", name) for name in ("save", "load", "pretrained_checkpoint")):
        return
    ahead = fields.model("mtp_num_layers", 0) or fields.model("hybrid_layer_pattern", "").count("/")
    stages = fields.model("pipeline_model_parallel_size", 1)
    if ahead and stages > 1 and fields.model("share_embeddings_and_output_weights", False):
        raise ConfigError(
            f"Megatron Core neither saves nor loads a model with mtp_num_layers={ahead}, tied embeddings and PP={stages}: "
            "set cfg.model.pipeline_model_parallel_size = 1, or cfg.model.share_embeddings_and_output_weights = False for a "
            "model with an output layer of its own, or cfg.model.mtp_num_layers = None; or train without save= and load="
        )


def global_batch_size(checkpoint: Checkpoint) -> int | None:
    """That of the run which saved it; `None` if the checkpoint is Megatron-LM's own, which keeps it elsewhere."""
    return Fields(_run_config(checkpoint.path)).get("train", "global_batch_size")


def refuse_another_model(checkpoint: Checkpoint, cfg: Any, *, ranks: int, weights_only: bool = False) -> None:
    """Refuse a checkpoint that does not fit the model, or whose optimizer and random states do not fit the layout.

    Weights fit every layout of the same model.  The optimizer's state does not cross from EP=1 to EP above 1 or back:
    there, Megatron Core keeps the experts in an optimizer of their own.

    Args:
        weights_only: Whether optimizer and random states stay where they are.

    Raises:
        WrongCheckpoint: Names the fields that differ, and what to do.

    Source: megatron-bridge `training/checkpointing.py` @ 0.6.2, megatron-core `optimizer/optimizer.py` @ 0.19.2.
    """
    mine, written = Fields.of(cfg), _run_config(checkpoint.path)
    theirs = Fields(written)
    if not theirs.is_container:
        return  # Megatron-LM's own checkpoints keep their arguments elsewhere
    one, other = _shape(mine), _shape(theirs)
    wrong = [
        f"{name} is {other[name]} there and {one[name]} in cfg.model" for name in SHAPE if one[name] != other[name]
    ]
    # another TP may pad the same ids to other rows, which Megatron Core takes; lesson 10 shows what that costs
    as_saved = Fields(mine.cfg, {"model.tensor_model_parallel_size": theirs.model("tensor_model_parallel_size", 1)})
    if (rows := _rows(as_saved, checkpoint.path)) and rows[0] != rows[1]:
        wrong.append(f"its embedding has {rows[0]:,} rows and that of cfg has {rows[1]:,}")
    if wrong:
        raise WrongCheckpoint(
            f"the checkpoint in {checkpoint.path} is of another model: {'; '.join(wrong)}. Take the model and the tokenizer "
            f"of its run ({checkpoint.path / 'run_config.yaml'}), or start without load="
        )
    if not (weights_only or mine.get("checkpoint", "finetune", False)):
        _refuse_another_layout(checkpoint, mine, theirs, ranks)


def _refuse_another_layout(checkpoint: Checkpoint, mine: Fields, theirs: Fields, ranks: int) -> None:
    def size(fields: Fields, name: str) -> int:
        return fields.model(f"{name}_parallel_size", 1)

    before, now = size(theirs, "expert_model"), size(mine, "expert_model")
    loads_optimizer = mine.get("checkpoint", "load_optim", True) and theirs.get("checkpoint", "save_optim", True)
    weights_only = "cfg.checkpoint.load_optim = cfg.checkpoint.load_rng = False loads the weights and starts Adam anew"
    if loads_optimizer and before != now:
        if 1 in (before, now):
            raise WrongCheckpoint(
                f"the checkpoint in {checkpoint.path} was saved at EP={before}, and its optimizer does not fit EP={now}: above "
                f"EP=1 Megatron Core keeps the experts in an optimizer of their own. Keep EP, or change it between sizes "
                f"above 1; {weights_only}"
            )
        sharded = theirs.get("optimizer", "use_distributed_optimizer", False)
        if sharded and not theirs.get("checkpoint", "dist_ckpt_optim_fully_reshardable", False):
            raise WrongCheckpoint(
                f"the checkpoint in {checkpoint.path} was saved at EP={before}, and its optimizer in a format that fits no "
                f"other EP: save it again with cfg.checkpoint.dist_ckpt_optim_fully_reshardable = True; {weights_only}"
            )
    same = all(size(mine, name) == size(theirs, name) for name in ("tensor_model", "pipeline_model"))
    if same and mine.get("checkpoint", "load_rng", True) and theirs.get("checkpoint", "save_rng", True):
        shape = [size(mine, "pipeline_model"), size(mine, "tensor_model")]
        data = ranks // (shape[0] * shape[1])  # with context parallelism in it
        names = _index(checkpoint.path).state_dict_metadata
        saved = {name.rpartition("_")[2] for name in names if name.startswith("rng_state/shard_")}
        if saved and saved != {".".join(map(str, [*shape, data] if now > 1 else shape))}:
            raise WrongCheckpoint(
                f"the random states in {checkpoint.path} are those of other ranks (EP={before}): above EP=1 every data-parallel "
                f"rank has its own. cfg.checkpoint.load_rng = False lets the ranks start with new ones, which only dropout "
                "and the router's noise can notice"
            )


def files_of(checkpoint: Checkpoint) -> pd.DataFrame:
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


def run_config(checkpoint: Checkpoint) -> dict:
    """The configuration of the run that saved it, as Bridge reads it; empty if the checkpoint is Megatron-LM's own."""
    return _run_config(checkpoint.path)


def _load(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp

    known = _index(path).state_dict_metadata
    state = {name: torch.empty(tuple(known[name].size), dtype=known[name].properties.dtype) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
        reader = dcp.FileSystemReader(str(path))
        reader.read_metadata = lambda *_, **__: _index(path)
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _index(path: Path) -> Any:
    """What `.metadata` says, read without running anything that it names.

    Raises:
        WrongCheckpoint: If it names what torch does not write there.
    """
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

    file = path / ".metadata"

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            data_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if data_type or name in INDEX_CLASSES.get(module, ()):
                return super().find_class(module, name)
            raise WrongCheckpoint(f"{file}: names {module}.{name}, which torch does not write there: {WHOM_TO_TRUST}")

    with file.open("rb") as stream:
        index = Reader(stream).load()
    if not isinstance(index, Metadata):
        raise WrongCheckpoint(f"{file}: holds {type(index).__name__}, and no index of tensors: {WHOM_TO_TRUST}")
    return index


def _refuse_foreign_code(path: Path) -> None:
    """Read whatever Bridge and Megatron Core would unpickle, as plain data; what is more than that is refused.

    Source: torch `distributed/checkpoint/default_planner.py`, `load_bytes` @ 2.13.0: not as weights only.
    """
    import megatron.core  # noqa: F401 (tells torch which of its own classes are plain data)

    for file, name, data in _pickled(path):
        try:
            _plain(data)
        except Exception as error:  # a cut file raises whatever its last byte makes of it
            foreign = re.search(r"GLOBAL (\S+) was not an allowed global|Unsupported class (\S+)", str(error))
            what = f"names {foreign[1] or foreign[2]}" if foreign else f"is no plain data ({type(error).__name__})"
            raise WrongCheckpoint(f"{file}: {name} {what}: {WHOM_TO_TRUST}") from None
    if (path / "run_config.yaml").exists():
        foreign_code.refuse(_run_config(path), path / "run_config.yaml")


def _plain(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _pickled(path: Path) -> Iterator[tuple[Path, str, bytes]]:
    """Each object of a checkpoint that is no tensor: file, name, bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    for folder in sorted(file.parent for file in path.rglob(".metadata")):
        try:
            index = _index(folder)
        except WrongCheckpoint:
            raise
        except Exception:  # a cut index is told by `missing`
            continue
        for key, place in index.storage_data.items():
            file = folder / place.relative_path
            if file.parent != folder:
                raise WrongCheckpoint(
                    f"{folder / '.metadata'}: points outside, to {place.relative_path}: {WHOM_TO_TRUST}"
                )
            if not isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
                continue
            if file.exists() and file.stat().st_size >= place.offset + place.length:
                with file.open("rb") as stream:
                    stream.seek(place.offset)
                    yield file, key.fqn, stream.read(place.length)
    for file in sorted(path.rglob("*.pt")):
        yield file, "it", file.read_bytes()


def _run_config(path: Path) -> dict:
    """A checkpoint's `run_config.yaml` as Bridge reads it; empty if there is none.

    Raises:
        ConfigError: If `config_file.content_of` refuses it.
    """
    stack.prepare_imports()  # whoever reads a checkpoint in a script need not know Bridge
    from megatron.bridge.training.utils.checkpoint_utils import _sanitize_run_config_object

    file = path / "run_config.yaml"
    content = content_of(file) if file.exists() else {}
    return _sanitize_run_config_object(content) if isinstance(content, dict) else {}


def _shape(fields: Fields) -> dict[str, Any]:
    """The fields of SHAPE, those that follow from others filled in as Megatron Core does; nothing said is `None`."""
    found = {name: fields.model(name) or None for name in SHAPE}
    heads, width = found["num_attention_heads"], found["hidden_size"]
    if pattern := found[
        "hybrid_layer_pattern"
    ]:  # borders of stages are no layers; tokens ahead have a field of their own
        found["hybrid_layer_pattern"] = pattern.partition("/")[0].replace("|", "")
    found["ffn_hidden_size"] = found["ffn_hidden_size"] or (4 * width if width else None)
    if found["multi_latent_attention"]:
        found["num_query_groups"] = found["kv_channels"] = None  # not its own sizes
    elif heads and width:
        found["num_query_groups"] = found["num_query_groups"] or heads
        found["kv_channels"] = found["kv_channels"] or width // heads
    if not found["num_moe_experts"]:
        found["moe_ffn_hidden_size"] = None
    elif not found["moe_ffn_hidden_size"]:
        found["moe_ffn_hidden_size"] = found["ffn_hidden_size"]
    return found


def _rows(mine: Fields, path: Path) -> tuple[int, int] | None:
    """Rows of the saved embedding and of the one that a run would build; `None` if one of them is not known."""
    entry = _index(path).state_dict_metadata.get("embedding.word_embeddings.weight")
    try:
        return (entry.size[0], embedding_rows(mine)) if hasattr(entry, "size") else None
    except ValueError:
        return None


def root(place: Run | Path) -> Path:
    """The directory that Bridge is told to load from."""
    return place.path / "checkpoints" if isinstance(place, Run) else Path(place)


def _tracker(root: Path) -> tuple[str | None, int | str | None]:
    """Which tracker Bridge asks, and what it says: a step, `release`, or something that is neither."""
    if (file := root / TRACKERS[0]).exists():
        try:
            return file.name, int(_plain(file.read_bytes())["step"])
        except Exception as error:
            return file.name, f"an error on reading it ({type(error).__name__})"
    if (file := root / TRACKERS[1]).exists():
        says = file.read_text(errors="replace").strip()
        return file.name, int(says) if says.isdecimal() else says[:40]
    return None, None


def _all(root: Path) -> list[Checkpoint]:
    tracked = _tracker(root)[1]
    steps = {int(match[1]): path for path in root.glob("iter_*") if (match := re.match(r"iter_(\d+)$", path.name))}
    return [Checkpoint(path, step, step == tracked) for step, path in sorted(steps.items())]

"""NeMo AutoModel on the course's ranks: its own recipe trains what its YAML says, and leaves a run like any other.

AutoModel's ranks are processes of their own, which never import Megatron: `launch.call(..., imports="automodel")`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from course_lib import launch, runs, stack
from course_lib.common.config import ConfigError
from course_lib.figures import live
from course_lib.ranks import recording
from course_lib.runs import writer

__all__ = ["architectures", "parted", "rank_main", "train"]

LIMIT_SECONDS = 600.0
INDEX_HEADER = b"MMIDIDX\x00\x00"
"""How an index of Megatron's begins.  Source: megatron-core datasets/indexed_dataset.py @ 0.19.2."""

HELPERS = "nemo_automodel.components.datasets.llm.megatron.helpers_cpp"

_NEED_A_GPU = {
    "model.use_liger_kernel": ((None, False), "Liger's kernels are written in Triton, which compiles for a GPU"),
    "model.attn_implementation": (("eager", "sdpa"), "flash attention has no kernel for a CPU"),
    "distributed.strategy": (("ddp", "fsdp2"), "Megatron FSDP copies between streams of a GPU"),
    "distributed.pp_size": ((None, 1), "its pipeline sends by batched transfers, which gloo does not have"),
    "distributed.ep_size": ((None, 1), "its experts are sent by DeepEP"),
    "fp8.enabled": ((None, False), "a CPU has no matrix product in FP8"),
    "compile.enabled": ((None, False), "the compiler is switched off in CPU ranks"),
    "quantization.load_in_4bit": ((None, False), "bitsandbytes computes on a GPU"),
    "quantization.load_in_8bit": ((None, False), "bitsandbytes computes on a GPU"),
}
"""Fields of AutoModel's YAML, what a CPU rank can do with them, and why no more."""


def train(
    settings: Mapping[str, Any],
    *,
    ranks: int = stack.LESSON_RANKS,
    name: str = "automodel",
    show: str | None = "live",
    record: bool = False,
) -> runs.Run:
    """Let AutoModel's recipe for next-token prediction train on so many ranks.

    What it reads is the run's `config.yaml`; where it keeps its own log and its index of the data is the run's directory.

    Args:
        settings: AutoModel's YAML as data.
        name: Name of the run's directory.
        show: `"live"` for a view while it trains, `None` for silence.
        record: Write every collective to the run directory, for `Run.collectives`.

    Raises:
        ConfigError: If these settings cannot run here, or on so many ranks; nothing was started.
        RunFailed: If a rank failed; names the first one and its cause.
    """
    device = stack.device(ranks)
    refuse(settings, ranks=ranks, device=device)
    schedule, sequence = settings["step_scheduler"], settings["dataset"]["seq_length"]
    view = live.view(schedule["max_steps"], name=name) if show else None
    layout = {"data_parallel_size": ranks, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    about = {"trainer": "AutoModel", "launcher": "fork server" if device == "cpu" else "torchrun", "ranks": ranks}
    about |= {"seed": settings.get("seed"), "record": record, "layout": layout}
    about |= {"global_batch_size": schedule["global_batch_size"], "seq_length": sequence}
    steps = schedule["max_steps"]
    with writer.recording(name, config=settings, train_iters=steps, device=device, view=view, **about) as mine:
        request = {"run": str(mine.path), "record": record}
        look = functools.partial(_update, view, mine.path)
        job = "course_lib.experiments.automodel:rank_main"
        launch.call(job, request, ranks=ranks, imports="automodel", limit_seconds=LIMIT_SECONDS, watch=look)
    return runs.Run(mine.path)


def _update(view: live.View | None, path: Path) -> None:
    if view is not None:
        view.update(runs.Run(path))


def refuse(settings: Mapping[str, Any], *, ranks: int, device: str) -> None:
    """Refuse settings that cannot run, by the name of the field.

    Raises:
        ConfigError: Naming every field that is missing, does not fit the ranks, or needs a GPU where there is none.
    """
    wrong = []
    for field in ("step_scheduler.max_steps", "step_scheduler.global_batch_size", "step_scheduler.local_batch_size"):
        value = _field(settings, field)
        if not isinstance(value, int) or value < 1:
            wrong.append(f"{field}={value!r}: give a whole number of at least 1")
    if not isinstance(_field(settings, "dataset.seq_length"), int):
        wrong.append(f"dataset.seq_length={_field(settings, 'dataset.seq_length')!r}: give the length of the samples")
    if not wrong:
        whole, local = (settings["step_scheduler"][f"{kind}_batch_size"] for kind in ("global", "local"))
        if whole % (ranks * local):
            wrong.append(
                f"step_scheduler.global_batch_size={whole} is no multiple of {ranks} ranks x local_batch_size={local}: "
                "AutoModel would round the number of micro-batches down and train another batch"
            )
    folder = Path(str(_field(settings, "model.pretrained_model_name_or_path")))
    if not (folder / "config.json").is_file():
        wrong.append(
            f"model.pretrained_model_name_or_path={folder}: no folder with a config.json; ranks do not ask the Hub"
        )
    wrong += _absent_data(_field(settings, "dataset.paths"))
    if device == "cpu":
        for field, (allowed, why) in _NEED_A_GPU.items():
            if (value := _field(settings, field)) not in allowed:
                instead = " or ".join(repr(one) for one in allowed if one is not None)
                wrong.append(f"{field}={value!r} needs a GPU: {why}. Use {instead}")
    if wrong:
        raise ConfigError("AutoModel cannot train this here:\n  " + "\n  ".join(wrong))


def _field(settings: Mapping[str, Any], name: str) -> Any:
    found: Any = settings
    for part in name.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _absent_data(paths: Any) -> list[str]:
    """What is wrong with prefixes of `.bin` and `.idx`; weights between them, and files of a blend, are let pass."""
    if isinstance(paths, Mapping):
        return [line for part in paths.values() for line in _absent_data(part)]
    wrong = []
    for prefix in paths if isinstance(paths, (list, tuple)) else [paths]:
        text = str(prefix)
        if text.replace(".", "", 1).isdigit() or text.endswith(".json"):
            continue
        index = Path(f"{text}.idx")
        if not index.is_file():
            wrong.append(f"dataset.paths: {index} is not there; give the prefix of Megatron's .bin and .idx")
        elif index.open("rb").read(len(INDEX_HEADER)) != INDEX_HEADER:
            wrong.append(
                f"dataset.paths: {index} is no index of Megatron's; a .bin of nanoGPT has its header in itself"
            )
    return wrong


def parted(run: runs.Run, other: runs.Run, *, tolerance: float) -> dict[str, Any]:
    """From which step on are two runs apart, and what was the first that differed?

    Args:
        tolerance: Relative, of the loss, the gradient norm and the learning rate.

    Returns:
        The first step at which each of the three differs, `None` where it never does, and the largest difference of the
        loss in the runs' unit.
    """
    columns = ["loss", "grad_norm", "learning_rate"]
    one, two = (each.metrics.set_index("step")[columns] for each in (run, other))
    apart = ((one - two).abs() > tolerance * two.abs()).dropna()
    first = {f"{name} from step": int(apart[name].idxmax()) if apart[name].any() else None for name in columns}
    return first | {"largest difference": float((one.loss - two.loss).abs().max())}


def architectures() -> list[str]:
    """Hugging Face's names of the models for which AutoModel has an implementation of its own, asked in one of its ranks.

    Every other model that transformers can build it takes from there.
    """
    job = "course_lib.experiments.automodel:architectures_rank"
    return launch.call(job, ranks=1, device="cpu", imports="automodel")[0]


# ------------------------------------------------------------------------------------------------------------ in a rank


def architectures_rank(_: object) -> list[str]:
    """What the one rank does."""
    from nemo_automodel._transformers.registry import MODEL_ARCH_MAPPING

    return sorted(MODEL_ARCH_MAPPING)


def rank_main(request: dict[str, Any]) -> None:
    """What each rank does: AutoModel's three lines, with a recipe that is watched."""
    from nemo_automodel.components.config.loader import load_yaml_config

    _find_helpers()
    path = Path(request["run"])
    cfg = load_yaml_config(path / "config.yaml")
    cfg.set_by_dotted("checkpoint.checkpoint_dir", str(path / "automodel"))
    cfg.set_by_dotted("dataset.index_mapping_dir", str(path / "index"))
    recipe = _watched(path, record=request["record"])(cfg)
    recipe.setup()
    recipe.run_train_validation_loop()


def _find_helpers() -> None:
    """AutoModel's wheel has the Makefile of its index helper, and no source: Core's built helper is of the same source.

    It is loaded from its file, because a name in `megatron.core` would import Megatron.
    """
    import importlib.metadata
    import importlib.util

    if HELPERS in sys.modules:
        return
    folder = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core/datasets")))
    (built,) = folder.glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location(HELPERS, built)
    sys.modules[HELPERS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[HELPERS])


def _watched(path: Path, *, record: bool) -> type:
    """AutoModel's recipe, which writes each step down as every run of the course has it.

    Source: nemo_automodel recipes/llm/train_ft.py @ 0.6.0, `run_train_validation_loop`.
    """
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mine = writer.Writer(path, rank=rank, world=world, device=stack.device(world))
    recorder = recording.Recorder(path, rank)
    if record:
        recorder.install(megatron=False)

    class Watched(TrainFinetuneRecipeForNextTokenPrediction):
        def setup(self) -> None:
            mine.stage("building the model")
            super().setup()

        def run_train_validation_loop(self) -> None:
            recorder.kinds |= _groups(self)
            if record:
                _reduce_in_python(self.model_parts)
            mine.begin()
            super().run_train_validation_loop()
            mine.stage("done")

        def _run_train_optim_step(self, *args: Any, **kwargs: Any) -> Any:
            recorder.step = self.step_scheduler.step + 1 if record else None
            mine.begin_step()
            sample = super()._run_train_optim_step(*args, **kwargs)
            mine.end_step(self.step_scheduler.step + 1)  # AutoModel counts from 0
            if record:
                recorder.write()
            recorder.step = None
            return sample

        def _forward_backward_step(self, *args: Any, **kwargs: Any) -> None:
            recorder.phase = "forward"
            super()._forward_backward_step(*args, **kwargs)
            recorder.phase = "update"

        def log_train_metrics(self, log_data: Any) -> None:
            found = log_data.metrics
            numbers = {"loss": float(found["loss"]), "grad_norm": float(found["grad_norm"])}
            tokens = found["num_tokens_per_step"]
            mine.metrics(log_data.step + 1, **numbers, learning_rate=found["lr"], tokens=tokens)
            super().log_train_metrics(log_data)

    return Watched


def _reduce_in_python(parts: Iterable[Any]) -> None:
    """DDP's reducer calls gloo from C++, where no recorder sees it; torch's own hook sends the same through Python."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    for part in parts:
        if isinstance(part, DistributedDataParallel):
            part.register_comm_hook(None, allreduce_hook)


def _groups(recipe: Any) -> dict[str, str]:
    """Names of process groups, as AutoModel's device mesh calls them: its dimensions, and all that read other batches."""
    import torch

    kinds = {torch.distributed.group.WORLD.group_name: "world"}
    if (mesh := recipe.device_mesh) is not None:
        kinds |= {mesh[name].get_group().group_name: name for name in mesh.mesh_dim_names}
        if (batches := recipe._get_dp_group()) is not None:
            kinds[batches.group_name] = "dp"
    return kinds

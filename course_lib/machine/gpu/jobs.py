"""What the checks do: each function is called with a `check.Context`, in a process of its own.

That process plans and reads; whatever touches a GPU happens in ranks, which the course's own launcher starts.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import launch, recipes, runs, stack
from course_lib.common import units
from course_lib.common.config import assign
from course_lib.machine.gpu import reference
from course_lib.machine.gpu.check import BROKEN, DRY_DEVICE
from course_lib.planning import ceiling, layout, memory
from course_lib.reading import baselines
from course_lib.stack import devices

if TYPE_CHECKING:
    from course_lib.machine.gpu.check import Context

_RANKS = f"{__package__}.ranks"
PACKAGES = (
    "torch triton numpy transformers tokenizers megatron-core megatron-bridge transformer-engine transformer-engine-torch "
    "nvidia-resiliency-ext mamba-ssm causal-conv1d nvidia-cudnn-cu13 nvidia-nccl-cu13 nvidia-cublas"
).split()

FIRST_LOSS_NATS = 0.1
"""How far a first loss may be from the formula: the two that NVIDIA published are within 0.03."""

MEMORY_SHARE = 0.05
"""How far measured memory may be from the planned."""

_FP32_NATS, _BF16_NATS = 0.005, 0.05
"""How far the losses of a resumed run may be from the CPU's: Transformer Engine multiplies fp32 in TF32, with 10 bits."""


@dataclass(frozen=True)
class Training:
    """A training run of a few steps: a recipe, and what is changed in it.

    Attributes:
        recipe: NVIDIA's function, as `module:function`.
        steps: How many.
        seq_length: Tokens in a sequence; `None` leaves the recipe's.
        vocab_size: Ids; `None` leaves the recipe's.
        fields: Other fields by dotted name; `"torch.bfloat16"` and the like become dtypes.
    """

    recipe: str
    global_batch_size: int
    steps: int = 10
    micro_batch_size: int = 1
    seq_length: int | None = None
    vocab_size: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    local: bool = False


_LLAMA = "megatron.bridge.recipes.llama"
_FULL = {"model.recompute_granularity": "full", "model.recompute_method": "uniform", "model.recompute_num_layers": 1}
_BF16_MOMENTS = {"optimizer.use_precision_aware_optimizer": True}
_BF16_MOMENTS |= {f"optimizer.{name}_dtype": "torch.bfloat16" for name in ("exp_avg", "exp_avg_sq")}
LLAMA_IDS = 128256

TRAININGS: dict[str, Training] = {
    "lesson_03": Training(f"{_LLAMA}:llama32_1b_pretrain_config", 16, 12, 2),
    "llama_1b": Training(f"{_LLAMA}:llama32_1b_pretrain_config", 8, vocab_size=LLAMA_IDS),
    "llama_1b_recompute": Training(f"{_LLAMA}:llama32_1b_pretrain_config", 8, vocab_size=LLAMA_IDS, fields=_FULL),
    "llama_1b_local": Training(
        f"{_LLAMA}:llama32_1b_pretrain_config", 16, seq_length=2048, vocab_size=LLAMA_IDS, local=True
    ),
    "llama_1b_fp8": Training(
        f"{_LLAMA}:llama32_1b_pretrain_config", 8, vocab_size=LLAMA_IDS,
        fields={"mixed_precision": "bf16_with_fp8_current_scaling_mixed"},
    ),
    "llama_3b": Training(f"{_LLAMA}:llama32_3b_pretrain_config", 4, vocab_size=LLAMA_IDS),
    "llama_3b_recompute": Training(f"{_LLAMA}:llama32_3b_pretrain_config", 4, vocab_size=LLAMA_IDS, fields=_FULL),
    "nemotron_4b": Training(
        "megatron.bridge.recipes.nemotronh.h100.nemotron_3_nano_4b:nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config",
        8, fields=_BF16_MOMENTS,
    ),
    "lora_8b": Training(f"{_LLAMA}:llama3_8b_pretrain_config", 8, seq_length=4096, vocab_size=LLAMA_IDS,
        fields={"model.context_parallel_size": 1},
    ),
}  # fmt: skip
"""The runs of the checks of the same names; few steps, every one in the log, otherwise as NVIDIA wrote them."""


def config(name: str, *, dry: bool) -> Any:
    """Bridge's configuration of a run of `TRAININGS`, without the Hub, for one rank.

    Args:
        dry: Shrink the model to what a CPU trains in a second, keeping its kind.
    """
    asked = TRAININGS[name]
    module, _, function = asked.recipe.partition(":")
    with recipes.offline():
        cfg = getattr(importlib.import_module(module), function)()
    if name == "lesson_03":
        reference.shrink(cfg)
    if asked.seq_length:
        cfg.model.seq_length = cfg.dataset.seq_length = asked.seq_length
    if asked.vocab_size:
        cfg.tokenizer.vocab_size = asked.vocab_size
    reference.few_steps(cfg, steps=asked.steps, global_batch_size=asked.global_batch_size,
                            micro_batch_size=asked.micro_batch_size)  # fmt: skip
    if cfg.tokenizer.tokenizer_type != "NullTokenizer":  # the ids of mock data are drawn, not read
        cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "NullTokenizer", None
        cfg.tokenizer.vocab_size, cfg.tokenizer.hf_tokenizer_kwargs = cfg.model.vocab_size, {}
    assign(cfg, {path: _dtype(value) for path, value in asked.fields.items()})
    if asked.local:
        _take_local_layers(cfg)
    if dry:
        _shrink_further(cfg)
    return cfg


def _dtype(value: Any) -> Any:
    """`"torch.bfloat16"` as torch's dtype; anything else as it is."""
    if not (isinstance(value, str) and value.startswith("torch.")):
        return value
    import torch

    return getattr(torch, value.removeprefix("torch."))


_OF_TRANSFORMER_ENGINE = (
    "model.attention_backend", "model.cp_comm_type", "model.masked_softmax_fusion", "model.apply_rope_fusion",
    "model.persist_layer_norm", "model.tp_comm_overlap", "model.fp8", "model.use_transformer_engine_op_fuser",
    "optimizer.use_precision_aware_optimizer",
)  # fmt: skip
"""Fields of `devices.FIELDS` that Core's own layers need on a GPU as well."""


def _take_local_layers(cfg: Any) -> None:
    from megatron.bridge.models.gpt_provider import local_layer_spec

    told = devices.differences(cfg, "cpu")
    assign(cfg, {one.field: one.in_ranks for one in told if one.field in _OF_TRANSFORMER_ENGINE})
    cfg.model.transformer_impl, cfg.model.cross_entropy_fusion_impl = "local", "native"
    cfg.model.transformer_layer_spec = local_layer_spec


def _shrink_further(cfg: Any) -> None:
    pattern = getattr(cfg.model, "hybrid_layer_pattern", None)
    sizes: dict[str, Any] = {"hybrid_layer_pattern": "*-*-"} if pattern else {"num_layers": 2}
    recipes.shrink(cfg, **sizes, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128,
                   seq_length=64, vocab_size=512)  # fmt: skip
    reference.few_steps(cfg, steps=3, global_batch_size=2 * cfg.train.micro_batch_size,
                            micro_batch_size=cfg.train.micro_batch_size)  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is there


def machine(context: Context) -> None:
    """Names, versions and sizes; nothing of it needs a package of the course's stack."""
    query = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    told = _told(["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits"])
    gpu = dict(zip(query, map(str.strip, told.splitlines()[0].split(",")), strict=False)) if told else {}
    context.note(
        gpu=DRY_DEVICE if context.dry else gpu.pop("name", None),
        driver=gpu.pop("driver_version", None),
        **{f"gpu {name}": value for name, value in gpu.items()},
        date=time.strftime("%Y-%m-%d"),
        python=platform.python_version(),
        glibc=platform.libc_ver()[1],
        kernel=platform.release(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(units.gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), 1),
        shared_memory_gib=_free_gib("/dev/shm"),
        work_free_gib=_free_gib(context.work),
        gcc=(_told(["gcc", "--version"]).splitlines() or [None])[0],
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        nvcc=(_told(["nvcc", "--version"]).splitlines() or [None])[-1],
        versions={name: _version(name) for name in PACKAGES},
    )
    if not context.dry and gpu:
        sheet = _data_sheet(context)
        if sheet:
            context.row("memory of the GPU", "GiB", units.gib(sheet.memory_bytes),
                        float(gpu["memory.total"]) / 1024, sheet.source, tolerance=0.2)  # fmt: skip


def _told(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _free_gib(folder: str | Path) -> float | None:
    return round(units.gib(shutil.disk_usage(folder).free), 1) if os.path.exists(folder) else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _data_sheet(context: Context) -> ceiling.Gpu | None:
    """The row of `data/gpus.json` for the GPU here; a dry run takes the first, whose ceiling it will not reach."""
    if context.dry:
        return next(iter(ceiling.gpus().values()))
    names = stack.gpus() or []
    return ceiling.named(names[0]) if names else None


_IMPORTS = {
    "torch": "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())",
    "megatron.core": "from megatron.core import parallel_state; from megatron.core.optimizer import Adam; print(Adam)",
    "pretrain in a GPU rank": "from course_lib import stack; print([row.name for row in stack.prepare_imports(compiler=True)]); "
    "from megatron.bridge.training.pretrain import pretrain",
    "transformer_engine": "import torch, transformer_engine.pytorch as te; from megatron.core.extensions.transformer_engine "
    "import HAVE_TE; print(te.__file__, HAVE_TE)",
    "nvidia_resiliency_ext": "from nvidia_resiliency_ext.inprocess import CallWrapper",
    "mamba_ssm": "import torch; from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined",
    "causal_conv1d": "import torch; from causal_conv1d import causal_conv1d_fn",
    "triton": "import triton; print(triton.__version__)",
    "does an import touch the GPU": "import torch, transformer_engine.pytorch; print(torch.cuda.is_initialized())",
}
_OPTIONAL = (
    "transformer_engine",
    "nvidia_resiliency_ext",
    "mamba_ssm",
    "causal_conv1d",
    "does an import touch the GPU",
)


def imports(context: Context) -> None:
    """Each import in a process of its own, all at once; a missing optional package is said, and is no failure."""
    wanted = {name: _IMPORTS[name] for name in (("torch",) if context.dry else _IMPORTS)}
    began = time.monotonic()
    started = {
        name: subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
        for name, code in wanted.items()
    }  # fmt: skip
    bad = []
    for name, process in started.items():
        try:
            told, _ = process.communicate(timeout=max(1.0, context.seconds_left() - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            told = "it still imported when the time was up"
        lines = told.strip().splitlines()
        if process.returncode != 0 and name not in _OPTIONAL:
            bad.append(name)
        outcome = "yes" if process.returncode == 0 else BROKEN
        context.note(
            **{name: f"{outcome}, {' '.join(lines[-1:])[:400]} ({time.monotonic() - began:.1f} s after all began)"}
        )
    if bad:
        raise ImportError(f"a rank cannot do without: {', '.join(bad)}")


# ------------------------------------------------------------------------------------------------- the bare GPU


def rates(context: Context) -> None:
    """Matrix products and copies of the GPU alone."""
    context.take_gpu()
    (found,) = _call("rates", {"dry": context.dry}, context)
    sheet = _data_sheet(context)
    context.note(**{key: value for key, value in found.items() if key not in ("bf16_tflops", "copy_gb_per_second")})
    peak = sheet.flops_per_second / 1e12 if sheet and not context.dry else None
    context.row("bf16 matrix product, 8192 cubed", "TFLOP/s", peak, found["bf16_tflops"], "data/gpus.json, a ceiling")
    context.row("device copy, read and written", "GB/s", None, found["copy_gb_per_second"])


def _call(job: str, argument: dict[str, Any], context: Context) -> list[Any]:
    return launch.call(f"{_RANKS}:{job}", argument, ranks=1, limit_seconds=context.seconds_left() + WAITING_SECONDS)


WAITING_SECONDS = 600.0
"""How much longer than its limit a rank may live, while it waits for the GPU; the orchestrator ends the check itself."""


def layers(context: Context) -> None:
    """One transformer layer of Transformer Engine and one of Core's own, with the same weights, against fp32."""
    context.take_gpu()
    (found,) = _call("layers", {"dry": context.dry}, context)
    context.note(**found["notes"])
    for part in ("output", "gradient of the input", "gradient of the weights"):
        own, te = found["local"][part], found["te"][part]
        bound = max(0.01, own)
        context.row(f"relative error of the {part}, TE beside Core's own", "", own, te,
                    "the error of Core's own layer, both against fp32", tolerance=bound)  # fmt: skip


# ------------------------------------------------------------------------------------------------- training runs


def training(context: Context) -> None:
    """Train the run of the check's name, and hold it against its plan."""
    cfg = config(context.name, dry=context.dry)
    _do_without_what_is_broken(cfg, context)
    expected = _expect(cfg, context)
    context.take_gpu()
    _train(cfg, context, expected)


def _do_without_what_is_broken(cfg: Any, context: Context) -> None:
    """Core's own layers where Transformer Engine is not to be had: what can be settled without it still is."""
    notes = context.earlier.get("imports", {}).get("notes", {})
    missing = str(notes.get("transformer_engine", BROKEN)).startswith(BROKEN)
    if missing and not context.dry and cfg.model.transformer_impl != "local":
        _take_local_layers(cfg)
        context.note(layers="Megatron Core's own, because Transformer Engine does not import here")


@dataclass(frozen=True)
class _Expected:
    total_gib: float | None = None
    states_gib: float | None = None
    first_loss: float | None = None
    ceiling_seconds: float | None = None
    flops_per_token: float | None = None


def _expect(cfg: Any, context: Context) -> _Expected:
    """What the course says of a run before it begins; what it cannot say is noted with the reason."""
    rows, found = layout.embedding_rows(cfg), {}
    found["first_loss"] = baselines.first_loss(rows, cfg.model.hidden_size, cfg.model.init_method_std)
    try:
        (states,) = memory.states(cfg, ranks=1)
        found["states_gib"] = units.gib(states.total_bytes)
        plan = memory.plan(cfg, ranks=1)
        found["total_gib"] = units.gib(plan.total_bytes)
        context.note(planned_gib={part: round(units.gib(size), 4) for part, size in plan.components.items()})
    except ValueError as error:
        context.note(not_planned=str(error)[:300])
    if cfg.peft is not None:
        context.note(
            no_ceiling="frozen weights need no gradients, and the count of operations takes all weights as trained"
        )
    elif "fp8" in str(cfg.mixed_precision):
        context.note(no_ceiling="the data sheet's rate is that of bf16")
    else:
        found |= _ceiling(cfg, rows, context)
    return _Expected(**found)


def _ceiling(cfg: Any, rows: int, context: Context) -> dict[str, float]:
    """Operations of a token, and seconds of a step at the data sheet's rate; one GPU sends no message."""
    try:
        found = {"flops_per_token": ceiling.flops_per_token(cfg, vocab_size=rows)}
    except ValueError as error:
        context.note(no_ceiling=str(error)[:300])
        return {}
    if sheet := _data_sheet(context):
        tokens = cfg.train.global_batch_size * cfg.model.seq_length
        try:
            best = ceiling.of(cfg, ranks=1, gpu=sheet, vocab_size=rows).tokens_per_second_per_gpu
        except ValueError:  # the messages of some layers are not counted, and here there are none
            if cfg.model.recompute_granularity:
                return found
            best = sheet.flops_per_second / found["flops_per_token"]
        found["ceiling_seconds"] = tokens / best
    return found


def _train(cfg: Any, context: Context, expected: _Expected, *, target: str = "rank_main", **options: Any) -> runs.Run:
    """Train on one rank; whatever the run left is written down, also if it failed."""
    smi = _Smi(context)
    try:
        run = launch.run(
            cfg, ranks=1, name=context.name, show=None, target=f"{_RANKS}:{target}", watch=smi.look, **options
        )
    except launch.RunFailed as failed:
        context.note(outcome=failed.outcome.cause, hint=failed.outcome.hint, last_words=failed.outcome.tail[-1500:])
        _compare(failed.run, cfg, context, expected, smi)
        raise
    _compare(run, cfg, context, expected, smi)
    return run


class _Smi:
    """Looks at `nvidia-smi` every two seconds: the driver's view of the memory that torch's allocator counts from inside."""

    QUERY = ("memory.used", "clocks.sm", "power.draw", "temperature.gpu")

    def __init__(self, context: Context) -> None:
        self.context, self.peak_mib, self.last, self.seen = context, 0.0, 0.0, {}

    def look(self, run: runs.Run) -> None:
        """Called while a run goes on; ends it in time to write down what there is.

        Raises:
            TimeoutError: If the check's time is up.
        """
        if self.context.seconds_left() < 0:
            raise TimeoutError(f"the check's {self.context.limit_seconds:.0f} s were up in the stage {run.stage()!r}")
        if self.context.dry or time.monotonic() - self.last < 2 or not self.context.gate.exists():
            return
        self.last = time.monotonic()
        told = _told(["nvidia-smi", f"--query-gpu={','.join(self.QUERY)}", "--format=csv,noheader,nounits"])
        with contextlib.suppress(ValueError, IndexError):
            values = [float(value) for value in told.splitlines()[0].split(",")]
            if values[0] >= self.peak_mib:
                self.peak_mib, self.seen = values[0], dict(zip(self.QUERY, values, strict=True))


def _compare(run: runs.Run, cfg: Any, context: Context, expected: _Expected, smi: _Smi) -> None:
    """Planned beside measured, of a run that may have ended early."""
    metrics, used = run.metrics, run.memory
    context.note(steps=len(metrics), losses=[round(loss, 6) for loss in metrics.loss.dropna()],
                 grad_norms=[round(norm, 4) for norm in metrics.grad_norm.dropna()])  # fmt: skip
    # A CPU rank counts other bytes: fp32, and the whole process.
    planned, states = (None, None) if context.dry else (expected.total_gib, expected.states_gib)
    if not used.empty:
        share = MEMORY_SHARE * (planned or 0) or None
        context.row("peak memory, by torch's allocator", "GiB", planned, units.gib(used.peak_memory_bytes.max()),
                    "memory.plan", tolerance=share)  # fmt: skip
        if not metrics.empty:
            context.row("memory between steps: weights, gradients, optimizer", "GiB", states,
                        units.gib(used.memory_bytes.iloc[-1]), "memory.states",
                        tolerance=MEMORY_SHARE * (states or 0) or None)  # fmt: skip
    allocator = run.path / "allocator.json"
    if allocator.exists():
        kept = json.loads(allocator.read_text(encoding="utf-8"))
        context.row("peak memory that the allocator reserved", "GiB", None, units.gib(kept["reserved_bytes"]))
        context.row("memory in use on the whole GPU", "GiB", None, smi.peak_mib / 1024, "nvidia-smi")
        context.note(nvidia_smi=smi.seen, allocator=kept)
    if metrics.empty:
        return
    if expected.first_loss is not None:
        context.row("loss of fresh weights", "nats/token", expected.first_loss, metrics.loss.iloc[0], "ln V + h s^2 / 2",
                    tolerance=FIRST_LOSS_NATS)  # fmt: skip
    steady = metrics.iloc[min(4, len(metrics) // 2) :]
    seconds, tokens = float(steady.elapsed_ms.median()) / 1e3, float(steady.tokens.iloc[0])
    best = None if context.dry else expected.ceiling_seconds
    context.row("one step", "s", best, seconds, "planning.ceiling: the data sheet's rate, nobody reaches it")
    context.row("tokens per second", "tokens/s", tokens / best if best else None, tokens / seconds, "planning.ceiling")
    if expected.flops_per_token and not context.dry:
        rate = expected.flops_per_token * tokens / seconds / 1e12
        bare = _measured(context.earlier.get("rates"), "TFLOP/s")
        context.row("operations of the model", "TFLOP/s", bare, rate, "this GPU's own matrix product, check `rates`")
    gaps = steady.time.diff().dropna()
    if len(gaps):
        context.row("one step with its logging, from end to end", "s", None, float(gaps.median()))


def _measured(result: dict | None, unit: str) -> float | None:
    rows = (result or {}).get("rows", [])
    return next((row["measured"] for row in rows if row["unit"] == unit), None)


# ------------------------------------------------------------------------------------------ what a laptop left


def resume(context: Context) -> None:
    """Go on from a laptop's checkpoint, and hold the losses against those that the laptop met on the same data."""
    folder = context.laptop or context.work / "laptop"
    if not (folder / reference.DONE).exists():
        context.note(laptop="no bundle: the CPU of this machine prepared what a laptop would")
        reference.make(folder, dry=context.dry)
    kept = reference.read(folder)
    cfg = reference.config(folder, kept["steps"])
    _do_without_what_is_broken(cfg, context)
    in_fp32 = context.name.endswith("fp32")
    if in_fp32:
        reference.set_fp32(cfg)
    context.note(load=str(kept["checkpoint"]), laptop_versions=kept["versions"])
    context.take_gpu()
    run = _train(cfg, context, _Expected(), load=kept["checkpoint"])
    mine, theirs = dict(zip(run.metrics.step, run.metrics.loss, strict=True)), kept["losses"]
    shared = sorted(set(mine) & set(theirs))
    begins = kept["save_interval"] + 1
    context.row("first step after resuming", "step", begins, min(mine, default=None), "the checkpoint", tolerance=0)
    bound = _FP32_NATS if in_fp32 else _BF16_NATS
    for word, step in (("first", shared[0]), ("last", shared[-1])):
        context.row(f"loss of the {word} step that both have", "nats/token", theirs[step], mine[step],
                    "the same step on a CPU rank", tolerance=bound if word == "first" else 4 * bound)  # fmt: skip
    context.row("largest difference of a loss", "nats/token", 0.0, max(abs(mine[step] - theirs[step]) for step in shared),
                "the same steps on a CPU rank", tolerance=4 * bound)  # fmt: skip


def lora(context: Context) -> None:
    """Write fresh weights of the base model, and train low-rank adapters on them: their values change no byte of memory."""
    from megatron.bridge.peft.lora import LoRA

    cfg = config(context.name, dry=context.dry)
    cfg.peft = LoRA(dim=8, alpha=16)
    cfg.ddp.use_distributed_optimizer = cfg.optimizer.use_distributed_optimizer = False
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = False
    cfg.optimizer.overlap_param_gather = False
    expected = _expect(cfg, context)
    context.take_gpu()
    base = copy.deepcopy(cfg)
    base.peft = None
    folder = runs.create("lora-base")
    base.checkpoint.save = base.checkpoint.load = None
    base.to_yaml(str(folder / "base.yaml"))
    began = time.monotonic()
    _call("save_fresh", {"config": str(folder / "base.yaml"), "to": str(folder / "checkpoint")}, context)
    context.note(base_checkpoint_seconds=round(time.monotonic() - began, 1))
    cfg.checkpoint.pretrained_checkpoint = str(folder / "checkpoint")
    _train(cfg, context, expected)

"""What of NVIDIA's stack is installed, on which device it will run, and what stands in for what is missing.

`prepare_imports()` lets a process without a GPU import Megatron-Bridge.  It changes imports only: no call of
`torch.cuda` behaves differently afterwards, so it is safe in a notebook kernel.  Making CUDA-shaped calls land on a CPU
is the business of `course_lib.ranks.cpu`, which only rank processes load.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import logging
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from course_lib.common import screen
from course_lib.common.project import variable
from course_lib.stack import local_layers, patches
from course_lib.stack.patches import Patches

__all__ = [
    "GPU_SET_UP",
    "HELPERS",
    "LESSON_RANKS",
    "TESTED",
    "StandIn",
    "device",
    "gpu_count",
    "gpus",
    "hide_gpu_packages",
    "imported_to_stay",
    "prepare_imports",
    "quietly",
    "stand_ins",
    "versions",
]

TESTED = {"torch": "2.13.0", "megatron-core": "0.19.2", "megatron-bridge": "0.6.2"}
"""The versions that `course_lib.ranks.cpu` was tested against; `pyproject.toml` pins the same."""

LESSON_RANKS = 8
"""How many ranks the lessons' runs have: so many GPUs are needed to run them on GPUs."""


@dataclass(frozen=True)
class StandIn:
    """A package or variable that differs from a GPU node's, why the real one cannot be here, and where its substitute stands."""

    name: str
    reason: str
    where: str


_MODULES = {
    "transformer_engine": ("fused CUDA layers: no wheel for a CPU, yet LoRA's module imports it", ("pytorch",)),
    "nvidia_resiliency_ext": (
        "restarts in place on GPU clusters: needs glibc 2.39, yet pretrain imports it",
        ("inprocess",),
    ),
}


GPU_SET_UP = (
    'Run `uv sync --locked --inexact --extra gpu` on the node (README, "Never run on a GPU"), or use NVIDIA\'s container; '
    "COURSE_DEVICE=cpu runs the lessons' ranks on the CPU."
)
"""How a GPU node gets Transformer Engine."""

_GPU_ONLY = (
    *("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_attn", "flash_attn_3"),
    *("mamba_ssm", "causal_conv1d"),
)
"""Packages of CUDA kernels that Megatron Core takes instead of torch's own as soon as they can be imported."""


def hide_gpu_packages() -> None:
    """Let nobody in this process import what works on GPU tensors only; for CPU ranks on a machine that has it installed.

    Call it before anything imports Megatron: Core decides once, at import, whose optimizer and whose norms it takes.
    """
    for name in _GPU_ONLY:
        if not getattr(sys.modules.get(name), "__stand_in__", False):
            sys.modules[name] = None  # Python's own way to say that a module cannot be imported


def versions() -> dict[str, str | None]:
    """The installed versions of the pinned packages, `None` where one is missing.

    Example:
        >>> sorted(versions())
        ['megatron-bridge', 'megatron-core', 'torch']
    """
    found: dict[str, str | None] = {}
    for name in TESTED:
        try:
            found[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpus() -> list[str] | None:
    """The NVIDIA GPUs that this process may use, asked without importing torch.

    Returns:
        Name and memory of each that `nvidia-smi` lists and `CUDA_VISIBLE_DEVICES` leaves; empty where there is no
        `nvidia-smi`; `None` where there is one that fails.
    """
    command = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError):
        return None
    found = [tuple(line.split(", ", 1)) for line in listing.splitlines()]
    return [words for _, words in _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def _visible(found: list[tuple[str, str]], asked: str | None) -> list[tuple[str, str]]:
    """What CUDA shows of these GPUs: those that are asked for by number or identifier, up to the first that is not there."""
    if asked is None:
        return found
    shown = []
    for word in map(str.strip, asked.split(",")):
        fits = [gpu for number, gpu in enumerate(found) if word == str(number) or (word and gpu[0].startswith(word))]
        if len(fits) != 1 or fits[0] in shown:
            break
        shown += fits
    return shown


def gpu_count() -> int:
    """How many GPUs there are by `gpus()`; 0 where they cannot be asked."""
    return len(gpus() or ())


def device(ranks: int) -> str:
    """The device on which a run of so many ranks happens here.

    Returns:
        `"cuda"` if every rank can have a GPU of its own, else `"cpu"`.  `COURSE_DEVICE` overrides it.

    Raises:
        ValueError: If `COURSE_DEVICE` is neither `cpu` nor `cuda`, or `ranks` no whole number of at least 1.
    """
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ValueError(f"ranks={ranks!r} is not a number of ranks: give a whole number of at least 1")
    return variable("COURSE_DEVICE") or ("cuda" if gpu_count() >= ranks else "cpu")


def missing_modules() -> list[str]:
    """Which of the modules that Bridge imports unconditionally are not installed."""
    return [name for name in _MODULES if not _installed(name)]


def _installed(name: str) -> bool:
    if name in sys.modules:
        loaded = sys.modules[name]
        return loaded is not None and not getattr(loaded, "__stand_in__", False)
    return importlib.util.find_spec(name) is not None


def stand_ins() -> list[StandIn]:
    """What differs from a GPU node once `prepare_imports()` was called here; empty on a complete GPU node."""
    missing = missing_modules()
    if not missing:
        return []
    rows = [StandIn(name, _MODULES[name][0], "an empty module whose names raise when used") for name in missing]
    if "transformer_engine" in missing:
        rows.append(
            StandIn(
                "megatron.core.extensions.transformer_engine",
                "wraps Transformer Engine's layers, which layer specs name",
                "Megatron Core's own layers under the same names (course_lib.stack.local_layers)",
            )
        )
    rows.append(
        StandIn("torch.compile", "compiles for a GPU, and costs seconds to import", "returns the function as it is")
    )
    rows.append(
        StandIn(
            "optional packages", "importing all of Bridge costs eight times `import torch`", "loaded when first used"
        )
    )
    return rows


def prepare_imports(*, compiler: bool = False) -> list[StandIn]:
    """Make `import megatron.bridge` work, and work fast, in this process.

    On a GPU node where Transformer Engine and the resiliency extension are installed it changes no import.  In a notebook,
    what the course refuses ends in your cell from now on.  Where something is stood in for, Python's garbage collector
    looks for cycles more seldom afterwards.

    Args:
        compiler: Leave `torch.compile` as it is: a GPU rank trains with it.

    Raises:
        ImportError: If a pinned package is not installed.
    """
    screen.shorten_tracebacks()
    absent = [name for name, version in versions().items() if version is None]
    if absent:
        raise ImportError(f"not installed: {', '.join(absent)}. Run `make setup` in the course's directory.")
    rows = stand_ins()
    if not rows:
        return rows
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _quiet_first_import()
    from course_lib.stack import lazy

    if not compiler and not lazy.ready():  # whoever prepared this process first has decided
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        patches.apply(COMPILER)
    with imported_to_stay():
        lazy.defer(compiler=compiler)
        _put_stand_ins()
    if 0 < gc.get_threshold()[0] < SELDOM[0]:  # 0 is off, and stays off
        gc.set_threshold(*SELDOM)
    return rows


SELDOM = (50_000, 20, 20)
"""Thresholds of the collector: planning makes objects by the hundred thousand, and at Python's 700 a tenth of it is search."""


@contextmanager
def imported_to_stay() -> Iterator[None]:
    """What is imported in this block stays, so no garbage collector walks it, now or later: an eighth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


COMPILER = Patches()


@COMPILER.replaces("torch.compile", why="under TORCHDYNAMO_DISABLE=1 it does this, and imports the compiler first")
def _do_not_compile(_: object, model: object = None, /, **__: object) -> object:
    """Returns the function as it is."""
    return model if model is not None else (lambda function: function)


HELPERS = Patches()
"""Megatron Core's index helper in every rank that trains.

Source: megatron-core 0.19.2 `datasets/utils.py` `compile_helpers`; megatron-bridge 0.6.2 `training/initialize.py`.
"""


@HELPERS.replaces(
    "megatron.core.datasets.utils.compile_helpers",
    "megatron.bridge.training.initialize.compile_helpers",
    why="the wheel ships helpers_cpp built but no Makefile: `make` fails and ends the first rank, on GPUs too",
)
def _compile_helpers(original: Callable) -> None:
    """Compiles in a source checkout, which has the Makefile, and nowhere else."""
    from megatron.core.datasets import utils

    if Path(utils.__file__).with_name("Makefile").exists():
        original()


@contextmanager
def quietly(
    *loggers: str, below: int = logging.WARNING, messages: Iterable[str] = ("Could not determine rank",)
) -> Iterator[None]:
    """Keep what upstream prints, logs below a level and warns of by these messages out of a notebook; the rest stays.

    Without loggers it is all of Megatron, whose log of every array and token that it reads is long, and one warning that
    is wrong where there is one process only.

    Example:
        >>> with quietly():
        ...     print("> building train, validation, and test datasets for GPT ...")
        >>> logging.getLogger("megatron").level == logging.WARNING
        False
    """
    found = [logging.getLogger(name) for name in loggers or ("megatron",)]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(below)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            for message in messages:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(found, before, strict=True):
            logger.setLevel(level)


def _quiet_first_import() -> None:
    """Upstream reports each absent GPU package many times, some with a traceback; the doctor says it in one line."""
    for name in ("megatron.bridge.utils.import_utils", "megatron.bridge.models.gemma.gemma2_provider"):
        logging.getLogger(name).addFilter(lambda record: record.levelno > logging.INFO)
    logging.getLogger("transformers.configuration_utils").addFilter(lambda r: "torch_dtype" not in str(r.msg))
    for name in ("torch.utils.cpp_extension", "torch.utils._pytree"):  # no CUDA, and an old way of torchao's
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*Apex (is|are) not installed.*",
        ".*Transformer Engine and Apex are not installed.*",
        ".*Only transformer-engine>=.*",
        ".*is experimental and still under active development.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _put_stand_ins() -> None:
    # Megatron Core must record that Transformer Engine is absent before something answers to its name.
    importlib.import_module("megatron.core.fp8_utils")
    importlib.import_module("megatron.core.extensions.transformer_engine")
    for name in missing_modules():
        if sys.modules.get(name) is not None:  # called before: a second one would have other classes of the same names
            continue
        module = _empty_module(name)
        for child in _MODULES[name][1]:
            setattr(module, child, _empty_module(f"{name}.{child}"))
        if name == "transformer_engine":
            local_layers.stand_in(module)


def _empty_module(name: str) -> types.ModuleType:
    module = types.ModuleType(name, f"Stand-in: {name} is not installed here (see course_lib.stack).")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__stand_in__ = True
    module.__version__ = "0"

    def missing(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        created = _Absent(attribute, (), {"__module__": name})
        setattr(module, attribute, created)  # one class per name, so that `is` and isinstance stay meaningful
        return created

    module.__getattr__ = missing
    sys.modules[name] = module
    return module


class _Absent(type):
    """A class that can be imported, subclassed and asked for attributes, but not used."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        created = _Absent(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})
        setattr(cls, name, created)
        return created

    def __call__(cls, *args: object, **kwargs: object) -> object:
        if cls.__mro__[1] is object:
            raise RuntimeError(
                f"{cls.__module__}.{cls.__name__} needs a package that is not installed here (CPU machine)."
            )
        return super().__call__(*args, **kwargs)


def over_container(*names: str) -> str:
    """The command that installs tested versions over those of NVIDIA's container, and nothing that fits its torch.

    The container's `python` is that of an environment without a `pip` of its own, and the `pip` on its path installs beside
    it, for the system's Python.  Source: Megatron-Bridge docker/Dockerfile.fw_base @ 0316315.

    Example:
        >>> over_container("megatron-core").rpartition("==")[0]
        'python -m pip install --no-deps megatron-core'
    """
    names = names or tuple(name for name in TESTED if name != "torch")
    return " ".join(["python -m pip install --no-deps", *(f"{name}=={TESTED[name]}" for name in names)])

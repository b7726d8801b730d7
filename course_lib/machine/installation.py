"""Which of NVIDIA's packages are installed here, where each is imported from, and the traps of mixing them.

Nothing here imports torch or megatron: versions come from the installed metadata and places from the import system.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from course_lib import stack
from course_lib.machine.readings import Finding, fail_unless, warn_unless

__all__ = [
    "BESIDE_THE_ENGINE",
    "PACKAGES",
    "Package",
    "beside_the_engine",
    "findings",
    "foreign_megatron",
    "helpers",
    "importing",
    "imports",
    "inside",
    "leptonai",
    "nccl",
    "one_installation",
    "packages",
    "places",
    "source",
    "torch_has_cuda",
    "torch_has_gloo",
    "transformer_engine",
    "version",
    "versions",
]

# Distributions of NVIDIA's stack and what Python imports them as. Those that are not installed are listed too.
PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "megatron-bridge": "megatron.bridge",
    "megatron-energon": "megatron.energon",
    "nvidia-modelopt": "modelopt",
    "nemo-run": "nemo_run",
    "nemo-curator": "nemo_curator",
    "nemo-automodel": "nemo_automodel",
    "transformer-engine": "transformer_engine",
    "nvidia-resiliency-ext": "nvidia_resiliency_ext",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "flash-linear-attention": "fla",
    "emerging-optimizers": "emerging_optimizers",
    "nvidia-nccl-cu13": "nvidia.nccl",
}
# What starts runs, what feeds them, and the path beside Bridge: lesson 01 shows them, no rank imports them.
BESIDE_THE_ENGINE = ("nemo-run", "nemo-curator", "nemo-automodel")
# What the doctor imports of each: the modules of which lesson 01 shows an object, or their package where that takes long.
IMPORTED = {
    "nemo-run": "nemo_run",
    "nemo-curator": "nemo_curator.stages.text.filters.heuristic.string",
    "nemo-automodel": "nemo_automodel",
}
IMPORT_LIMIT_S = 120.0  # on two idle cores all three take under ten
CONTAINER_VARIABLES = ("NVIDIA_PRODUCT_NAME", "NEMO_VERSION", "NVIDIA_PYTORCH_VERSION")
SET_UP = "Run `make setup`, then use `.venv/bin/python`."


@dataclass(frozen=True)
class Package:
    """A distribution: `version` and `file` are None where it is not installed."""

    name: str
    module: str
    version: str | None
    file: str | None


def findings(*, has_gpus: bool) -> list[Finding]:
    """Every check of the installed packages."""
    found = [
        foreign_megatron(),
        *versions(stack.versions(), environment=os.environ, has_gpus=has_gpus),
        one_installation(places("megatron.core"), places("megatron.bridge")),
        helpers(),
        torch_has_gloo(),
    ]
    if has_gpus:
        found += [torch_has_cuda(), nccl(), transformer_engine(stack.missing_modules())]
    if version("nemo-run"):
        found.append(leptonai(version("leptonai")))
    return [*found, beside_the_engine({name: version(name) for name in BESIDE_THE_ENGINE})]


def packages() -> tuple[Package, ...]:
    """NVIDIA's packages with version and the file each is imported from."""
    rows = []
    for name, module in PACKAGES.items():
        installed = version(name)
        files = places(module) if installed else []
        rows.append(Package(name, module, installed, str(files[0]) if files else None))
    return tuple(rows)


def version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def beside_the_engine(found: Mapping[str, str | None]) -> Finding:
    """NeMo Run, NeMo Curator and AutoModel: training does not need them, the lessons about them do.

    Args:
        found: Version by distribution name, None where one is not installed.
    """
    missing = [name for name, installed in found.items() if installed is None or not places(PACKAGES[name])]
    value = f"not importable: {', '.join(missing)}" if missing else ", ".join(f"{n} {v}" for n, v in found.items())
    return warn_unless(not missing, "beside the engine", value, SET_UP)


def imports(modules: Mapping[str, str] = IMPORTED, *, seconds_limit: float = IMPORT_LIMIT_S) -> list[Finding]:
    """Import each package beside the engine in a process of its own, all at the same time.

    That a version is installed does not say that its module can be run: only importing it does.  A process of its own
    keeps a broken package, and the seconds and the memory of a whole one, away from this process.

    Args:
        modules: What to import, by distribution name; a package that is not installed is left out.
    """
    began = time.monotonic()
    # Nothing of an import is garbage: to look for it takes an eighth of the time.
    command = [sys.executable, "-W", "ignore", "-c"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    started = {
        name: subprocess.Popen([*command, f"import gc; gc.disable(); import {module}"], **streams)
        for name, module in modules.items()
        if version(name)
    }
    found = []
    for name, process in started.items():
        try:
            # Those that are over while another one hangs still get a moment to say so.
            _, said = process.communicate(timeout=max(1.0, began + seconds_limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            fix = f"Try `{sys.executable} -c 'import {modules[name]}'`, and again when the machine is less busy."
            found.append(Finding(f"import of {name}", "warn", f"not over within {seconds_limit:.0f} s", fix))
            continue
        if process.returncode == 0:
            found.append(Finding(f"import of {name}", "ok", f"{version(name)}, {modules[name]}"))
            continue
        lines = said.decode(errors="replace").strip().splitlines() or [f"ended with {process.returncode}"]
        fix = f"Run `uv pip install --reinstall {name}=={version(name)}`, or `make setup`."
        found.append(Finding(f"import of {name}", "warn", f"{modules[name]} cannot be imported: {lines[-1]}", fix))
    return found


def places(module: str) -> list[Path]:
    """Files that importing `module` could mean, first one wins; no parent package is imported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return []
    if not rest:
        return [Path(spec.origin)] if spec.origin else []
    roots = dict.fromkeys(spec.submodule_search_locations or ())  # a path that sys.path names twice is one place
    folders = [Path(root, *rest) for root in roots]
    inits = [(folder, folder / "__init__.py") for folder in folders if folder.is_dir()]
    return [init if init.exists() else folder for folder, init in inits]


def source(module: str, name: str) -> str:
    """The text of a file of a package, read without importing anything: `source("nemo_automodel", "cli/app.py")`."""
    return (places(module)[0].parent / name).read_text(encoding="utf-8")


def inside(namespace: str) -> set[str]:
    """The packages in the folders of a namespace package, whichever distribution brought each."""
    roots = importlib.util.find_spec(namespace).submodule_search_locations
    return {init.parent.name for root in roots for init in Path(root).glob("*/__init__.py")}


def importing(module: str, other: str) -> int:
    """How many files of a module import another one, by their text."""
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in places(module)[0].parent.rglob("*.py"))
    return sum(f"from {other}" in text or f"import {other}" in text for text in texts)


def foreign_megatron() -> Finding:
    """A regular package of that name, PyPI's or a folder of your own, hides NVIDIA's namespace package."""
    spec = importlib.util.find_spec("megatron")
    if spec is None:
        return Finding("megatron namespace", "fail", "nothing to import", SET_UP)
    if spec.origin is None:
        return Finding("megatron namespace", "ok", "NVIDIA's namespace package")
    origin = Path(spec.origin)
    if {"site-packages", "dist-packages"} & set(origin.parts):
        fix = (
            "Run `pip uninstall -y megatron`, then `make setup`: that name on PyPI is another project, NVIDIA's is "
            "`megatron-core`."
        )
    else:
        mine = origin.parent if origin.name == "__init__.py" else origin
        fix = f"Rename {mine}, or take {mine.parent} off PYTHONPATH: Python finds it before NVIDIA's package."
    return Finding("megatron namespace", "fail", f"hidden by {spec.origin}", fix)


def versions(found: Mapping[str, str | None], *, environment: Mapping[str, str], has_gpus: bool) -> list[Finding]:
    """Whether torch, core and Bridge are those that the course is tested against.

    On a CPU the redirection refuses other versions, so a difference stops the lessons.
    On GPUs it may only change numbers.
    NVIDIA's container nemo:26.06 carries Bridge 0.5.0 and core 0.18.0.

    Args:
        found: Version by distribution name, as `stack.versions()` gives it.
    """
    container = next((environment[name] for name in CONTAINER_VARIABLES if environment.get(name)), None)
    where = f" (in NVIDIA's container: {container})" if container else ""
    rows = []
    for name, wanted in stack.TESTED.items():
        if found[name] == wanted:
            rows.append(Finding(f"version of {name}", "ok", wanted))
            continue
        fix = SET_UP
        if container and name != "torch":  # the container's own torch, CUDA and Transformer Engine fit each other
            fix = f"Run `{stack.over_container(name)}` in the container, which leaves its torch and Transformer Engine alone."
        status = "warn" if found[name] and has_gpus else "fail"
        value = f"{found[name] or 'not installed'}, tested with {wanted}{where}"
        rows.append(Finding(f"version of {name}", status, value, fix))
    return rows


def one_installation(core: Sequence[Path], bridge: Sequence[Path]) -> Finding:
    """A source checkout beside a wheel, or Bridge from elsewhere than core: Python then mixes two versions silently.

    Args:
        core: Where `megatron.core` could come from, as `places` gives it.
        bridge: The same for `megatron.bridge`.
    """
    if not (core and bridge):
        value = "megatron.core or megatron.bridge cannot be imported"
        return Finding("one installation", "fail", value, SET_UP)
    problems = [*_copies("megatron-core", core), *_copies("megatron-bridge", bridge)]
    core_root, bridge_root = core[0].parents[2], bridge[0].parents[2]
    if core_root != bridge_root:
        problems.append(f"core comes from {core_root}, Bridge from {bridge_root}")
    fix = "Take source checkouts off PYTHONPATH and run `make setup`: core and Bridge must come from one installation."
    return fail_unless(not problems, "one installation", "; ".join(problems) or str(core_root), fix)


def _copies(name: str, files: Sequence[Path]) -> Iterator[str]:
    """What speaks against one and only one installation of a distribution."""
    if len(files) > 1:
        yield f"{len(files)} copies of {PACKAGES[name]}: {', '.join(str(file.parent) for file in files)}"
    # One folder may stand on the path twice, and then gives each of its records twice.
    records = {str(record.locate_file("")): record for record in importlib.metadata.distributions(name=name)}
    if len(records) > 1:
        yield f"{name} is installed {len(records)} times: {', '.join(record.version for record in records.values())}"
    for folder, record in records.items():
        if not files[0].resolve().is_relative_to(Path(folder).resolve()) and not _is_editable(record):
            yield f"{name} {record.version} is installed in {folder} and imported from {files[0].parent}"


def _is_editable(record: importlib.metadata.Distribution) -> bool:
    text = record.read_text("direct_url.json") or "{}"
    return json.loads(text).get("dir_info", {}).get("editable", False)


def helpers(folder: Path | None = None) -> Finding:
    """Megatron's index builder must come ready built: its wheel has no Makefile, so a run cannot build it.

    Args:
        folder: The one that holds it; that of `megatron.core.datasets` if None.
    """
    folder = folder or _folder_of("megatron.core") / "datasets"
    fix = f"Run `uv pip install --reinstall --no-deps megatron-core=={stack.TESTED['megatron-core']}` for its wheel."
    spec = PathFinder.find_spec("helpers_cpp", [str(folder)])
    if spec is None:
        return Finding("helpers_cpp", "fail", f"missing in {folder}", fix)
    name = Path(spec.origin).name
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build_sample_idx_int32  # noqa: B018  the function that every GPTDataset calls
    except Exception as error:  # a broken library may raise anything
        return Finding("helpers_cpp", "fail", f"{name} does not load: {error}", fix)
    return Finding("helpers_cpp", "ok", name)


def torch_has_gloo(library: Path | None = None) -> Finding:
    """Ranks on a CPU talk over gloo, which a torch built without it lacks.

    Args:
        library: The file to look into, since importing torch takes seconds; the installed torch's if None.
    """
    library = library or _folder_of("torch") / "lib/libtorch_python.so"
    fix = f"Run `uv pip install --reinstall torch=={stack.TESTED['torch']}`: PyPI's build has gloo."
    if not library.exists():
        return Finding("gloo in torch", "fail", f"{library} is missing", fix)
    # The type name of c10d::ProcessGroupGloo as C++ compilers write it.
    built_in = b"N4c10d16ProcessGroupGlooE" in library.read_bytes()
    return fail_unless(built_in, "gloo in torch", "built in" if built_in else f"not in {library.name}", fix)


def torch_has_cuda(library: Path | None = None) -> Finding:
    """GPU ranks need a torch that was built for CUDA; a wheel from the CPU index is not.

    Args:
        library: The file that only such a build has; that of the installed torch if None.
    """
    library = library or _folder_of("torch") / "lib/libtorch_cuda.so"
    fix = f"Run `uv pip install --reinstall torch=={stack.TESTED['torch']}` without a CPU index: PyPI's build has CUDA."
    value = "built in" if library.exists() else f"{library.name} is missing: this torch was built for the CPU"
    return fail_unless(library.exists(), "CUDA in torch", value, fix)


def nccl(library: str | None = None) -> Finding:
    """GPU ranks talk over NCCL: its library must load, and says its version itself.

    Args:
        library: File or name of the library; that of PyPI's package if None, else the system's, as in NVIDIA's container.
    """
    import ctypes

    ours = next((p for root in places("nvidia.nccl") for p in root.glob("lib/libnccl.so*")), None)
    library = library or str(ours or "libnccl.so.2")
    number = ctypes.c_int()
    try:
        ctypes.CDLL(library).ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError) as error:
        fix = f"Run `uv pip install --reinstall torch=={stack.TESTED['torch']}`, which brings NCCL along."
        return Finding("NCCL", "fail", f"{library} does not load: {error}", fix)
    major, minor, patch = number.value // 10_000, number.value // 100 % 100, number.value % 100
    return Finding("NCCL", "ok", f"{major}.{minor}.{patch} ({library})")


def transformer_engine(missing: Sequence[str]) -> Finding:
    """The recipes' layers on a GPU are Transformer Engine's.

    Args:
        missing: What `stack.missing_modules` returned.
    """
    there = "transformer_engine" not in missing
    return fail_unless(there, "Transformer Engine", version("transformer-engine") or "not installed", stack.GPU_SET_UP)


def _folder_of(module: str) -> Path:
    return next((file.parent for file in places(module)), Path(f"{module} is not installed"))


def leptonai(found: str | None) -> Finding:
    """nemo-run imports every executor; leptonai 0.47 dropped what its Lepton executor imports.

    Args:
        found: The installed version, or None.
    """
    fits = found is None or [int(number) for number in found.split(".")[:2]] < [0, 47]
    value = (found or "not installed") if fits else f"{found} breaks `import nemo_run`"
    return warn_unless(fits, "leptonai", value, "Run `uv pip install 'leptonai<0.47'`.")

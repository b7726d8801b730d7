"""Import less of the stack before it is needed.

Importing Megatron-Bridge 0.6.2 the plain way loads every model family, three experiment trackers, a grammar compiler and
TorchInductor: about eight times the work of `import torch`.  A training rank uses almost none of it.  `defer()` puts a
finder in front of Python's own that changes *when* a module's body runs, not what it does: the body of a deferred
package runs the first time somebody asks the package for a name.

Nothing here is about CUDA.  `course_lib.stack` decides which process uses it and says so.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Deferred:
    """One module whose body waits until it is needed.

    Attributes:
        functions: Names that others import at the top of their files; each is answered by a function that loads the
            real module when it is *called*, so that the import alone stays free.
        re_exports: True if the body only imports names from elsewhere.  Then a name is resolved on its own, without
            running the rest.
    """

    module: str
    reason: str
    functions: tuple[str, ...] = ()
    re_exports: bool = False


DEFERRED: tuple[Deferred, ...] = (
    Deferred("megatron.bridge", "re-exports every model family", re_exports=True),
    Deferred("megatron.bridge.models", "imports every model family", re_exports=True),
    Deferred("megatron.bridge.models.conversion", "its parts import each other in a circle", re_exports=True),
    Deferred("megatron.bridge.models.hf_pretrained", "as above", re_exports=True),
    Deferred("megatron.bridge.recipes", "imports the recipes of every model family", re_exports=True),
    Deferred("megatron.bridge.recipes.llama", "imports recipes for four GPU generations", re_exports=True),
    Deferred("megatron.bridge.diffusion.models", "imports the diffusion models", re_exports=True),
    Deferred("modelopt", "quantisation and pruning: a run that never asked for them needs none of it"),
    Deferred("modelopt.torch", "as above"),
    Deferred("modelopt.torch.opt", "as above"),
    Deferred(
        "modelopt.torch.opt.plugins",
        "as above; Bridge's checkpoint code imports three functions",
        functions=("restore_modelopt_state", "save_modelopt_state", "save_sharded_modelopt_state"),
    ),
    Deferred(
        "modelopt.torch.opt.plugins.mcore_dist_checkpointing",
        "as above; whoever asks whether a checkpoint is a quantised one imports one function",
        functions=("_load_extra_state_from_sharded_checkpoint",),
    ),
    Deferred("modelopt.torch.quantization", "as above"),
    Deferred(
        "modelopt.torch.quantization.utils",
        "as above; Bridge's exporter asks one question",
        functions=("is_quantized",),
    ),
    Deferred("modelopt.torch.distill", "as above"),
    Deferred("modelopt.torch.distill.plugins", "as above"),
    Deferred(
        "modelopt.torch.distill.plugins.megatron",
        "as above; Bridge's training loop imports one function",
        functions=("get_tensor_shapes_adjust_fn_for_distillation",),
    ),
    Deferred(
        "megatron.bridge.training.post_training.distillation",
        "imports all of modelopt; the GPT step imports one function",
        functions=("loss_func_kd",),
    ),
    Deferred(
        "megatron.core.resharding.copy_services.nvshmem_copy_service",
        "imports cuda.core, to move weights by NVSHMEM; the refit names one class",
        functions=("NVSHMEMCopyService",),
    ),
    Deferred("rfc3987_syntax", "compiles a URL grammar for three seconds", functions=("is_valid_syntax",)),
    Deferred(
        "megatron.bridge.data.energon.base_energon_datamodule",
        "imports all of Energon and its object stores, for data sets of pictures; the configuration names one class",
        functions=("EnergonMultiModalDataModule",),
    ),
    Deferred("multistorageclient", "object stores: compiles a URL grammar for three seconds"),
    Deferred("httpx._main", "a command line with its own colours; httpx names its one function", functions=("main",)),
    Deferred("wandb", "experiment tracker, used only when a run names a project", functions=("run",)),
    Deferred("mlflow", "as above; TRL imports it wherever it is installed"),
    Deferred("datasets", "Hugging Face datasets", functions=("load_dataset", "concatenate_datasets")),
    Deferred("datasets.builder", "as above; Bridge sets one attribute here"),
    Deferred(
        "transformers.quantizers.quantizer_torchao",
        "imports all of torchao, which only AutoModel needs; transformers wants one class for quantised models",
        functions=("TorchAoHfQuantizer",),
    ),
    Deferred(
        "sklearn.metrics",
        "transformers wants functions for assisted generation and for old benchmarks",
        functions=("roc_curve", "f1_score", "matthews_corrcoef"),
    ),
    Deferred("sklearn", "as above"),
    Deferred("scipy.optimize", "transformers wants one function", functions=("linear_sum_assignment",)),
    Deferred("scipy.stats", "transformers wants two functions", functions=("pearsonr", "spearmanr")),
    Deferred(
        "torch._dynamo",
        "the compiler, switched off here",
        functions=("disable", "allow_in_graph", "assume_constant_result", "graph_break"),
    ),
    Deferred(
        "torch._dynamo.trace_rules", "as above; torch.distributed clears its cache", functions=("clear_lru_cache",)
    ),
    Deferred(
        "torch._dynamo._trace_wrapped_higher_order_op",
        "as above; transformers wants one context manager",
        functions=("TransformGetItemToIndex",),
    ),
)


def _no_dynamo(fn: Callable | None = None, recursive: bool = True, **_: object) -> Callable:
    """What `torch._dynamo.disable` and `allow_in_graph` mean where dynamo is off: the function itself."""
    return fn if fn is not None else (lambda inner: inner)


def _late_function(module: ModuleType, name: str) -> Callable | None:
    """A function that runs its module's body when it is called, or when a class is derived from it."""
    if module.__name__ == "wandb":
        return None  # no run has begun where nobody asked for more; transformers asks only whether there is such a name
    if name in ("graph_break", "clear_lru_cache"):
        return lambda *_, **__: None  # a compiler that never runs has no graph to break and has cached nothing
    if module.__name__ == "torch._dynamo":
        return _no_dynamo
    if module.__name__.startswith("modelopt."):
        return _unless_modelopt_was_used(module, name)

    def late(*args: object, **kwargs: object) -> object:
        return getattr(_run_body(module), name)(*args, **kwargs)

    late.__name__ = late.__qualname__ = name
    late.__mro_entries__ = lambda _: (getattr(_run_body(module), name),)  # it may be a class that others derive from
    return late


def _unless_modelopt_was_used(module: ModuleType, name: str) -> Callable:
    """ModelOpt's hooks do nothing for a model that ModelOpt never changed, and only its own code changes one."""

    def hook(*args: object, **kwargs: object) -> object:
        in_checkpoint = any(isinstance(a, dict) and any(str(k).startswith("modelopt_state") for k in a) for a in args)
        used = in_checkpoint or "modelopt.torch.opt.conversion" in sys.modules
        return getattr(_run_body(module), name)(*args, **kwargs) if used else None

    hook.__name__ = hook.__qualname__ = name
    return hook


def _run_body(module: ModuleType) -> ModuleType:
    """Run the postponed body of a deferred module once."""
    loader = module.__spec__.loader
    if isinstance(loader, _LateLoader):
        loader.run(module)
    return module


class _LateLoader(importlib.abc.Loader):
    """Creates the module at once and runs its body when a name is missing."""

    def __init__(self, real: importlib.machinery.SourceFileLoader, rule: Deferred) -> None:
        self.real, self.rule, self.done = real, rule, False

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        names, stars = _re_exported(self.real, module.__name__) if self.rule.re_exports else ({}, [])
        if self.rule.re_exports and not names and not stars:
            self.run(module)  # upstream changed: this package now does more than re-export
            return

        def missing(name: str) -> object:
            if name in self.rule.functions:
                value = _late_function(module, name)
            elif name in names:
                source, original = names[name]
                value = getattr(importlib.import_module(source), original)
            elif name.startswith("__") and name not in ("__all__", "__version__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            elif (child := self.child(module, name)) is not None:
                value = importlib.import_module(child)
            else:
                for source in stars:
                    found = importlib.import_module(source)
                    if name in getattr(found, "__all__", ()):
                        return getattr(found, name)
                self.run(module)
                if name not in module.__dict__:
                    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
                return module.__dict__[name]
            module.__dict__[name] = value
            return value

        module.__getattr__ = missing

    def child(self, module: ModuleType, name: str) -> str | None:
        """The full name of a submodule that may be imported while its parent's body still waits."""
        full = f"{module.__name__}.{name}"
        if not hasattr(module, "__path__") or not (self.rule.re_exports or any(r.module == full for r in DEFERRED)):
            return None
        return full if importlib.util.find_spec(full) else None

    def run(self, module: ModuleType) -> None:
        """Run the body now, once, and keep what others have set on the module meanwhile."""
        if not self.done:
            self.run_parent(module.__name__.rpartition(".")[0])
        if self.done:
            return  # before, or by the parent's body
        self.done = True
        late = ("__getattr__", *self.rule.functions)
        waiting = {name: module.__dict__.pop(name) for name in late if name in module.__dict__}
        set_by_others = {k: v for k, v in module.__dict__.items() if not k.startswith("__")}
        try:
            self.real.exec_module(module)
        except BaseException:  # wait again: the next one who asks shall see why, too
            self.done = False
            set_by_others |= waiting
            raise
        finally:
            module.__dict__.update(set_by_others)

    def run_parent(self, name: str) -> None:
        """A parent's body runs first, as in a plain import: modules that import each other in circles rely on it."""
        parent = sys.modules.get(name)
        loader = getattr(getattr(parent, "__spec__", None), "loader", None)
        if isinstance(loader, _LateLoader) and not loader.rule.re_exports:
            loader.run(parent)

    def __getattr__(self, name: str) -> object:  # get_source, get_filename, ... for tracebacks and inspect
        return getattr(self.real, name)


def _re_exported(loader: importlib.machinery.SourceFileLoader, package: str) -> tuple[dict, list[str]]:
    """Which names a package's file imports from where; empty if the file does anything else."""
    names: dict[str, tuple[str, str]] = {}
    stars: list[str] = []
    for node in ast.parse(loader.get_data(loader.path)).body:
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                if alias.name == "*":
                    stars.append(source)
                else:
                    names[alias.asname or alias.name] = (source, alias.name)
        elif not isinstance(node, (ast.Import, ast.Assign, ast.Expr)):
            return {}, []
    return names, stars


class _Finder(importlib.abc.MetaPathFinder):
    """Answers for deferred modules, and runs a hook after a few others are imported."""

    def __init__(self, rules: Iterable[Deferred]) -> None:
        self.rules = {rule.module: rule for rule in rules}
        self.hooks: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        rule, hook = self.rules.get(name), self.hooks.get(name)
        parent = self.rules.get(name.rpartition(".")[0])
        if rule is None and parent is not None and not parent.re_exports and parent.module in sys.modules:
            _run_body(sys.modules[parent.module])  # its other children may rely on it
        if rule is None and hook is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _LateLoader(spec.loader, rule) if rule else _HookedLoader(spec.loader, hook)
        return spec


class _HookedLoader(importlib.abc.Loader):
    """Runs a module's body and then a hook."""

    def __init__(self, real: importlib.machinery.SourceFileLoader, hook: Callable[[ModuleType], None]) -> None:
        self.real, self.hook = real, hook

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        self.hook(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)


def load_bridges(architectures: Iterable[str] | None) -> None:
    """Import the modules that register a bridge for these Hugging Face architectures, or all of them.

    Args:
        architectures: Class names such as `LlamaForCausalLM`; `None`, or a name that no file registers, loads all.
    """
    from megatron.bridge import models

    root = Path(models.__path__[0])
    wanted = None
    if architectures:
        pattern = re.compile(rf"register_bridge\([^)]*?source\s*=\s*\"?(?:\w+\.)?({'|'.join(architectures)})\b")
        wanted = [p for p in root.rglob("*_bridge.py") if pattern.search(p.read_text())]
    if wanted:
        for path in wanted:
            importlib.import_module(".".join((models.__name__, *path.relative_to(root).with_suffix("").parts)))
        return
    _run_body(models)
    _run_body(importlib.import_module("megatron.bridge.diffusion.models"))


class _Distributions(Mapping):
    """`importlib.metadata.packages_distributions()` that scans every installed package only for who asks for all."""

    def __init__(self, scan: Callable[[], Mapping[str, list[str]]]) -> None:
        self.scan, self.known = functools.cache(scan), {}

    def __getitem__(self, package: str) -> list[str]:
        if package not in self.known:
            try:
                self.known[package] = [importlib.metadata.distribution(package).metadata["Name"]]
            except importlib.metadata.PackageNotFoundError:
                self.known[package] = self.scan()[package]
        return self.known[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scan())

    def __len__(self) -> int:
        return len(self.scan())


def _finder() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def ready() -> bool:
    """True if `defer()` was called in this process."""
    return _finder() is not None


def after(module: str, hook: Callable[[ModuleType], None]) -> None:
    """Call `hook(module)` once somebody imports the module of this name; `defer()` must have been called before."""
    before = _finder().hooks.get(module, lambda _: None)
    _finder().hooks[module] = lambda loaded: (before(loaded), hook(loaded))


def defer(*, compiler: bool = False) -> None:
    """Postpone the bodies of the modules in `DEFERRED` from now on; calling it again changes nothing.

    Modules that are already imported stay as they are.

    Args:
        compiler: Leave torch's compiler out of it: this process will use it.
    """
    if ready():
        return
    from course_lib.stack.patches import Patches, apply

    sys.meta_path.insert(0, _Finder(r for r in DEFERRED if not (compiler and r.module.startswith("torch._dynamo"))))
    mine = Patches()
    module = "megatron.bridge.models.conversion.auto_bridge"
    why = "importing a family registers its bridge, so the family that is asked for must be imported now"

    @mine.replaces(f"{module}.AutoBridge.supports", why=why, late=module)
    def supports(original: Callable, cls: type, config: object) -> bool:
        """Imports the family of this configuration first."""
        load_bridges(getattr(config, "architectures", None) or [])
        return original(cls, config)

    @mine.replaces(f"{module}.AutoBridge.list_supported_models", why=why, late=module)
    def list_supported_models(original: Callable, cls: type) -> list[str]:
        """Imports all families first."""
        load_bridges(None)
        return original(cls)

    module = "transformers.utils.import_utils"
    why = "transformers looks at each line of 2,000 files for the one that begins its list of public names"

    @mine.replaces(f"{module}.fetch__all__", why=why, late=module)
    def fetch__all__(original: Callable, file_content: str) -> list[str]:
        """Gets a file from the last such line on, which is the one that counts."""
        return original(file_content[file_content.rfind("\n__all__") + 1 :])

    why = "transformers, TRL and others scan the metadata of all 300 installed packages at import"

    @mine.replaces("importlib.metadata.packages_distributions", why=why)
    def packages_distributions(original: Callable) -> Mapping[str, list[str]]:
        """Answers one package at a time."""
        return _Distributions(original)

    apply(mine)

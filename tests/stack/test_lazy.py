"""Deferring imports changes when a module's body runs, and nothing else."""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from course_lib import launch, stack
from course_lib.common.project import PROJECT
from course_lib.stack import lazy
from course_lib.stack.lazy import Deferred
from support import small

FIRST = (
    "megatron.bridge",
    "megatron.bridge.models.conversion.auto_bridge",
    "megatron.bridge.models.hf_pretrained.causal_lm",
    "megatron.bridge.training.pretrain",
    "megatron.bridge.training.finetune",
    "megatron.bridge.training.checkpointing",
    "megatron.bridge.training.config",
    "megatron.bridge.peft.lora",
    "megatron.bridge.recipes",
    "megatron.bridge.recipes.llama",
    "megatron.bridge.data.builders.direct_hf_sft",
    "modelopt.torch.opt",
    "datasets.builder",
    "wandb",
    "sklearn.metrics",
    "scipy.optimize._minimize",
    "torch._dynamo.config",
    "transformers",
)
"""Modules of which any may be the first that somebody imports."""

BEGIN = """
import gc, importlib, json, os, shutil, sys, tempfile, warnings
gc.disable()  # what is imported stays
warnings.simplefilter("ignore")
from course_lib import stack
stack.prepare_imports()
folder, running = tempfile.mkdtemp(), {}
def in_a_fork(question, work):
    "Call work() in a fork of this process, two forks at a time; what it returns goes to a file."
    while len(running) >= 2:
        running.pop(os.wait()[0])
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        with open(f"{folder}/{question}", "w") as out:
            json.dump(answer, out)
        os._exit(0)
    running[pid] = question
def answers():
    "Wait for all forks; what each returned."
    while running:
        running.pop(os.wait()[0])
    found = {}
    for question in os.listdir(folder):
        with open(f"{folder}/{question}") as text:
            found[question] = json.load(text)
    shutil.rmtree(folder)
    return found
"""


def python(code: str) -> object:
    """Run code in a fresh process that deferred its imports; returns what it assigned to `answer`."""
    ran = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}\n{code}\nprint(); print(json.dumps(answer))"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fresh() -> dict:
    """One process that deferred its imports, and from it a fork for each question."""
    return python(
        f"""
for name in {FIRST!r}:
    def import_it():
        module = importlib.import_module(name)
        if name == "modelopt.torch.opt":
            module.RulesDict  # its body has to run in upstream's order, and imports TRL
            assert "trl.trainer.base_trainer" in sys.modules and "wandb.sdk" not in sys.modules
        if name == "datasets.builder":
            module.ArrowBasedBuilder
        if name == "megatron.bridge.recipes":
            there = importlib.import_module("megatron.bridge.recipes.llama")
            assert module.llama32_1b_pretrain_config is there.llama32_1b_pretrain_config
        exported = module.__all__ if name.startswith("megatron.bridge") and hasattr(module, "__all__") else []
        return [n for n in exported if not hasattr(module, n)] or "imported"
    in_a_fork(name, import_it)

def same_objects():
    import megatron.bridge.models as models
    wrong = [n for n in models.__all__ if not hasattr(models, n)]
    before = {{n: getattr(models, n) for n in models.__all__}}
    for name, value in before.items():
        own = sys.modules.get(getattr(value, "__module__", None))
        if own is not None and getattr(own, name, value) is not value:
            wrong.append(name)
    models.__spec__.loader.run(models)
    return wrong + [n for n, value in before.items() if getattr(models, n) is not value]
in_a_fork("same", same_objects)

def one_by_one():
    from megatron.bridge.models import GemmaModelProvider, GPTModelProvider, T5ModelProvider
    from megatron.bridge.models.gpt_provider import GPTModelProvider as gpt
    from megatron.bridge.models.t5_provider import T5ModelProvider as t5
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge as auto
    from megatron.bridge.data.builders.energon import EnergonMultiModalDataModule as late
    from megatron.bridge.data.energon.base_energon_datamodule import EnergonDataloader
    import megatron.bridge.models as models
    class Derived(late):
        "A class that is a function until somebody calls it or derives from it."
    derived = Derived.__mro__[1].__module__ == EnergonDataloader.__module__
    return [derived, GPTModelProvider is gpt, T5ModelProvider is t5, AutoBridge is auto,
            issubclass(GemmaModelProvider, gpt), not models.__spec__.loader.done]
in_a_fork("one by one", one_by_one)

def supported():
    from megatron.bridge import AutoBridge
    return AutoBridge.list_supported_models()
in_a_fork("supported", supported)

def only_llama():
    from megatron.bridge import AutoBridge
    from transformers import LlamaConfig
    known = AutoBridge.supports(LlamaConfig(architectures=["LlamaForCausalLM"]))
    families = [n.split(".")[3] for n in sys.modules if n.startswith("megatron.bridge.models.") and n.endswith("_bridge")]
    return [known, sorted(set(families) - {{"conversion"}})]
in_a_fork("only llama", only_llama)

def functions():
    from datasets import load_dataset
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import roc_curve
    import tempfile, numpy
    path = tempfile.mkdtemp()
    with open(path + "/data.json", "w") as out:
        out.write('{{"text": "one"}}\\n{{"text": "two"}}\\n')
    rows = load_dataset("json", data_files=path + "/data.json", cache_dir=path, split="train")
    false, true, _ = roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    chosen = linear_sum_assignment(numpy.array([[4, 1], [2, 8]]))
    return [list(rows["text"]), float(numpy.trapezoid(true, false)), [list(map(int, c)) for c in chosen]]
in_a_fork("functions", functions)

def attributes():
    import datasets.builder, datasets
    datasets.builder.has_sufficient_disk_space = changed = lambda *_, **__: True  # as Bridge does
    datasets.Dataset.from_list([{{"a": 1}}])
    return [datasets.builder.has_sufficient_disk_space is changed, hasattr(datasets, "no_such_name")]
in_a_fork("attributes", attributes)
answer = answers()
"""
    )


@pytest.mark.parametrize("name", FIRST)
def test_any_module_may_be_imported_first(fresh, name):
    """Upstream's packages import each other in circles; no order of imports may break, and `__all__` resolves."""
    assert fresh[name] == "imported"


def test_names_are_the_same_objects(fresh):
    """Every name of megatron.bridge.models is its module's own object, also after the package's body ran late."""
    assert fresh["same"] == []


def test_names_resolve_one_by_one(fresh):
    """Names that a lesson imports are the real ones, and asking for them does not run the whole package."""
    assert fresh["one by one"] == [True] * 6


def registered_in(directory: Path) -> set[str]:
    """The architectures that sources register a bridge for."""
    found = set()
    for path in directory.rglob("*.py"):
        text = path.read_text()
        if "register_bridge(" not in text:
            continue
        tree = ast.parse(text)
        assigned = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
        constants = {n.targets[0].id: n.value.value for n in assigned if isinstance(n.targets[0], ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_bridge":
                source = next(keyword.value for keyword in node.keywords if keyword.arg == "source")
                # a text, a constant's name, or a class
                name = next(
                    getattr(source, a) for a in ("value", "id", "attr") if isinstance(getattr(source, a, 0), str)
                )
                found.add(constants.get(name, name))
    return found


def test_every_bridge_is_found(fresh):
    """AutoBridge lists every architecture that the sources of a model family register, as a plain import does."""
    registered = registered_in(Path(find_spec("megatron").submodule_search_locations[0]) / "bridge" / "models")
    assert len(registered) > 50
    assert registered - set(fresh["supported"]) == set()


def test_one_family_does_not_load_the_others(fresh):
    """Asked about Llama, AutoBridge answers, and no other family's bridge is imported."""
    assert fresh["only llama"] == [True, ["llama"]]


def test_deferred_functions_call_the_real_ones(fresh):
    """`from datasets import load_dataset` and its like give functions that do the real work when called."""
    texts, area, chosen = fresh["functions"]
    assert (texts, area, chosen) == (["one", "two"], 0.75, [[0, 1], [1, 0]])


def test_what_others_set_on_a_deferred_module_stays(fresh):
    """Bridge sets an attribute on datasets.builder before its body ran; the body must not undo that."""
    assert fresh["attributes"] == [True, False]


def test_a_body_that_fails_says_why_each_time(tmp_path):
    """Who asks a broken module a second time gets its own error again, not that a name is missing."""
    file = tmp_path / "broken.py"
    file.write_text("import no_such_package\nNAME = 1\n")
    loader = lazy._LateLoader(SourceFileLoader("broken", str(file)), Deferred("broken", "for this test"))
    module = module_from_spec(spec_from_loader("broken", loader))
    loader.exec_module(module)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            module.NAME  # noqa: B018


def test_deferring_names_what_exists():
    """Every deferred module is installed, so that a renamed one is noticed, and every row has a reason."""
    for rule in lazy.DEFERRED:
        package = rule.module.split(".")[0]
        root = find_spec(package)
        assert root is not None, f"{package} is not installed"
        places = [Path(p).parent for p in root.submodule_search_locations]
        path = Path(*rule.module.split("."))
        assert any((p / path / "__init__.py").exists() or (p / path).with_suffix(".py").exists() for p in places), rule
        assert rule.reason


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("__all__ = ['A']\n", ["A"]),
        ("import a\n__all__ = ['A']\n\n__all__ = [\n    'B',\n    'C',\n]\n", ["B", "C"]),
        ("# no __all__ here\nx = '__all__'\n", []),
    ],
)
def test_the_last_list_of_public_names_counts(bridge, text, names):
    """As transformers finds it by looking at every line."""
    from transformers.utils import import_utils

    assert import_utils.fetch__all__(text) == names


def test_metadata_of_packages_is_complete_for_who_asks_for_all(bridge):
    """By name, by `get`, and by iteration."""
    found = importlib.metadata.packages_distributions()
    # sets: the standard library names a distribution once for each time that sys.path names its folder
    assert set(found["PIL"]) == {"pillow"} and set(found.get("yaml")) == {"PyYAML"}
    assert found.get("no_such_package") is None
    assert len(found) > 200 and {"PIL", "torch", "google"} <= set(found)


def test_no_collector_runs_while_something_is_imported_to_stay():
    """A block within another leaves it off, and an error switches it on again."""
    with pytest.raises(ZeroDivisionError), stack.imported_to_stay():
        with stack.imported_to_stay():
            pass
        assert not gc.isenabled()
        1 / 0  # noqa: B018
    assert gc.isenabled()


@pytest.mark.parametrize(("before", "after"), [(700, stack.SELDOM[0]), (200_000, 200_000), (0, 0)])
def test_the_collector_searches_more_seldom_and_never_more_often(bridge, before, after):
    """A process that asked for less, or for none, keeps what it asked for."""
    now = gc.get_threshold()
    try:
        gc.set_threshold(before, *now[1:])
        stack.prepare_imports()
        assert gc.get_threshold()[0] == after
    finally:
        gc.set_threshold(*now)


# ------------------------------------------------------------------------------------------------- in a real rank

UNUSED = (
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "wandb.sdk",
    "sklearn.base",
    "scipy.optimize._minimize",
    "modelopt.torch.quantization",
    "megatron.core.resharding.nvshmem_copy_service",
)
"""Parts that are there only when the body of their package ran."""


def train_and_look(run_directory: str, cfg: object = None) -> None:
    """Train, then write which of the expensive modules this rank has loaded."""
    from course_lib.ranks import train

    train.rank_main(run_directory, cfg)
    loaded = [name for name in UNUSED if name in sys.modules]
    (Path(run_directory) / f"loaded{os.environ['RANK']}.json").write_text(json.dumps(loaded))


def test_a_rank_never_runs_what_it_does_not_need(bridge, runs_directory):
    """After real training no rank has loaded a compiler, a tracker, or another thing it never used."""
    run = launch.run(
        small.config(train_iters=2), ranks=2, name="imports", show=None, target=f"{__name__}:train_and_look"
    )
    assert run.outcome.status == "succeeded"
    for rank in range(2):
        assert json.loads((run.path / f"loaded{rank}.json").read_text()) == []


def test_preparing_twice_keeps_the_stand_ins(bridge):
    """A rank prepares its imports twice; a second stand-in would have other classes of the same names."""
    names = [name for name in stack.missing_modules() if name in sys.modules]
    before = [sys.modules[name] for name in names]
    stack.prepare_imports()
    assert names and [sys.modules[name] for name in names] == before

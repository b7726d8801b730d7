"""Files of others are data: a configuration that names foreign code is refused by name, and never runs it."""

from __future__ import annotations

import copy
import datetime
import json
import os
import subprocess
import sys

import pytest
import yaml

from course_lib import launch, runs
from course_lib.ranks import train
from course_lib.runs import checkpoints, failures, foreign_code
from support import drills, small


@pytest.fixture(scope="module")
def written(bridge, tmp_path_factory):
    """What Bridge writes for the small model, as nested dicts."""
    path = tmp_path_factory.mktemp("written") / "config.yaml"
    small.config().to_yaml(str(path))
    return yaml.safe_load(path.read_text())


class Pairs(dict):
    """A mapping that is written as `!!pairs`, as no dumper of PyYAML writes one."""


yaml.SafeDumper.add_representer(
    Pairs, lambda dumper, made: dumper.represent_sequence("tag:yaml.org,2002:pairs", [dict(made)])
)
TOUCH = "touch PWNED"
LAYER = "megatron.core.transformer.spec_utils.ModuleSpec"
FOREIGN = {
    "a module that torch imports": ("profiling", {"_target_": "torch.os.system", "command": TOUCH}),
    "a module that Megatron imports": (
        "profiling",
        {"_target_": "megatron.core.package_info._subprocess.run", "_args_": [["touch", "PWNED"]]},
    ),
    "a builtin": ("profiling", {"_target_": "builtins.exec", "_args_": ["import os; os.system('touch PWNED')"]}),
    "torch's own loader": (
        "profiling",
        {"_target_": "torch.serialization.load", "f": "evil.pt", "weights_only": False},
    ),
    "Megatron's own importer": (
        "model.transformer_layer_spec",
        {"_target_": "megatron.bridge.utils.import_utils.safe_import", "_partial_": True, "_args_": ["evil"]},
    ),
    "a function to be called later": ("model.activation_func", {"_target_": "torch.os.system", "_call_": False}),
    "a function under another name": (
        "model.activation_func",
        {"_target_": "torch.nn.functional.boolean_dispatch", "_call_": False},
    ),
    "inside a list": ("dataset.blend", [["a"], [{"_target_": "torch.os.system", "command": TOUCH}]]),
    "inside pairs, which YAML makes tuples": (
        "dataset.blend",
        Pairs(a={"_target_": "torch.os.system", "command": TOUCH}),
    ),
    "inside a set": ("dataset.blend", {"${oc.env:HOME}"}),
    "inside a plain mapping": (
        "tokenizer.hf_tokenizer_kwargs",
        {"a": {"_target_": "torch.os.system", "command": TOUCH}},
    ),
    "inside a partial": (
        "model.transformer_layer_spec",
        {
            "_target_": "megatron.bridge.models.gpt_provider.local_layer_spec",
            "_partial_": True,
            "_args_": [{"_target_": "torch.os.system", "command": TOUCH}],
        },
    ),
    "a dataclass of another field": ("profiling", {"_target_": "megatron.bridge.training.config.LoggerConfig"}),
    "a method of Hugging Face": ("model", {"_target_": "transformers.AutoModel.from_pretrained", "_args_": ["evil"]}),
    "a layer by name": ("model.transformer_layer_spec", {"_target_": LAYER, "module": ["os", "system"], "params": {}}),
    "a builder of models": ("model._builder_", "torch.os.system"),
    "a manager of checkpoints": ("checkpoint.custom_manager_class", "torch.os.system"),
    "a quantizer": ("model.fp8_quantizer_factory", "os.system"),
    "code of a tokenizer": ("tokenizer.trust_remote_code", True),
    "a value of the environment": ("logger.wandb_project", "${oc.env:HOME}"),
    "a value to be filled in": ("logger.wandb_project", "???"),
    "no text": ("profiling", {"_target_": ["torch", "os"]}),
    "no truth": ("profiling", {"_target_": "megatron.bridge.training.config.ProfilingConfig", "_call_": "False"}),
}


def with_field(written, field, value):
    """The content with one field changed."""
    content = copy.deepcopy(written)
    holder = content
    *parents, last = field.split(".")
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    return content


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_code_in_a_configuration_is_named_and_never_runs(
    written, kind, tmp_path, monkeypatch, runs_directory
) -> None:
    """The launcher and a rank's reading both name file and field; nothing ran, and no run directory is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('PWNED', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    field, value = FOREIGN[kind]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(with_field(written, field, value)))
    named = f"{file}, field {field.removesuffix('._builder_')}"
    for read in (train.read_config, lambda path: launch.prepare(path, ranks=2)):
        with pytest.raises(launch.ConfigError) as caught:
            read(file)
        assert str(caught.value).startswith(named)
    assert not (tmp_path / "PWNED").exists() and not runs_directory.exists()


def test_tags_of_yaml_build_nothing(bridge, tmp_path, monkeypatch, runs_directory) -> None:
    """A tag that names Python is no YAML here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("train: !!python/object/apply:os.system ['touch PWNED']\n")
    for read in (train.read_config, lambda path: launch.prepare(path, ranks=2)):
        with pytest.raises(launch.ConfigError, match="is not valid YAML"):
            read(tmp_path / "config.yaml")
    assert not (tmp_path / "PWNED").exists()


LEVELS = [f"a{level}: &a{level} [{', '.join(9 * [f'*a{level - 1}'])}]" for level in range(1, 30)]
MERGES = [f"a{level}: &a{level}\n  <<: [{', '.join(9 * [f'*a{level - 1}'])}]" for level in range(1, 30)]
SWELLING = {
    "deep": "a: " + 200_000 * "[" + 200_000 * "]",
    "deep in blocks": "a:\n  " + 200_000 * "- " + "1",
    "itself": "a: &a\n- *a",
    "aliases": "\n".join(["a0: &a0 [1]", *LEVELS]),
    "merges": "\n".join(["a0: &a0\n  b: 1", *MERGES]),
}


@pytest.mark.parametrize("kind", SWELLING)
def test_a_file_that_would_end_or_fill_the_process_is_refused(kind, bridge, tmp_path) -> None:
    """Whoever reads a configuration of others names the file: a launcher, a rank, a run, a checkpoint."""
    for name in ("config.yaml", "run_config.yaml"):
        (tmp_path / name).write_text(f"train: {{}}\nmodel: {{}}\ndataset: {{}}\n{SWELLING[kind]}\n")
    readers = {
        "config.yaml": (
            lambda: launch.prepare(tmp_path / "config.yaml", ranks=2),
            lambda: train.read_config(tmp_path / "config.yaml"),
            lambda: runs.Run(tmp_path).config,
        ),
        "run_config.yaml": (lambda: checkpoints._run_config(tmp_path),),
    }
    for name, each in readers.items():
        for read in each:
            with pytest.raises(launch.ConfigError, match=f"{tmp_path / name} is nested more than 100 deep"):
                read()


@pytest.mark.parametrize("content", ['{"ranks": 1', "[" * 100_000, "[1, 2]", '"ranks"', b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["launch", "outcome"])
def test_a_runs_own_file_that_is_broken_is_named(name, content, tmp_path) -> None:
    """A run that came over a network in half is told as one; that a file is absent says only that it is not there yet."""
    assert (runs.Run(tmp_path).launch, runs.Run(tmp_path).outcome) == ({}, None)
    (tmp_path / f"{name}.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(runs.BrokenRun, match=f"{tmp_path / name}.json was changed after it was written"):
        getattr(runs.Run(tmp_path), name)


def test_a_broken_answer_is_named(tmp_path) -> None:
    """What a target returned is a file of the run as well."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "0.answer").write_text("[1, 2]")
    assert runs.Run(tmp_path).answers() == [[1, 2]]
    (tmp_path / "ranks" / "1.answer").write_text("[1, ")
    with pytest.raises(runs.BrokenRun, match="1.answer was changed after it was written"):
        runs.Run(tmp_path).answers()


def test_an_outcome_of_another_version_is_named(tmp_path) -> None:
    """A field that this version does not know."""
    runs.write_json(tmp_path / "outcome.json", {"status": "succeeded", "mood": "good"})
    with pytest.raises(runs.BrokenRun, match="is no outcome of this course's version: .*'mood'"):
        _ = runs.Run(tmp_path).outcome


def test_aliases_of_a_size_pass(tmp_path) -> None:
    """PyYAML itself writes one where a list stands in two places."""
    blend = ["a", "b"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"a": blend}, "model": {"b": blend}}))
    assert "*id001" in (tmp_path / "config.yaml").read_text()
    assert runs.Run(tmp_path).config == {"train": {"a": blend}, "model": {"b": blend}}


@pytest.mark.parametrize("name", [None, datetime.date(2026, 1, 2)])
def test_a_name_that_gpu_ranks_do_not_take_is_refused(written, name, tmp_path) -> None:
    """OmegaConf, which reads there, takes text and numbers."""
    content = with_field(written, "tokenizer.hf_tokenizer_kwargs", {name: 1})
    with pytest.raises(launch.ConfigError, match=f"hf_tokenizer_kwargs.{name}: OmegaConf"):
        foreign_code.refuse(content, tmp_path / "config.yaml")


def test_what_bridge_writes_passes(written, tmp_path) -> None:
    """The small model, and one with a partial, a specification of layers, an enumeration or the set of an adapter."""
    foreign_code.refuse(written, tmp_path / "config.yaml")
    assert written["train"]["exit_signal"]["_target_"] == "signal.Signals"
    spec = {
        "_target_": LAYER,
        "module": {"_target_": "torch.nn.modules.linear.Identity", "_call_": False},
        "params": {},
    }
    decoder = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
    for value in (spec, {"_target_": decoder, "_partial_": True, "_args_": [], "use_transformer_engine": False}):
        foreign_code.refuse(with_field(written, "model.transformer_layer_spec", value), tmp_path / "a")
    for saved in (set(), {"decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight"}):
        adapter = {"_target_": "megatron.bridge.peft.lora.LoRA", "params_to_save": saved}
        foreign_code.refuse(with_field(written, "peft", adapter), tmp_path / "a")


def test_the_cause_of_a_failed_load_reaches_the_learner(tmp_path) -> None:
    """A CheckpointException names its ranks and their causes in its first words; the hints of both kinds are there."""
    import traceback

    from torch.distributed.checkpoint.api import CheckpointException

    class CheckpointingException(Exception):
        """As Megatron Core calls it."""

    try:
        raise CheckpointingException(
            "Global shape mismatch for loaded (torch.Size([2, 128])) and expected ((3, 128)) tensor"
        )
    except CheckpointingException as cause:
        error = CheckpointException("read", {0: (cause, traceback.extract_tb(cause.__traceback__))})
    (tmp_path / "ranks").mkdir()
    runs.write_json(tmp_path / "launch.json", {"ranks": 1})
    failures.record(tmp_path, 0, error)
    outcome = failures.settle(tmp_path)
    assert (
        "dict_keys([0]) CheckpointingException: Global shape mismatch for loaded (torch.Size([2, 128]))"
        in outcome.cause
    )
    assert outcome.hint.startswith("The checkpoint is of another model")
    lookup = 'Traceback (most recent call last):\n  File "/a/megatron/core/tensor_parallel/layers.py", line 1, in f\n    g()\n'
    assert "another tokenizer" in failures.hint_for(lookup + "IndexError: index out of range in self")


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        ({"target": "os:system", "argument": "touch PWNED"}, "launch.json lets ranks execute os:system"),
        ({"target": "os:system"}, "launch.json lets ranks execute os:system"),
        (
            {"target": "course_lib.experiments.faults:rank_main", "argument": "x"},
            "COURSE_TARGET=course_lib.experiments.faults:rank_main",
        ),
    ],
)
def test_a_run_directory_alone_decides_no_code(tmp_path, more, refusal):
    """What ranks execute besides the course's own training is said by whoever starts them, not by a file only."""
    (tmp_path / "launch.json").write_text(json.dumps({"ranks": 1, "device": "cuda"} | more))
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "COURSE_TARGET": "another:function"}
    words = [sys.executable, "-m", "course_lib.ranks.train", str(tmp_path / "config.yaml")]
    started = subprocess.run(words, env=environment, cwd=tmp_path, check=False)
    assert started.returncode == 1
    assert refusal in runs.Run(tmp_path).outcome.cause
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize(
    "name", ["course_lib.experiments.faults:rank_mian", "course_lib.launch.torchrun:Path", "nowhere:at_all"]
)
def test_a_target_is_a_function_of_the_module_that_is_named(name):
    """What only came into one of the course's modules by an import is none of its functions."""
    with pytest.raises(launch.ConfigError, match="is no `module:function` that a rank can import"):
        train._function(name)


def test_layers_of_ones_own_pass_where_their_module_is_named(bridge, runs_directory, monkeypatch):
    """No file can name the module, the learner can; the run is the one of Core's layers, and its checkpoint needs it too."""
    cfg = small.config(tp=1, train_iters=1)
    plain = launch.run(cfg, ranks=2, name="plain", show=None)
    cfg.model.transformer_layer_spec = drills.own_layer_spec
    for named in (None, "another", "drills2"):
        if named:
            monkeypatch.setenv("COURSE_LAYERS", named)
        with pytest.raises(launch.ConfigError, match=r"drills.own_layer_spec .*set COURSE_LAYERS=\S*drills,"):
            launch.run(cfg, ranks=2, name="own", show=None)
    monkeypatch.setenv("COURSE_LAYERS", f"another,{drills.__name__}")
    run = launch.run(cfg, ranks=2, name="own", save=True, show=None)
    assert runs.difference(run, plain) == 0 and "own layers" in run.log(0)
    monkeypatch.delenv("COURSE_LAYERS")
    with pytest.raises(launch.ConfigError, match="run_config.yaml, field model.transformer_layer_spec"):
        launch.prepare(small.config(tp=1), ranks=2, load=run)


def test_layers_of_a_notebook_are_refused_with_what_to_do(written, tmp_path, monkeypatch):
    """Ranks cannot import them, whoever names them; nor any other function of a module that is named."""
    monkeypatch.setenv("COURSE_LAYERS", f"__main__,os,{drills.__name__}")
    for target, words in (
        ("__main__.my_layer_spec", "cannot import what a notebook defines: .*writefile"),
        ("os.system", "is not the own name|is no data type"),
        (f"{drills.__name__}.raises", "is no data type"),
        (f"{drills.__name__}.os.system", "is not the own name"),
    ):
        content = with_field(written, "model.transformer_layer_spec", {"_target_": target, "_call_": False})
        with pytest.raises(launch.ConfigError, match=words):
            foreign_code.refuse(content, tmp_path / "config.yaml")

"""NVIDIA's recipes without the Hub: the tables in data/, the configuration differences, the closed forms."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from course_lib import recipes
from course_lib.common.project import DATA
from course_lib.planning import closed_forms

IDS = ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Meta-Llama-3-8B"]
RECIPES = {
    "meta-llama/Llama-3.2-1B": "llama32_1b_pretrain_config",
    "meta-llama/Llama-3.2-3B": "llama32_3b_pretrain_config",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b_pretrain_config",
}
# Facts of the project (shared by the lessons): parameters by number of embedding rows.
COUNTS = {
    IDS[0]: {32_000: 1_038_682_112, 128_256: 1_235_814_400, 131_072: 1_241_581_568},
    IDS[1]: {32_000: 2_917_051_392, 128_256: 3_212_749_824, 131_072: 3_221_400_576},
    IDS[2]: {32_000: 7_241_732_096, 128_256: 8_030_261_248, 131_072: 8_053_329_920},
}


def recipe(model_id: str) -> Any:
    from megatron.bridge.recipes import llama

    with recipes.offline():
        return getattr(llama, RECIPES[model_id])()


# The tables.


def test_every_value_has_a_source() -> None:
    """A number in data/ without a source is not a fact: each is covered by a file upstream or by a remark."""
    known = recipes.known_models()
    assert set(IDS) < set(known)
    for facts in known.values():
        source = facts.source
        assert source["read_on"] and source["facts"]
        for entry in source["facts"]:
            assert all(entry[key] for key in ("repository", "path", "version", "fields")), facts.path
        covered = {name.split(".")[0] for entry in source["facts"] for name in entry["fields"]}
        for name in facts.config:
            remarked = any(name in remark for remark in source["remarks"])
            assert name in covered or remarked or name == "model_type", f"{facts.path.name}: {name} has no source"


def test_the_readme_names_every_table() -> None:
    """data/README.md lists each file with its model id."""
    for facts in recipes.known_models().values():
        readme = (DATA / "README.md").read_text(encoding="utf-8")
        assert f"| `{facts.path.name}` | `{facts.model_id}` |" in readme


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    """A file without its keys, or a second one for the same model, is refused by its path."""
    (tmp_path / "a.json").write_text('{"model_id": "x/y", "config": {}}')
    with pytest.raises(ValueError, match=r"a\.json has no source"):
        recipes.known_models(directory=tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text('{"model_id": "x/y", "config": {}, "source": {}}')
    with pytest.raises(ValueError, match=r"b\.json and .*a\.json both describe x/y"):
        recipes.known_models(directory=tmp_path)


def test_rope_constants_are_megatrons_defaults(bridge: Any) -> None:
    """Bridge reads only the factor; the other three constants must equal what megatron-core assumes."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    defaults = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    scalings = [facts.config.get("rope_scaling", {}) for facts in recipes.known_models().values()]
    scaled = [scaling for scaling in scalings if scaling.get("rope_type") == "llama3"]
    assert len(scaled) == 5  # Llama 3.1 and 3.2
    for scaling in scaled:
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            assert scaling[name] == defaults[name].default


def test_vocabulary_is_that_of_nvidias_benchmarks(bridge: Any) -> None:
    """The 128,256 ids also stand in NVIDIA's performance recipe of the installed wheel."""
    import megatron.bridge

    root = Path(megatron.bridge.__file__).parent
    assert "vocab_size = 128256" in (root / "perf_recipes/llama/h100/llama3.py").read_text(encoding="utf-8")
    llama3 = [facts for model_id, facts in recipes.known_models().items() if "Llama-3" in model_id]
    assert len(llama3) == 7 and {facts.config["vocab_size"] for facts in llama3} == {128_256}


# Offline.


@pytest.mark.parametrize("model_id", sorted(recipes.known_models()))
def test_provider_equals_autobridges(bridge: Any, no_network: None, tmp_path: Path, model_id: str) -> None:
    """The provider made offline equals, field by field, the one AutoBridge makes from a config.json on disk."""
    from megatron.bridge import AutoBridge

    config = recipes.known_models()[model_id].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoBridge.from_hf_pretrained(str(tmp_path)).to_megatron_provider(load_weights=False)
    with recipes.offline():
        ours = AutoBridge.from_hf_pretrained(model_id).to_megatron_provider(load_weights=False)
    assert type(ours) is type(theirs)
    names = [field.name for field in fields(theirs)]
    assert len(names) > 200 and vars(ours).keys() == vars(theirs).keys()

    def comparable(value: Any) -> Any:
        """Two partials of one function are not equal to Python."""
        return (value.func, value.args, value.keywords) if isinstance(value, partial) else value

    different = {name for name in vars(theirs) if comparable(getattr(ours, name)) != comparable(getattr(theirs, name))}
    # The one difference is the name itself: Bridge keeps where a configuration came from.
    assert different == {"hf_model_id"}
    assert (ours.hf_model_id, theirs.hf_model_id) == (model_id, str(tmp_path))


@pytest.mark.parametrize("model_id", IDS)
def test_nvidias_recipe_runs_without_the_hub(bridge: Any, no_network: None, model_id: str) -> None:
    """NVIDIA's own recipe function, called in plain sight, gives the shape in data/ and NVIDIA's settings."""
    cfg, config = recipe(model_id), recipes.known_models()[model_id].config
    assert (cfg.model.num_layers, cfg.model.hidden_size) == (config["num_hidden_layers"], config["hidden_size"])
    assert (cfg.model.num_attention_heads, cfg.model.num_query_groups, cfg.model.kv_channels) == (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    assert (cfg.model.rotary_base, cfg.model.rope_scaling) == (500_000, "rope_scaling" in config)
    assert (cfg.model.seq_length, cfg.dataset.seq_length, cfg.train.global_batch_size) == (8192, 8192, 512)


def test_outside_the_block_nothing_is_changed(bridge: Any, no_network: None, tmp_path: Path) -> None:
    """The answer from data/ is given inside the block only, also after an error and when blocks are nested."""
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    original, config = AutoBridge.__dict__["from_hf_pretrained"], AutoConfig.__dict__["from_pretrained"]
    with pytest.raises(RuntimeError, match="mine"), recipes.offline(), recipes.offline():
        assert AutoBridge.__dict__["from_hf_pretrained"] is not original
        raise RuntimeError("mine")
    assert AutoBridge.__dict__["from_hf_pretrained"] is original and AutoConfig.__dict__["from_pretrained"] is config
    (tmp_path / "config.json").write_text(json.dumps(recipes.known_models()[IDS[0]].config | {"num_hidden_layers": 3}))
    with recipes.offline():
        assert AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider(load_weights=False).num_layers == 3


def test_an_unknown_model_says_which_file_is_missing(bridge: Any, no_network: None) -> None:
    """A recipe whose model is not in data/ fails with the name of the file to write, and without the network."""
    from megatron.bridge import AutoBridge

    with pytest.raises(recipes.UnknownModel, match="'meta-llama/Llama-9.1-8B'") as caught, recipes.offline():
        AutoBridge.from_hf_pretrained("meta-llama/Llama-9.1-8B")
    for part in (
        "llama_91_8b.json",
        f"describes {len(recipes.known_models())} models",
        "data/README.md",
        "Hugging Face login",
    ):
        assert part in str(caught.value)


def test_the_hubs_client_is_offline_whoever_imported_it_first(
    bridge: Any, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that asks the Hub's client itself is answered at once, also where that client was imported as online."""
    from huggingface_hub import constants
    from megatron.bridge.recipes.flux.h100 import flux

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with recipes.offline(), pytest.raises(OSError, match=re.escape("black-forest-labs/FLUX.1-dev")):
        flux.flux_12b_pretrain_2gpu_h100_bf16_config()
    assert constants.HF_HUB_OFFLINE is False


def test_weights_are_never_made_up(bridge: Any, no_network: None) -> None:
    """Offline there is a shape and no weights: asking for them fails in Bridge's own words."""
    from megatron.bridge import AutoBridge

    with recipes.offline(), pytest.raises(ValueError, match="does not include weights"):
        AutoBridge.from_hf_pretrained(IDS[0]).to_megatron_provider()


def test_layout_reads_the_yaml_that_a_run_is_given(bridge: Any, tmp_path: Path) -> None:
    """The layout of a configuration is the same before and after its way through config.yaml."""
    import yaml

    from course_lib.planning import layout

    for change in ({}, {"tensor_model_parallel_size": 3}, {"pipeline_model_parallel_size": 4}, {"seq_length": 4096}):
        cfg = recipe(IDS[0])
        for name, value in change.items():
            setattr(cfg.model, name, value)
        cfg.to_yaml(str(tmp_path / "config.yaml"))
        read = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
        assert layout.check(read, 8) == layout.check(cfg, 8)
        assert bool(layout.check(read, 8)) == bool(set(change) & {"tensor_model_parallel_size", "seq_length"})
        assert layout.Layout.from_config(read, ranks=8) == layout.Layout.from_config(cfg, ranks=8)


# Differences.


def test_two_calls_of_a_recipe_are_equal(bridge: Any) -> None:
    """Flattening loses nothing that would make equal configurations differ, and one change is one row."""
    one, other = recipe(IDS[0]), recipe(IDS[0])
    assert recipes.diff(one, other).empty
    other.train.train_iters = 10
    other.model.tensor_model_parallel_size = 2
    table = recipes.diff(one, other)
    assert list(table.columns) == ["field", "before", "after"]
    assert table.set_index("field").to_dict("index") == {
        "train.train_iters": {"before": 1_168_251, "after": 10},
        "model.tensor_model_parallel_size": {"before": 1, "after": 2},
    }


def test_flatten_shows_functions_and_types_as_text(bridge: Any) -> None:
    """Values that are functions, dtypes or enums become text; nothing private is shown."""
    import torch

    flat = recipes.flatten(recipe(IDS[0]))
    assert flat["model.activation_func"].endswith("silu")
    assert flat["model.params_dtype"] == str(torch.bfloat16)
    assert flat["checkpoint.save"] == flat["checkpoint.load"]
    assert len(flat) > 500 and not [name for name in flat if "._" in name]
    assert not [name for name, value in flat.items() if callable(value)]
    assert recipes.flatten(flat) == flat


def test_diff_tells_absent_none_and_types_apart() -> None:
    """A missing setting, None, False, 0 and 0.0 are five different things."""
    before = {"a": None, "b": 0, "c": 1, "d": [1], "f": [1, 2]}
    after = {"a": False, "b": 0.0, "d": [1], "e": None, "f": [True, 2.0]}
    assert recipes.diff(before, after).values.tolist() == [
        ["a", None, False],
        ["b", 0, 0.0],
        ["c", 1, "(absent)"],
        ["f", [1, 2], [True, 2.0]],
        ["e", "(absent)", None],
    ]


def test_shrink_keeps_the_two_places_equal(bridge: Any) -> None:
    """Bridge demands one sequence length in two places; a recipe's fixed head size must follow the hidden size."""
    cfg = recipe(IDS[0])
    table = recipes.shrink(
        cfg,
        num_layers=4,
        hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=256,
        seq_length=64,
    )
    assert cfg.model.seq_length == cfg.dataset.seq_length == 64
    assert cfg.model.kv_channels == 16
    assert sorted(table["field"]) == [
        "dataset.seq_length",
        "model.ffn_hidden_size",
        "model.hidden_size",
        "model.kv_channels",
        "model.num_attention_heads",
        "model.num_layers",
        "model.num_query_groups",
        "model.seq_length",
    ]
    assert recipes.diff(recipe(IDS[0]), cfg).equals(table)
    recipes.shrink(cfg, vocab_size=512)
    assert cfg.model.vocab_size == cfg.tokenizer.vocab_size == 512
    untouched = recipes.flatten(cfg)
    with pytest.raises(ValueError, match="hidden_size=100 is not a multiple of num_attention_heads=8"):
        recipes.shrink(cfg, hidden_size=100, num_layers=1)
    assert recipes.flatten(cfg) == untouched


# Closed forms.


@pytest.mark.parametrize("model_id", IDS)
def test_parameter_counts_are_the_known_totals(bridge: Any, model_id: str) -> None:
    """The closed form gives the known totals of 1B, 3B and 8B at three vocabularies."""
    model = recipe(model_id).model
    for rows, total in COUNTS[model_id].items():
        assert closed_forms.parameter_count(model, vocab_size=rows) == total
    assert closed_forms.parameter_count(model) == COUNTS[model_id][128_256]


@pytest.mark.parametrize("model_id", IDS)
@pytest.mark.parametrize("small", [False, True])
def test_parameter_counts_are_those_of_the_built_model(bridge: Any, model_id: str, small: bool) -> None:
    """The closed form equals the parameters of the model that Megatron Core really builds, without its memory."""
    import torch.distributed as dist
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cfg = recipe(model_id)
    if small:
        recipes.shrink(cfg, num_layers=2, hidden_size=96, num_attention_heads=6, num_query_groups=3, vocab_size=1000)
        cfg.model.gated_linear_unit = False
    model = cfg.model
    model.transformer_impl, model.transformer_layer_spec = "local", local_layer_spec
    model.context_parallel_size = 1  # the 8B recipe asks for 2, which local layers refuse
    model.gradient_accumulation_fusion = model.apply_rope_fusion = model.persist_layer_norm = False
    model.bias_activation_fusion = model.cross_entropy_loss_fusion = False
    model.init_model_with_meta_device, model.use_cpu_initialization, model.perform_initialization = True, True, False
    assert not dist.is_initialized(), "another test left a process group behind"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        names = ("tp", "pp", "cp", "dp", "dp_cp", "ep", "embd", "pos_embd", "tp_cp", "tp_ep", "expt_tp", "mp")
        model._pg_collection = SimpleNamespace(**dict.fromkeys(names, group))
        model.finalize()
        built = model.provide(pre_process=True, post_process=True)
    finally:
        dist.destroy_process_group()
    assert sum(parameter.numel() for parameter in built.parameters()) == closed_forms.parameter_count(model)


@pytest.mark.parametrize("part", [{"num_moe_experts": 8}, {"add_bias_linear": True}, {"normalization": "LayerNorm"}])
def test_parameter_count_refuses_what_it_does_not_count(part: dict[str, Any]) -> None:
    """A model with other parts is refused by name instead of being counted wrongly."""
    llama = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "vocab_size": 128,
    }
    assert closed_forms.parameter_count(llama) > 0
    with pytest.raises(ValueError, match=next(iter(part))):
        closed_forms.parameter_count(llama | part)
    with pytest.raises(ValueError, match="has no vocab_size"):
        closed_forms.parameter_count(llama | {"vocab_size": None})


def test_shrink_of_a_hybrid_follows_its_pattern(bridge: Any) -> None:
    """A pattern brings its number of layers along; what does not fit is refused by name, and nothing is changed."""
    from course_lib.recipes import blueprint

    cfg = blueprint.load(blueprint.NANO)
    table = recipes.shrink(cfg, hybrid_layer_pattern="MEM*", num_moe_experts=8).set_index("field")["after"]
    assert dict(table) == {"model.hybrid_layer_pattern": "MEM*", "model.num_layers": 4, "model.num_moe_experts": 8}
    untouched = recipes.flatten(cfg)
    for wrong, words in (
        ({"num_layers": 4}, "give hybrid_layer_pattern"),
        ({"num_moe_experts": 4}, "chooses 6 experts"),
        ({"num_query_groups": 3}, "num_attention_heads=32 is not a multiple of num_query_groups=3"),
    ):
        with pytest.raises(ValueError, match=words):
            recipes.shrink(cfg, **wrong)
    assert recipes.flatten(cfg) == untouched
    dense = recipe(IDS[0])
    for wrong, words in (({"hybrid_layer_pattern": "MM"}, "no layer pattern"), ({"num_moe_experts": 8}, "no experts")):
        with pytest.raises(ValueError, match=words):
            recipes.shrink(dense, **wrong)

"""Every recipe of the Llama, Nemotron and Qwen families, without the Hub: it builds, or it names the file it wants."""

from __future__ import annotations

import importlib
import re
import time
from typing import Any

import pytest
import yaml

from course_lib import recipes
from course_lib.common.config import ConfigError, changed
from course_lib.planning import census, closed_forms, layout
from course_lib.ranks import train
from course_lib.recipes import catalogue
from course_lib.runs import field_values, foreign_code

FAMILIES = ("llama", "nemotronh", "qwen")
ALL = catalogue.entries()
ENTRIES = [entry for entry in ALL if entry.family in FAMILIES]
# Two recipes take the text half of a model that also sees; nobody here has read its shape in a public source.
WANTS = {
    "qwen35_text_9b_pretrain_8gpu_gb200_bf16_config": "qwen35_9b_base.json",
    "qwen35_text_35b_a3b_pretrain_8gpu_gb200_bf16_config": "qwen35_35b_a3b_base.json",
}
# Upstream refuses one recipe by itself, whatever it could read.
REFUSED = {"qwen3_next_80b_a3b_peft_1gpu_h100_bf16_config": "PEFT is not currently supported for Qwen3-Next"}
# Parameters of the published models, by the name under which a recipe asks; each also equals the really built model.
TOTALS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3.1-405B": 405_853_388_800,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2-72B": 72_706_203_648,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
}
# A name that rounds by more than a tenth; Meta's card of Llama 3.2 says 1.23B.
ROUNDED = {"meta-llama/Llama-3.2-1B": 1.23}
# Models with experts or Mamba layers have no closed form here, so one recipe of each is really built and counted.
# The last one is checked against its checkpoint too: 1,121,049,257,984 bytes in model.safetensors.index.json are two
# bytes for each of these parameters and 49 x 512 fp32 biases of routers (WandLZhang/tpu-mech-interp, docs on Ultra).
BUILT = {
    "qwen.h100.qwen3_moe:qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config": 30_532_122_624,
    "qwen.h100.qwen3_moe:qwen3_235b_a22b_pretrain_256gpu_h100_bf16_config": 235_093_634_560,
    "nemotronh.h100.nemotron_3_super:nemotron_3_super_pretrain_16gpu_h100_bf16_config": 123_611_012_096,
    "nemotronh.h100.nemotron_3_ultra:nemotron_3_ultra_pretrain_24gpu_h100_bf16_config": 560_524_578_816,
}
WITH_NEMOTRON_IDS = {
    "nemotronh.gb200.nemotron_3_nano:nemotron_3_nano_pretrain_8gpu_gb200_bf16_config": 31_577_937_344,
    "nemotronh.h100.nemotron_3_nano_4b:nemotron_3_nano_4b_pretrain_8gpu_h100_bf16_config": 3_973_556_832,
    "nemotronh.h100.nemotron_nano_v2:nemotron_nano_9b_v2_pretrain_2gpu_h100_bf16_config": 8_888_227_328,
    "nemotronh.h100.nemotron_nano_v2:nemotron_nano_12b_v2_pretrain_4gpu_h100_bf16_config": 12_310_001_152,
    "nemotronh.h100.nemotronh:nemotronh_4b_pretrain_1gpu_h100_bf16_config": 4_489_223_040,
    "nemotronh.h100.nemotronh:nemotronh_8b_pretrain_2gpu_h100_bf16_config": 8_100_852_736,
    "nemotronh.h100.nemotronh:nemotronh_47b_pretrain_8gpu_h100_bf16_config": 46_791_554_816,
    "nemotronh.h100.nemotronh:nemotronh_56b_pretrain_8gpu_h100_bf16_config": 56_324_350_464,
}


OTHERS = [entry for entry in ALL if entry.family not in FAMILIES]
# These two set trust_remote_code, with which a tokenizer's folder could run code of its own.
RUN_CODE = {"olmoe_7b_sft_8gpu_h100_bf16_config", "olmoe_7b_peft_1gpu_h100_bf16_config"}
RUN_CODE |= {f"moonlight_16b_{name}_config" for name in ("peft_2gpu_h100_bf16", "peft_4gpu_h100_bf16")}
RUN_CODE |= {f"moonlight_16b_sft_8gpu_h100_bf16{name}_config" for name in ("", "_8k", "_tp1")}


@pytest.fixture(scope="module")
def comes_back(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whether a configuration comes back from its file; read in full once for each set of classes and functions."""
    file, kinds = tmp_path_factory.mktemp("written") / "config.yaml", set()

    def names(content: Any) -> set[str]:
        inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        mine = {content["_target_"]} if isinstance(content, dict) and "_target_" in content else set()
        return mine.union(*map(names, inner))

    def check(cfg: Any) -> None:
        cfg.to_yaml(str(file))
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=yaml.CSafeLoader)
        foreign_code.refuse(content, file)
        for given in (cfg, content):
            field_values.refuse_wrong_values(given)
        if (kind := frozenset(names(content))) not in kinds:
            kinds.add(kind)
            train.read_config(file).to_yaml(str(file))
            assert file.read_text(encoding="utf-8") == text

    return check


def operations_are_bridges(cfg: Any) -> bool:
    """Whether our operations a token are Bridge's, its differences explained; False where Bridge has none to compare.

    Bridge leaves out the routers and, in hybrids, the matrices that join a predicted token's layers to the model's.  It takes
    the inner width of a Mamba layer for twice the model's, which it is not in Nemotron 3.
    """
    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    if not getattr(cfg.model, "num_attention_heads", 0) or hasattr(
        cfg.model, "_get_num_floating_point_operations_with_runtime_stats"
    ):
        return False
    cfg.peft, model = None, cfg.model
    model.kv_channels = model.kv_channels or model.hidden_size // model.num_attention_heads  # as its finalize() does
    model.vocab_size = model.vocab_size or cfg.tokenizer.vocab_size or 32_000
    size = {"tensor_model_parallel_size": model.tensor_model_parallel_size}
    rows = layout.padded_vocab_size(model.vocab_size, **size, divisible_by=model.make_vocab_size_divisible_by)
    if predicted := getattr(model, "mtp_hybrid_override_pattern", None):  # as its finalize() does
        model.hybrid_layer_pattern += f"/{predicted}" * model.mtp_num_layers
        model.mtp_hybrid_override_pattern = None
    ours, theirs = (
        closed_forms.flops_per_token(model, vocab_size=rows),
        num_floating_point_operations(cfg) / model.seq_length,
    )
    pattern = getattr(model, "hybrid_layer_pattern", None) or ""
    sparse = pattern.count("E")
    if model.num_moe_experts and not pattern:
        frequency = model.moe_layer_freq
        sparse = sum(frequency) if isinstance(frequency, list) else -(-model.num_layers // frequency)
        sparse += model.mtp_num_layers or 0  # a layer that predicts ahead is built as the last one
    routers = 6 * model.hidden_size * (model.num_moe_experts or 0) * sparse
    wider = 0
    if "M" in pattern:
        wider = (model.mamba_num_heads or 2 * model.hidden_size // model.mamba_head_dim) * model.mamba_head_dim
        wider -= 2 * model.hidden_size
    mamba = pattern.count("M") * wider * (18 * model.hidden_size + 21 * model.mamba_state_dim) if wider else 0
    ahead = 12 * model.hidden_size**2 * (model.mtp_num_layers or pattern.count("/")) if pattern else 0
    if not pattern:
        ahead -= (
            18 * model.hidden_size * (model.mtp_num_layers or 0)
        )  # Bridge counts its three norms, and no other norm
    explained = theirs + routers + mamba + ahead
    assert ours == pytest.approx(explained, rel=1e-5), (
        f"ours {ours:.5g}, Bridge {theirs:.5g}, explained {explained:.5g}"
    )
    return True


def test_the_families_are_there() -> None:
    """The three families have well over a hundred recipes; all that ask the Hub for a known model are listed above."""
    assert len(ENTRIES) > 130 and {entry.family for entry in ENTRIES} == set(FAMILIES)
    asked = {entry.asks_hub_for for entry in ENTRIES} - {None}
    assert asked - set(recipes.known_models()) == {"Qwen/Qwen3.5-9B-Base", "Qwen/Qwen3.5-35B-A3B-Base"}
    assert set(TOTALS) < asked


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_recipe_builds_or_names_its_file(
    bridge: Any, no_network: None, entry: catalogue.Entry, comes_back: Any
) -> None:
    """A recipe builds without a network in two seconds of work, with the published size, and comes back from a file."""
    recipe = getattr(importlib.import_module(f"megatron.bridge.recipes.{entry.module}"), entry.name)
    if entry.name in WANTS:
        with recipes.offline(), pytest.raises(recipes.UnknownModel, match=re.escape(WANTS[entry.name])) as caught:
            recipe()
        assert str(entry.asks_hub_for) in str(caught.value) and "wants config.json" in str(caught.value)
        return
    if entry.name in REFUSED:
        with recipes.offline(), pytest.raises(NotImplementedError, match=REFUSED[entry.name]):
            recipe()
        return
    began = time.process_time()  # of this process, so that a busy machine does not fail it
    with recipes.offline():
        cfg = recipe()
    assert time.process_time() - began < 2
    assert cfg.model.num_layers and cfg.train.train_iters
    comes_back(cfg)
    if entry.asks_hub_for in TOTALS:
        rows = recipes.known_models()[entry.asks_hub_for].config["vocab_size"]
        assert closed_forms.parameter_count(cfg.model, vocab_size=rows) == TOTALS[entry.asks_hub_for]
    if getattr(cfg.model, "experimental_attention_variant", None):
        with pytest.raises(ValueError, match="experimental_attention_variant=gated_delta_net"):
            closed_forms.flops_per_token(cfg.model, vocab_size=32_000)
    else:
        assert operations_are_bridges(cfg)


def test_recipes_of_other_families_come_back_from_a_file(bridge: Any, no_network: None, comes_back: Any) -> None:
    """What builds without the Hub can be launched from the file that Bridge writes, unless it wants to run foreign code."""
    built, compared = set(), set()
    for entry in OTHERS:
        with recipes.offline():
            try:
                cfg = getattr(importlib.import_module(f"megatron.bridge.recipes.{entry.module}"), entry.name)()
            except (recipes.UnknownModel, NotImplementedError, AttributeError, ImportError, OSError, TypeError):
                continue
        if not hasattr(cfg, "to_yaml"):
            continue  # a part of a configuration
        built.add(entry.family)
        if entry.name in RUN_CODE:
            with pytest.raises(ConfigError, match="hf_tokenizer_kwargs.trust_remote_code"):
                comes_back(cfg)
        else:
            comes_back(cfg)
        if operations_are_bridges(cfg):
            compared.add(entry.family)
    assert {"gemma", "gpt", "olmoe", "wan"} <= built
    assert compared == built - {"wan"}, "a picture has no tokens to count by"


@pytest.mark.parametrize("model_id", TOTALS)
def test_the_total_is_the_size_in_the_name(model_id: str) -> None:
    """A model is called after its size: the count agrees within a tenth."""
    billions = ROUNDED.get(model_id) or float(re.search(r"-([\d.]+)[Bb](?:-|$)", model_id)[1])
    assert TOTALS[model_id] / 1e9 == pytest.approx(billions, rel=0.1)


@pytest.mark.parametrize(("expected", "vocab_size"), [(BUILT, None), (WITH_NEMOTRON_IDS, 131_072)])
def test_models_with_experts_or_mamba_are_built_and_counted(expected: dict[str, int], vocab_size: int | None) -> None:
    """The built models of the recipes that no formula counts have the published sizes, every parameter in a part."""
    paths = list(expected)
    counted = census.count(paths, vocab_size=vocab_size, ranks=128, only_first=True)
    assert {path: counted[path.split(":")[1]].total for path in paths} == {path: expected[path] for path in paths}
    assert not [name for name, model in counted.items() if "other" in model.parts]


def test_shapes_of_other_families_have_their_published_totals(bridge: Any) -> None:
    """The whole model as Megatron builds it; `data/models` says with each shape what its maker publishes."""
    from course_lib.planning import meta_model

    totals = {
        "gemma.h100.gemma2:gemma2_9b_pretrain_8gpu_h100_bf16_config": 8_324_201_984 + 256_000 * 3_584,
        "glm.h100.glm45:glm45_air_106b_peft_8gpu_h100_bf16_config": 109_227_304_960,  # 2.4 billion predict a second token
        "moonlight.h100.moonlight_16b:moonlight_16b_pretrain_8gpu_h100_bf16_config": 15_960_163_840,
        "gpt_oss.h100.gpt_oss:gpt_oss_20b_sft_8gpu_h100_bf16_config": 20_914_757_184,
        "gpt_oss.h100.gpt_oss:gpt_oss_120b_peft_8gpu_h100_bf16_config": 116_829_156_672,
        # Core norms the input of the query projection once more, where it has no low rank: 27 x 2,048 weights.
        "deepseek.h100.deepseek_v2:deepseek_v2_lite_pretrain_8gpu_h100_bf16_config": 15_706_484_224 + 27 * 2_048,
    }
    sizes = ("tensor_model", "pipeline_model", "context", "expert_model")
    for path, total in totals.items():
        module, name = path.split(":")
        with recipes.offline():
            cfg = getattr(importlib.import_module(f"megatron.bridge.recipes.{module}"), name)()
        whole = changed(cfg, {"peft": None} | {f"model.{size}_parallel_size": 1 for size in sizes})
        whole.tokenizer.use_tokenizer_vocab_size = False
        with meta_model.built(whole, ranks=1) as chunks:
            parts = [part for chunk in chunks for part in chunk.parameters()]
        assert sum(part.numel() * getattr(part, "stands_for", 1) for part in parts) == total, name

"""What a configuration may say: a value that its field cannot have is refused before a rank starts, and nothing is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from course_lib import launch
from course_lib.planning import layout
from course_lib.runs import field_values
from course_lib.text import tokenizers
from support.small import config

INFINITE, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("train.train_iters", 0, "cfg.train.train_iters=0: give a whole number of at least 1"),
        ("train.train_iters", -1, "at least 1"),
        ("train.train_iters", "two", "'two': give a whole number of at least 1"),
        ("train.train_iters", 2.0, "give a whole number"),
        ("train.train_iters", None, "cfg.train.train_iters is not set: give the number of steps"),
        ("train.train_samples", 64, "cfg.train.train_samples is set beside cfg.train.train_iters: set it to None"),
        ("train.global_batch_size", 0, "at least 1"),
        ("train.global_batch_size", None, "cfg.train.global_batch_size is not set"),
        ("train.micro_batch_size", -2, "cfg.train.micro_batch_size=-2"),
        ("model.num_layers", -2, "at least 1"),
        ("model.hidden_size", "128", "give a whole number"),
        ("model.ffn_hidden_size", 0, "give a whole number of at least 1"),
        ("model.num_attention_heads", True, "give a whole number"),
        ("model.vocab_size", 0, "cfg.model.vocab_size=0: give a whole number of at least 1"),
        ("model.seq_length", -1, "cfg.model.seq_length=-1: give a whole number of at least 1"),
        ("model.seq_length", None, "cfg.model.seq_length=None: give a whole number of at least 1"),
        ("model.rotary_base", 0, "at least 1"),
        ("model.hidden_dropout", 1.5, "give a number between 0 and 1"),
        ("model.recompute_granularity", "some", "'some': give one of"),
        ("model.bf16", "False", "give True or False"),
        ("model.window_size", (3,), r"give Tuple.int, int. or None"),
        ("model.activation_func", None, "cfg.model.activation_func=None: give"),
        ("model.normalization", "L2Norm", "'L2Norm': give one of 'RMSNorm', 'LayerNorm'"),
        ("model.moe_router_load_balancing_type", "aux", "'aux': give one of 'aux_loss', 'seq_aux_loss'"),
        ("model.moe_router_load_balancing_type", ["aux_loss", "aux"], "'aux'.: give one of 'aux_loss'"),
        ("model.window_attn_skip_freq", [1, 0], "it has 2 entries for 4 layers: give one for each"),
        ("model.no_rope_freq", [0] * 5, "it has 5 entries for 4 layers"),
        ("model.position_embedding_type", "yarn", "set cfg.model.yarn_rotary_scaling_factor, .*yarn_beta_slow$"),
        ("model.multi_latent_attention", True, "attention would be the ordinary one, without positions"),
        ("model.qk_l2_norm", True, "does not read it, so queries and keys would not be normalised: leave it out"),
        ("model.experimental_attention_variant", "dsa", "attention would be the ordinary one: leave it out"),
        ("model.heterogeneous_block_specs", True, "get_gpt_heterogeneous_layer_spec"),
        ("tokenizer.vocab_size", 0, "cfg.tokenizer.vocab_size=0"),
        ("optimizer.lr", -1e-3, "give a number of at least 0"),
        ("optimizer.lr", "1e-3", "'1e-3': give a number of at least 0"),
        ("optimizer.lr", NAN, "give a finite number"),
        ("optimizer.lr", INFINITE, "give a finite number"),
        ("optimizer.adam_beta2", 95, "give a number between 0 and 1"),
        ("scheduler.lr_warmup_iters", -1, "at least 0"),
        ("dataset.seq_length", -1, "at least 1"),
        ("dataset.num_workers", -1, "at least 0"),
        ("dataset.split", 0.9, "give text"),
        ("train.rampup_batch_size", 8, "give"),
        ("train.rampup_batch_size", [2, 2, 16], "Bridge does not read it .the batch would stay"),
        ("train.step_batch_size_schedule", "0:8 1B:16", "Bridge does not read it"),
        ("validation.multiple_validation_sets", True, "one validation loss for all sets"),
        ("dataset.multiple_validation_sets", True, "leave it out"),
        ("dataset.blend", (["a", "b"], [-1, 2]), r"blend: the weights \[-1, 2\] share nothing out"),
        ("dataset.blend", (["a", "b"], [0, 0]), r"the weights \[0, 0\] share nothing out"),
        ("dataset.blend", (["a", "b"], [NAN, 1]), "share nothing out"),
        ("dataset.blend", (["a", "b"], [INFINITE, 1]), "share nothing out"),
        ("dataset.blend", (["a", "b"], [1]), "1 weights for 2 prefixes"),
        ("dataset.blend_per_split", [(["a", "b"], [1]), None, None], "1 weights for 2 prefixes"),
        ("logger.log_interval", 0, "at least 1"),
        ("rng.seed", 0, "at least 1"),
        ("dist.distributed_timeout_minutes", 0, "at least 1"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused(
    bridge: Any, runs_directory: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, words: str
) -> None:
    """The message names the field, what it was given and what it can have."""
    monkeypatch.setenv("COURSE_DEVICE", "cuda")  # nothing of the configuration is replaced before it is looked at
    cfg = config(**{field.replace(".", "__"): value})
    with pytest.raises(launch.FieldError, match=words):
        launch.prepare(cfg, ranks=8, name="nonsense")
    assert not runs_directory.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.lr", 0.0),
        ("optimizer.lr", 1),
        ("optimizer.grad_norm_skip_threshold", INFINITE),
        ("validation.eval_iters", 0),
        ("validation.eval_interval", 0),
        ("checkpoint.save_interval", 0),
        ("checkpoint.most_recent_k", -1),
        ("dataset.num_workers", 0),
        ("model.mtp_num_layers", 0),
        ("model.moe_layer_freq", [0, 1, 1, 1]),
        ("model.rotary_base", 500000.0),
        ("model.window_size", (128, -1)),
        ("model.window_size", None),
        ("model.window_attn_skip_freq", [1, 0, 1, 0]),
        ("model.moe_router_load_balancing_type", ["aux_loss", "none"]),
        ("model.virtual_pipeline_model_parallel_size", None),
        ("dataset.blend", (["a", "b"], None)),
        ("dataset.blend", (["a", "b"], [0.7, 0.3])),
        ("dataset.blend", (["a", "b"], [0, 1])),
    ],
)
def test_a_value_that_upstream_gives_a_meaning_passes(bridge: Any, field: str, value: object) -> None:
    """Zero for none, a negative default, a base that recipes write with a point."""
    field_values.refuse_wrong_values(config(**{field.replace(".", "__"): value}))


@pytest.mark.parametrize("split", ["bogus", "0,0,0", "-1,2", "0,1,0", "9;1", "1,1,1,1", ""])
def test_shares_that_leave_nothing_to_train_on_are_refused(bridge: Any, split: str) -> None:
    """A run without training data would end well without a step, and Core reads -1 as 1."""
    cfg = config(dataset__blend=(["a"], None), dataset__split=split)
    with pytest.raises(launch.FieldError, match="give the shares of training, validation and test"):
        field_values.refuse_wrong_values(cfg)
    for right in ("969, 30, 1", "1", "0.9,.1"):
        field_values.refuse_wrong_values(config(dataset__blend=(["a"], None), dataset__split=right))


def test_a_size_that_one_model_of_a_family_lacks_may_be_absent_and_not_0(bridge: Any) -> None:
    """DeepSeek V2 Lite has no `q_lora_rank`, whose default is a number; 0 is no size where there is one."""
    from megatron.bridge.models.mla_provider import MLAModelProvider

    kind = f"{MLAModelProvider.__module__}.{MLAModelProvider.__qualname__}"
    field_values.refuse_wrong_values({"model": {"_target_": kind, "q_lora_rank": None}})
    with pytest.raises(launch.FieldError, match="q_lora_rank=0: give a whole number of at least 1"):
        field_values.refuse_wrong_values({"model": {"_target_": kind, "q_lora_rank": 0}})


def test_a_file_is_held_to_the_same(bridge: Any, runs_directory: Path, tmp_path: Path) -> None:
    """What `to_yaml` wrote passes; the same file with two wrong values is refused for both."""
    path = tmp_path / "config.yaml"
    config().to_yaml(str(path))
    assert launch.prepare(path, ranks=8).launch["train_iters"] == 3
    content = yaml.safe_load(path.read_text())
    content["train"]["train_iters"], content["model"]["hidden_dropout"] = "two", -0.1
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(launch.FieldError, match=r"(?s)hidden_dropout=-0.1.*train_iters='two'"):
        launch.prepare(path, ranks=8, name="second")
    assert [found.name for found in runs_directory.iterdir()] == ["run"]


def test_experts_in_some_layers_want_a_specification_that_reads_it(bridge: Any, runs_directory: Path) -> None:
    """Bridge's default makes all layers alike: `moe_layer_freq=[0, 1]` gave experts to all, without a word."""
    from megatron.bridge.models.gpt_provider import default_layer_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    sparse = {"model__num_moe_experts": 4, "model__transformer_layer_spec": default_layer_spec}
    cfg = config(**sparse, model__moe_layer_freq=[0, 1] * 2)
    with pytest.raises(
        launch.FieldError, match=r"moe_layer_freq=\[0, 1, 0, 1\].*every layer would have experts.*get_gpt_decoder"
    ):
        launch.prepare(cfg, ranks=8)
    content = {"model": {"_target_": f"{type(cfg.model).__module__}.{type(cfg.model).__qualname__}"}}
    content["model"] |= {"num_moe_experts": 4, "moe_layer_freq": 2}
    content["model"]["transformer_layer_spec"] = {"_target_": "a.module.default_layer_spec", "_call_": False}
    with pytest.raises(launch.FieldError, match="moe_layer_freq=2"):
        field_values.refuse_wrong_values(content)
    assert not runs_directory.exists()
    cfg.model.transformer_layer_spec = get_gpt_decoder_block_spec
    for right in (cfg, config(**sparse, model__moe_layer_freq=[1] * 4), config(**sparse)):
        field_values.refuse_wrong_values(right)


def test_a_run_is_counted_in_steps(bridge: Any, runs_directory: Path) -> None:
    """Bridge can count samples or epochs instead; the view and the run's record could not say how far it is."""
    with pytest.raises(
        launch.FieldError, match="train_iters is not set: give the number of steps instead of train_samples"
    ):
        launch.prepare(config(train__train_iters=None, train__train_samples=64), ranks=8)
    assert not runs_directory.exists()


@pytest.mark.parametrize("ranks", ["8", 0, -1, 2.0, True, None])
def test_a_number_of_ranks_that_is_none_is_refused(bridge: Any, runs_directory: Path, ranks: object) -> None:
    """The one function that decides the device refuses it, so every entry does."""
    for start in (
        lambda: launch.run(config(), ranks=ranks),
        lambda: launch.call("course_lib.experiments.hello:say", ranks=ranks),
    ):
        with pytest.raises(ValueError, match=r"ranks=.* is not a number of ranks: give a whole number of at least 1"):
            start()
    assert not runs_directory.exists()


def test_one_chunk_a_stage_and_no_layer_are_refused(bridge: Any, runs_directory: Path) -> None:
    """Interleaving that interleaves nothing, and a model that Bridge's recipe leaves at 0 layers."""
    cfg = config(tp=1, pp=2, model__virtual_pipeline_model_parallel_size=1)
    with pytest.raises(layout.LayoutError, match="VPP=1 gives each of PP=2 stages one chunk.*choose None or 2"):
        launch.prepare(cfg, ranks=2)
    with pytest.raises(layout.LayoutError, match="model.num_layers: 0 is not a size"):
        launch.prepare(config(model__num_layers=0), ranks=8)
    assert not runs_directory.exists()


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (
            "HuggingFaceTokenizer",
            "nobody/has-this",
            r"'nobody/has-this' is neither a folder .*`hf download nobody/has-this",
        ),
        ("HuggingFaceTokenizer", "has-this", "neither a folder here nor in this machine's cache"),
        ("HuggingFaceTokenizer", "/nowhere/tokenizer", "'/nowhere/tokenizer' does not exist: give a path"),
        ("HuggingFaceTokenizer", "~/tokenizer", "does not exist"),
        ("HuggingFaceTokenizer", "{empty}", "is a folder without a tokenizer in it"),
        ("HuggingFaceTokenizer", None, "is not set, and HuggingFaceTokenizer needs it"),
        ("TikTokenizer", "nobody/has-this", "does not exist: give a path"),
        ("SentencePieceTokenizer", "/nowhere/m.model", "does not exist: give a path"),
    ],
)
def test_a_tokenizer_that_is_not_here_is_refused(
    bridge: Any, runs_directory: Path, no_network: None, tmp_path: Path, kind: str, name: str, words: str
) -> None:
    """The message names the field, what it says, and the command that gets the files; nobody asks the Hub."""
    (tmp_path / "empty").mkdir()
    cfg = config(tokenizer__tokenizer_type=kind)
    cfg.tokenizer.tokenizer_model = name and name.format(empty=tmp_path / "empty")
    with pytest.raises(tokenizers.NoTokenizer, match=r"cfg\.tokenizer\.tokenizer_model.*" + words):
        launch.prepare(cfg, ranks=8)
    assert not runs_directory.exists()
    assert launch.prepare(cfg, ranks=8, launcher="another cluster").launch["launcher"] == "another cluster"


def test_a_tokenizer_that_is_here_passes(bridge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of ours, mock data's tokenizer, and one that somebody downloaded before; a missing vocabulary file does not."""
    folder = tokenizers.train_bpe(["some text"], tmp_path / "bpe", vocab_size=257)
    cached = tmp_path / "hub" / "models--nobody--has-this"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "tokenizer.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind, name in (
        ("HuggingFaceTokenizer", str(folder)),
        ("NullTokenizer", None),
        ("HuggingFaceTokenizer", "nobody/has-this"),
    ):
        tokenizers.require({"tokenizer": {"tokenizer_type": kind, "tokenizer_model": name}})
    with pytest.raises(tokenizers.NoTokenizer, match="cfg.tokenizer.vocab_file='/nowhere' does not exist"):
        tokenizers.require({"tokenizer": {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/nowhere"}})


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    """`load` says which file it looked for."""
    with pytest.raises(tokenizers.NoTokenizer, match="nowhere/tokenizer.json does not exist: give a directory that"):
        tokenizers.load(tmp_path / "nowhere")


def test_a_rate_beside_the_rate_is_taken_while_both_say_the_same(bridge) -> None:
    """Recipes set `scheduler.max_lr`, which nobody reads; who changes it and not `optimizer.lr` changed nothing."""
    cfg = config()
    cfg.scheduler.max_lr = cfg.optimizer.lr
    field_values.check_fields(cfg)
    cfg.scheduler.max_lr = 5e-6
    with pytest.raises(launch.FieldError, match=r"scheduler.max_lr is not a field .* Did you mean cfg.optimizer.lr"):
        field_values.check_fields(cfg)

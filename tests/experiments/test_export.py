"""A checkpoint of Bridge as a Hugging Face folder is the same model, or is not written."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib import launch, recipes, runs
from course_lib.common.config import Fields
from course_lib.experiments import export
from course_lib.runs import checkpoints
from course_lib.text import tokenizers

SEPARATOR = "\n"
UNUSED = ("modelopt.torch.nas", "modelopt.torch.peft", "trl", "torchao", "transformers.trainer", "wandb.sdk")
"""What an exporter's rank would import for two questions about quantised models, twenty times its own work."""


def work_and_look(given: list) -> list[str]:
    """In a rank: does the job, and returns which modules are there that it has no use for."""
    job, request = given
    module, _, name = job.partition(":")
    getattr(importlib.import_module(module), name)(request)
    return [name for name in UNUSED if name in sys.modules]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the exporter's ranks had loaded in the end."""
    found: list[str] = []
    call = launch.call

    def looked(job: str, request: dict, **options: object) -> None:
        (answer,) = call(f"{__name__}:work_and_look", [job, request], **options)
        found.extend(answer)

    monkeypatch.setattr(launch, "call", looked)
    return found


@pytest.fixture(scope="module")
def trained(bridge: object, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A Llama of 35,000 parameters, two steps on two ranks, whose 300 ids are padded to 512 rows."""
    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(place / "runs"))
        return launch.run(_config(place), ranks=2, name="trained", save=True, show=None)


def _config(place: Path) -> object:
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    texts = [f"def parse(text): Return the parsed text number {number}." for number in range(300)]
    tokenizers.train_bpe(texts, place / "tokenizer", vocab_size=300)
    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    recipes.shrink(
        cfg, num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=64, seq_length=32
    )
    cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(place / "tokenizer"))
    cfg.tokenizer.use_tokenizer_vocab_size = True
    cfg.model.tensor_model_parallel_size = 2
    cfg.model.hidden_dropout = cfg.model.attention_dropout = 0.0
    cfg.train.train_iters, cfg.train.micro_batch_size, cfg.train.global_batch_size = 2, 2, 4
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.scheduler.lr_warmup_iters = 1e-2, 1e-3, 1
    cfg.validation.eval_iters, cfg.logger.log_interval, cfg.checkpoint.save_interval = 0, 1, 1
    return cfg


def _as_if(trained: runs.Run, place: Path, change: Callable[[dict], None]) -> Path:
    """The last checkpoint with another `run_config.yaml`."""
    import yaml

    copied = place / "iter_0000002"
    shutil.copytree(checkpoints.latest(trained).path, copied)
    content = yaml.safe_load((copied / "run_config.yaml").read_text())
    change(content)
    (copied / "run_config.yaml").write_text(yaml.safe_dump(content))
    return copied


def test_an_exported_folder_is_the_same_model(trained: runs.Run, loaded: list[str], tmp_path: Path) -> None:
    """Logits of TP=2's checkpoint in Bridge and in transformers; padded rows, tokenizer and position code come along."""
    found = export.model(trained, tmp_path / "folder")
    assert found.largest_difference <= 1e-5 * found.largest_logit
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["vocab_size"] == 512 and config["eos_token_id"] == 0 and config["bos_token_id"] is None
    assert config["max_position_embeddings"] == 131072 and config["rope_parameters"]["factor"] == 32.0
    # 512 rows of 32, two layers of 4,096 (attention: 3,072) + 6,144 (MLP) + 64 (norms), and the last norm; the output is tied
    assert found.parameters == 512 * 32 + 2 * (3072 + 6144 + 64) + 32
    assert tokenizers.load(tmp_path / "folder").get_vocab_size() == 300
    back = checkpoints.compare(checkpoints.latest(trained), export.to_megatron(tmp_path / "folder", tmp_path / "back"))
    assert back[back.part == "weights"].largest_difference.max() == 0
    assert loaded == []


def test_the_tracker_says_which_save(trained: runs.Run, tmp_path: Path) -> None:
    """Bridge's exporter would take the largest iteration; a save that the trackers do not name is none until asked for."""
    from safetensors.torch import load_file

    shutil.copytree(trained.path / "checkpoints", tmp_path / "saves")
    shutil.copytree(tmp_path / "saves" / "iter_0000001", tmp_path / "saves" / "iter_0000009")
    last, first = (
        export.model(tmp_path / "saves", tmp_path / "a"),
        export.model(tmp_path / "saves", tmp_path / "b", step=1),
    )
    name = "model.norm.weight"
    one, other = (load_file(found.folder / "model.safetensors")[name] for found in (last, first))
    assert one.tolist() == checkpoints.read(checkpoints.latest(trained), "decoder.final_layernorm.weight").tolist()
    assert one.tolist() != other.tolist()


def test_what_fine_tuning_put_between_prompt_and_answer_stays_with_the_model(trained: runs.Run, tmp_path: Path) -> None:
    """The template of the run's data, and the fields that a GPU's checkpoint says, which one CPU rank cannot build."""
    from transformers import AutoTokenizer

    def fine_tuned_on_gpus(content: dict) -> None:
        content["dataset"]["preprocessing"] = {"separator": SEPARATOR, "prompt_template": "# {prompt}", "add_eos": True}
        content["model"] |= {"bf16": True, "apply_rope_fusion": True, "masked_softmax_fusion": True, "rotary_base": 1e4}

    found = export.model(_as_if(trained, tmp_path, fine_tuned_on_gpus), tmp_path / "folder")
    assert json.loads((found.folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e4
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    asked = [{"role": "user", "content": "def f(a)"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "# def f(a)\n"
    answered = [*asked, {"role": "assistant", "content": "Return it."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "# def f(a)\nReturn it.<|endoftext|>"
    assert tokenizer.model_max_length == 32


REFUSED = {
    "adapter": (lambda content: content.update(peft={"dim": 4}), "LoRA adapter and not the weights"),
    "no reference": (lambda content: content["model"].update(hf_model_id=None), "does not say which model"),
    "unknown reference": (lambda content: content["model"].update(hf_model_id="nobody/no-model"), "nobody/no-model"),
    "no place in Llama": (lambda content: content["model"].update(rotary_percent=0.5), "other logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused(case: str, trained: runs.Run, tmp_path: Path) -> None:
    """By name, before a rank starts where that can be known; nothing is written."""
    change, words = REFUSED[case]
    with pytest.raises(export.NotExported, match=words):
        export.model(_as_if(trained, tmp_path, change), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_torn_checkpoint_is_refused(trained: runs.Run, tmp_path: Path) -> None:
    """As for a run that would load it."""
    place = _as_if(trained, tmp_path, lambda content: None)
    (place / "__1_0.distcp").unlink()
    with pytest.raises(checkpoints.WrongCheckpoint, match="torn"):
        export.model(place, tmp_path / "folder")


@pytest.fixture(scope="module")
def adapted(trained: runs.Run) -> runs.Run:
    """A LoRA adapter of rank 4, trained for two steps on that model."""
    from megatron.bridge.peft.lora import LoRA

    cfg = _config(trained.path.parent.parent)
    cfg.checkpoint.pretrained_checkpoint = str(trained.path / "checkpoints")
    cfg.peft = LoRA(dim=4, alpha=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(trained.path.parent))
        return launch.run(cfg, ranks=2, name="adapted", save=True, show=None)


def test_an_adapter_is_the_same_in_peft(
    adapted: runs.Run, trained: runs.Run, loaded: list[str], tmp_path: Path
) -> None:
    """PEFT's model has Bridge's logits, merged too; they are not those of the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = export.model(trained, tmp_path / "base").folder
    found = export.adapter(adapted, tmp_path / "adapter", base=base)
    assert found.largest_difference <= 1e-5 * found.largest_logit
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        before = plain(ids).logits.clone()
        joined = PeftModel.from_pretrained(plain, found.folder).eval()
        with_adapter = joined(ids).logits.clone()
        merged = joined.merge_and_unload()(ids).logits
    assert (with_adapter - before).abs().max() > 1e-3
    assert (merged - with_adapter).abs().max() < 1e-5
    assert loaded == []


def test_an_adapter_wants_its_own_base(adapted: runs.Run, trained: runs.Run, tmp_path: Path) -> None:
    """Another step of the base is another base; without any, and without an adapter, it is said what to do."""
    early = export.model(trained, tmp_path / "early", step=1).folder
    with pytest.raises(export.NotExported, match="their embeddings differ"):
        export.adapter(adapted, tmp_path / "adapter", base=early)
    with pytest.raises(export.NotExported, match="holds no model.safetensors"):
        export.adapter(adapted, tmp_path / "adapter", base=tmp_path)
    with pytest.raises(export.NotExported, match="without cfg.peft"):
        export.adapter(trained, tmp_path / "adapter", base=early)


def test_a_fine_tuned_checkpoint_takes_the_tokenizer_that_its_configuration_names(tmp_path):
    """Bridge saves the files with a pretraining's checkpoint alone, and an export without them is of no use."""
    tokenizers.train_bpe(["Return the value of x, and of y."] * 9, tmp_path / "tokenizer", vocab_size=270)
    saved = SimpleNamespace(path=tmp_path / "iter_0000001")
    content = {"model": {"seq_length": 32}, "tokenizer": {"tokenizer_model": str(tmp_path / "tokenizer")}}
    found = export._tokenizer(saved, Fields.of(content))
    assert found.model_max_length == 32 and found.eos_token == tokenizers.END_OF_DOCUMENT
    content["tokenizer"]["tokenizer_model"] = str(tmp_path / "gone")
    assert export._tokenizer(saved, Fields.of(content)) is None


def test_a_model_is_loaded_without_a_warning_that_is_not_true(tmp_path: Path, monkeypatch) -> None:
    """transformers warns of its own scan, which the course's scan replaces; what is worse than a warning stays."""
    import transformers

    said: list[str] = []
    log, handler = logging.getLogger("transformers.models.nemotron_h.modeling_nemotron_h"), logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))

    def load(*_: object, **__: object) -> SimpleNamespace:
        log.warning("The fast path is not available")
        log.error("no such layer")
        return SimpleNamespace(eval=lambda: "a model")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    log.addHandler(handler)
    try:
        assert export.loaded(tmp_path) == "a model"
    finally:
        log.removeHandler(handler)
    assert said == ["no such layer"]


def test_a_hybrid_is_the_same_model_past_its_first_chunk(bridge: object, tmp_path: Path, monkeypatch) -> None:
    """64 tokens in four chunks, experts and shared expert, cut into two stages; the reference is the 30B's configuration.

    The recipe keeps the plan of the first save for the second, whose index then names one class more.
    """
    from megatron.bridge.recipes.nemotronh.nemotron_3_nano import nemotron_3_nano_pretrain_config

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    cfg = nemotron_3_nano_pretrain_config()
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 64, "vocab_size": 256}
    sizes |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 8, "mamba_num_groups": 2}
    sizes |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}
    sizes |= {"moe_shared_expert_intermediate_size": 32, "expert_model_parallel_size": 1}
    recipes.shrink(cfg, **sizes, mamba_chunk_size=16, hybrid_layer_pattern="ME|M*E")
    cfg.model.hf_model_id = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    cfg.model.pipeline_model_parallel_size = 2
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "NullTokenizer", None
    cfg.train.train_iters, cfg.train.micro_batch_size, cfg.train.global_batch_size = 2, 2, 4
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.scheduler.lr_warmup_iters = 1e-2, 1e-3, 1
    cfg.validation.eval_iters, cfg.checkpoint.save_interval = 0, 1
    run = launch.run(cfg, ranks=2, name="hybrid", save=True, show=None)
    found = export.model(run, tmp_path / "folder")
    assert found.largest_difference <= 1e-5 * found.largest_logit
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["layers_block_type"] == ["mamba", "moe", "mamba", "attention", "moe"] and config["chunk_size"] == 16
    _writes_token_by_token_what_it_would_see_whole(export.loaded(tmp_path / "folder"))


def _writes_token_by_token_what_it_would_see_whole(network) -> None:
    """The state after a prompt of three chunks is handed to transformers' own step for single tokens."""
    import torch

    ids = torch.arange(3, 43)[None]
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = network.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    with torch.no_grad():
        whole = network(written, use_cache=False).logits[0, 39:-1].argmax(-1)
    assert written[0, 40:].tolist() == whole.tolist()

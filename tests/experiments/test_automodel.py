"""AutoModel on the course's ranks: what is refused before there are any, and what its processes must not contain."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from course_lib import launch
from course_lib.common.config import ConfigError
from course_lib.experiments import automodel


@pytest.fixture
def settings(tmp_path):
    """Settings that nothing is wrong with."""
    (tmp_path / "config.json").write_text("{}")
    for part in ("train", "validation"):
        (tmp_path / f"{part}.idx").write_bytes(automodel.INDEX_HEADER + b"more")
    paths = {"train": ["0.3", str(tmp_path / "train")], "validation": str(tmp_path / "validation")}
    return {
        "model": {"pretrained_model_name_or_path": str(tmp_path), "attn_implementation": "sdpa"},
        "step_scheduler": {"max_steps": 2, "global_batch_size": 16, "local_batch_size": 2},
        "dataset": {"seq_length": 64, "paths": paths},
        "distributed": {"strategy": "fsdp2"},
    }


def test_good_settings_pass(settings):
    """Nothing is refused for its own sake."""
    automodel.refuse(settings, ranks=8, device="cpu")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("step_scheduler.max_steps", None, "step_scheduler.max_steps=None"),
        ("step_scheduler.global_batch_size", 24, "no multiple of 8 ranks x local_batch_size=2"),
        ("dataset.seq_length", None, "dataset.seq_length=None"),
        ("model.pretrained_model_name_or_path", "meta-llama/Llama-3.2-1B", "ranks do not ask the Hub"),
        ("dataset.paths", {"train": "/nowhere/train"}, "/nowhere/train.idx is not there"),
        ("model.attn_implementation", "flash_attention_2", "needs a GPU: flash attention"),
        ("model.use_liger_kernel", True, "Use False"),
        ("distributed.strategy", "megatron_fsdp", "Use 'ddp' or 'fsdp2'"),
        ("distributed.pp_size", 2, "distributed.pp_size=2 needs a GPU"),
    ],
)
def test_what_cannot_run_is_refused_by_its_field(settings, field, value, words):
    """The message has the field's dotted name as AutoModel's command line takes it."""
    wrong = copy.deepcopy(settings)
    section, name = field.split(".")
    wrong[section][name] = value
    with pytest.raises(ConfigError, match="AutoModel cannot train this here") as refused:
        automodel.refuse(wrong, ranks=8, device="cpu")
    assert words in str(refused.value)


def test_a_gpu_may_do_more(settings):
    """What needs a GPU is refused on CPU ranks alone."""
    settings["model"]["attn_implementation"] = "flash_attention_2"
    automodel.refuse(settings, ranks=8, device="cuda")


def test_a_file_of_nanogpt_is_no_index(settings, tmp_path):
    """Its data has the suffix `.bin` as well."""
    (tmp_path / "train.idx").write_bytes(b"\x00" * 64)
    with pytest.raises(ConfigError, match="no index of Megatron's"):
        automodel.refuse(settings, ranks=1, device="cpu")


def test_only_two_kinds_of_ranks_are_known():
    """A third is refused before anything starts."""
    with pytest.raises(ValueError, match="'megatron' or 'automodel'"):
        launch.call("course_lib.ranks.train:meet", ranks=1, imports="trl")


ALONE = """
import importlib.util, sys
from course_lib.ranks import cpu
cpu.activate(torch_alone=True)
import torch
torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.distributed.barrier(device_ids=[0])
automodel = __import__("course_lib.experiments.automodel", fromlist=["_"])
automodel._find_helpers()
helper = importlib.util.find_spec(automodel.HELPERS)
print(torch.ones(2, device="cuda").device, torch.cuda.current_device(), helper.origin.rpartition("/")[2][:11])
print(importlib.util.find_spec("transformer_engine"), [name for name in sys.modules if name.startswith("megatron.")])
"""


def test_ranks_without_megatron_have_torch_changed_and_nothing_else():
    """A stand-in would answer to `find_spec("transformer_engine")`, and AutoModel would import what is in the real one."""
    words = [sys.executable, "-W", "ignore", "-c", ALONE]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cpu 0 helpers_cpp", "None []"]

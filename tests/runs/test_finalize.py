"""What upstream refuses in its own last checks is refused before there are ranks, with upstream's words, field and fix."""

import os

import pytest

from course_lib import launch, stack
from course_lib.common.config import changed, flatten
from course_lib.runs import finalize
from support import small, sparse

pytestmark = pytest.mark.usefixtures("bridge", "runs_directory")

REFUSED = {  # fields, upstream's words, and a change that its message proposes
    "variable lengths without experts": (
        {"model.variable_seq_lengths": True},
        "does not support variable sequence length",
        ("model.variable_seq_lengths", False),
    ),
    "a deterministic mode without NCCL's": (
        {"model.deterministic_mode": True},
        "NCCL_ALGO must be one of",
        ("env_vars", {"NCCL_ALGO": "Ring"}),
    ),
    "two warm-ups": (
        {"scheduler.lr_warmup_fraction": 0.1},
        "Cannot specify lr_warmup_fraction=0.1 with lr_warmup_iters=1",
        ("scheduler.lr_warmup_iters", 0),
    ),
    "a bare assertion": (
        {"scheduler.start_weight_decay": 0.3, "scheduler.end_weight_decay": 0.1},
        "AssertionError at `assert self.end_weight_decay >= self.start_weight_decay`",
        ("scheduler.start_weight_decay", None),
    ),
    "recomputation without a method": (
        {"model.recompute_granularity": "full"},
        "so recompute_method must be",
        ("model.recompute_granularity", None),
    ),
    "experts' width without experts": (
        {"model.moe_ffn_hidden_size": 64},
        "moe_ffn_hidden_size is set but num_moe_experts is None",
        ("model.moe_ffn_hidden_size", None),
    ),
    "a tracker without the run's name": (
        {"logger.mlflow_experiment": "mine"},
        "Set logger.mlflow_run_name when enabling MLFlow logging.",
        ("logger.mlflow_experiment", None),
    ),
}


def _refusal(cfg: object, device: str | None) -> str:
    with pytest.raises(launch.ConfigError) as caught:
        launch.prepare(cfg, ranks=2, device=device)
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_combination_is_refused_at_the_door_and_its_fix_passes(kind, runs_directory, tmp_path) -> None:
    """For ranks here and on a node, from a cell and from a file; what the message proposes is no guess."""
    fields, words, (path, value) = REFUSED[kind]
    cfg = changed(small.config(tp=1), fields)
    cfg.to_yaml(str(tmp_path / "config.yaml"))
    for given, device in ((cfg, None), (cfg, "cuda"), (tmp_path / "config.yaml", None)):
        text = _refusal(given, device)
        assert words in text and (f"cfg.{path} = {value!r}" in text or f"cfg.{path}:" in text), text
    assert not list(runs_directory.glob("*"))
    launch.prepare(changed(cfg, {path: value}), ranks=2)


def test_a_field_of_experts_is_named_with_its_fix(runs_directory) -> None:
    """One expert a token needs its probability before the choice; the file line is Megatron Core's."""
    text = _refusal(sparse.config(fields={"moe_router_topk": 1}), None)
    assert "It is about cfg.model.moe_router_pre_softmax=False. What to do" in text
    assert "cfg.model.moe_router_pre_softmax = True" in text and "transformer_config.py:" in text
    launch.prepare(sparse.config(fields={"moe_router_topk": 1, "moe_router_pre_softmax": True}), ranks=2)


def test_what_passes_is_left_as_it_was(monkeypatch) -> None:
    """The checks set fields, variables and switches of torch: on a copy, in no process but a rank."""
    import torch

    monkeypatch.setenv("MY_CACHE", "mine")  # one that is replaced, where NCCL_ALGO is added
    variables = {"NCCL_ALGO": "Ring", "MY_CACHE": "the ranks'"}
    cfg = changed(small.config(tp=1), {"model.deterministic_mode": True, "env_vars": variables})
    before, variables = flatten(cfg), dict(os.environ)
    launch.prepare(cfg, ranks=2)
    assert flatten(cfg) == before and dict(os.environ) == variables
    assert not torch.are_deterministic_algorithms_enabled()


def test_where_ranks_have_gpus_the_kernel_leaves_them_alone(monkeypatch) -> None:
    """With Transformer Engine there, a run is checked as GPU ranks have it; which GPU it is, its ranks look themselves."""
    monkeypatch.setattr(stack, "missing_modules", list)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: pytest.fail("the kernel asked for a GPU"))
    fused = ("moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"} | dict.fromkeys(fused, False)
    cfg = changed(sparse.config(fields=flex), {"comm_overlap": None, "optimizer.use_precision_aware_optimizer": False})
    finalize.refuse(cfg, ranks=2, device="cuda")

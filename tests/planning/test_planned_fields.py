"""Every field of the model, the optimizer, the gradients and the overlaps is counted, without effect on memory, or refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest

from course_lib.planning import memory
from support import families, small
from support.planned_fields import BESIDE, COUNTED, EXPERTS, IN_A_HYBRID, NO_EFFECT, REFUSED, STAGES, VALUES

GROUPS = {reason: names.split() for reason, names in NO_EFFECT.items()}


def config(fields: dict[str, Any]) -> Any:
    """A small bf16 model at TP=2, with these fields; names of dtypes, functions and backends stand for them."""
    import torch
    from megatron.bridge.training.comm_overlap import CommOverlapConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.enums import AttnBackend

    block = functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    stands_for = {"relu": torch.relu, "unfused": AttnBackend.unfused, "decoder block": block}
    cfg = small.config(tp=2)
    cfg.mixed_precision = None
    if any(path.startswith("comm_overlap.") for path in fields):
        cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False)
    base = {"model.bf16": True, "optimizer.bf16": True, "ddp.grad_reduce_in_fp32": True, "train.global_batch_size": 32}
    base |= {"ddp.use_distributed_optimizer": True, "optimizer.use_distributed_optimizer": True}
    for path, value in (base | fields).items():
        section, name = path.split(".")
        if name.endswith("_dtype") and isinstance(value, str) and hasattr(torch, value):
            value = getattr(torch, value)
        value = stands_for.get(value, value) if isinstance(value, str) else value
        setattr(getattr(cfg, section), name, value)
    return cfg


def plan(fields: dict[str, Any]) -> dict[str, Any]:
    """What is planned: bytes by component and by part, and the parameters."""
    found = memory.plan(config(fields), ranks=8)
    return found.components | found.activations.by_part | {"parameters": found.states.parameters}


def another(path: str, cfg: Any) -> Any:
    """Another value of a field's type."""
    import torch

    if path in VALUES:
        return VALUES[path]
    section, name = path.split(".")
    holder = getattr(cfg, section)
    now, kind = getattr(holder, name), str({one.name: one.type for one in dataclasses.fields(holder)}[name])
    if isinstance(now, bool):
        return not now
    if isinstance(now, int | float):
        return now + 1
    if isinstance(now, torch.dtype) or "dtype" in kind:
        return torch.float16
    if "Callable" in kind:
        return lambda value=None, *_, **__: value
    if literals := [one for one in re.findall(r"'([^']+)'", kind) if one != now]:
        return literals[0]
    return 2 if "int" in kind else 0.5 if "float" in kind else "x"


@pytest.fixture(scope="module")
def bases(bridge: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A dense model of two stages and one with experts, and their plans."""
    return [(fields, plan(fields)) for fields in (STAGES, EXPERTS)]


def test_every_field_has_one_verdict(bridge: Any) -> None:
    """An upgrade that adds a field, or takes one away, stops here until the table says what it does to memory."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.comm_overlap import CommOverlapConfig
    from megatron.bridge.training.config import DistributedDataParallelConfig, OptimizerConfig

    kinds = {"model": GPTModelProvider, "optimizer": OptimizerConfig, "ddp": DistributedDataParallelConfig}
    kinds["comm_overlap"] = CommOverlapConfig
    installed = [f"{section}.{field.name}" for section, kind in kinds.items() for field in dataclasses.fields(kind)]
    said = [*COUNTED, *REFUSED, *(name for names in GROUPS.values() for name in names)]
    assert sorted(said) == sorted(installed)


@pytest.mark.parametrize("path", COUNTED)
def test_a_counted_field_changes_the_plan(bridge: Any, path: str) -> None:
    """Everything else stays as it is."""
    value, beside = COUNTED[path]
    without = {name: other for name, other in beside.items() if name != path}
    if path == "model.num_moe_experts":
        without = {}
    elif path in EXPERTS and beside is EXPERTS:
        without[path] = EXPERTS[path]
    elif path.startswith("model.account_for"):
        other = {"embedding": "loss", "loss": "embedding"}[path.split("_")[2]]
        without[f"model.account_for_{other}_in_pipeline_split"] = True
    elif path == "model.seq_length":
        without = {}
    if path.endswith("use_distributed_optimizer"):
        without = {}
    elif path.startswith("model.recompute_"):
        without[path] = beside.get(path)
    assert plan(beside | {path: value}) != plan({name: other for name, other in without.items() if other is not None})


@pytest.mark.parametrize("path", REFUSED)
def test_a_refused_field_is_named_with_what_to_do(bridge: Any, path: str) -> None:
    """Before anything is counted, or where upstream wants a GPU to build the layer."""
    value, beside = REFUSED[path]
    with pytest.raises(memory.NotPlanned) as caught:
        memory.plan(config(beside | {path: value}), ranks=8)
    assert path.split(".")[1] in str(caught.value) or "without a GPU" in str(caught.value)
    assert re.search(r"Set .* to plan without it|measure", str(caught.value))


def test_noise_on_the_routers_input_is_refused_by_name(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process has switched off torch's check of distributions, as its compiler does."""
    import torch

    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    value, beside = REFUSED[path := "model.moe_input_jitter_eps"]
    with pytest.raises(memory.NotPlanned, match=f"{path}={value}"):
        memory.plan(config(beside | {path: value}), ranks=8)


@pytest.mark.parametrize("reason", GROUPS)
def test_fields_without_effect_leave_the_plan_alone(bases: list[Any], reason: str) -> None:
    """All fields of a reason at once, on a pipeline and on a model with experts."""
    for fields, wanted in bases:
        cfg = config(fields | {"comm_overlap.tp_comm_overlap": False})
        tried = {path: another(path, cfg) for path in GROUPS[reason] if path not in BESIDE}
        assert plan(tried | fields) == wanted


@pytest.mark.parametrize("path", BESIDE)
def test_a_field_that_needs_others_has_no_effect_beside_them(bridge: Any, path: str) -> None:
    """The plan is the one of the others; where those are refused, so is the field with them."""
    value, beside = BESIDE[path]
    found = []
    for fields in (beside, beside | {path: value}):
        try:
            found.append(plan(fields))
        except memory.NotPlanned as refused:
            found.append(str(refused))
    assert found[0] == found[1]


def test_a_hybrid_counts_the_fields_of_its_layers(bridge: Any) -> None:
    """Nemotron 3 Nano's recipe in small; in which dtype a scan keeps its states does not matter, because it keeps none."""

    def plan(**fields: Any) -> dict[str, Any]:
        named = {f"model__{name}": value for name, value in fields.items()}
        found = memory.plan(families.hybrid(model__cuda_graph_impl="none", **named), ranks=1)
        return found.components | found.activations.by_part

    base = plan()
    assert all(plan(**{name: value}) != base for name, value in IN_A_HYBRID.items())
    assert plan(mamba_training_ssm_states_dtype="float32", is_hybrid_model=False) == base

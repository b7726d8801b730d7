"""What the lessons' check cells expect of a run on eight GPUs: bf16, the distributed optimizer, the fused loss.

No GPU is here, so the expectation of each cell is held against the model on meta tensors and the closed forms, and the
same facts must fail the cell where it believes that they come from CPU ranks.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

import pandas as pd
import pytest

from course_lib import runs, stack
from course_lib.common import units
from course_lib.lesson import checks
from course_lib.planning import memory, messages
from course_lib.reading import collectives
from support import small
from support.lesson_cells import cells, gives, verdicts


def made_by(number: str, names: tuple[str, ...], **given: Any) -> dict[str, Any]:
    """What cells of a lesson leave behind, executed in a row; what is given stands for what they import."""
    things: dict[str, Any] = {"checks": Some(predict=gives(None))}
    for name in names:
        exec(compile(cells(number)[name][0], f"lesson {number}, cell {name}", "exec", dont_inherit=True), things)
        things |= {"checks": Some(predict=gives(None)), **given}
    return things


@pytest.fixture(autouse=True)
def gpus(bridge, monkeypatch):
    """A machine on which eight ranks have GPUs, as far as a lesson's kernel can see."""
    monkeypatch.setenv("COURSE_DEVICE", "cuda")


def run_of(device: str, *losses: float, **more: Any) -> Some:
    """A run on a device."""
    steps = range(1, 1 + len(losses))
    metrics = pd.DataFrame({"step": steps, "loss": losses, "grad_norm": 1.0})
    return Some(metrics=metrics, launch={"device": device, "ranks": 8}, **more)


def rows_of(form: pd.DataFrame, *, ranks: int = 8) -> pd.DataFrame:
    """The lines that a recorder would have written if every rank had sent what a closed form says."""
    single = form.loc[form.index.repeat(form["count"])].drop(columns=["count", "why"])
    return pd.concat([single.assign(rank=rank, step=3) for rank in range(ranks)], ignore_index=True)


def holds(number: str, name: str, right: dict[str, Any], wrong: dict[str, Any]) -> None:
    """All claims of a cell hold on the facts of GPU ranks, and not on facts of which something is wrong."""
    found = verdicts(number, name, right)
    assert all(found), f"lesson {number}, {name}: {found}"
    assert not all(verdicts(number, name, right | wrong)), f"lesson {number}, {name}: nothing fails"


def test_lesson_00_does_not_time_forks_that_are_none():
    """A rank on a GPU imports the stack itself, so its start is no fraction of an import."""
    warm = pd.DataFrame({"sum": 28, "pid": range(101, 109), "seconds": 40.0, "import_seconds": 39.0, "cuda": True})
    facts = {"warm": warm, "ranks": 8, "os": Some(getpid=gives(100)), "seconds_limit": 30.0, "device": "cuda"}
    holds("00", "check-hello", facts, {"device": "cpu"})


def test_lesson_06_holds_a_gpus_bytes_against_a_gpus_plan():
    """2 bytes of weights, 4 of gradients, 12/DP of optimizer states, and the activations that fused kernels keep."""
    run = run_of("cuda", path=None)
    made = made_by(
        "06", ("imports", "parameters", "recipes", "run"), launch=Some(run=gives(run)), notebooks=Some(publish=gives(0))
    )
    planned = made["small"]
    count = memory.states(planned, ranks=8)[0].parameters
    kept = memory.activations(planned, ranks=8)
    rank_0 = {"weights_bytes": 2 * count, "gradients_bytes": 4 * count, "optimizer_bytes": 12 * count // 4}
    rank_0["activations_bytes"] = kept.per_microbatch_bytes + kept.loss_bytes
    tensors = Some(read=gives(pd.DataFrame([rank_0])))
    for device, fits in (("cuda", True), ("cpu", False)):
        run.launch["device"] = device
        things = made | {"tensors": tensors, "print": gives(None), "units": units}
        exec(cells("06")["compare"][0], things)
        assert all(verdicts("06", "check-run", {"rows": things["rows"]})) == fits, device


def test_lesson_08_expects_nine_bytes_a_parameter():
    """Bridge prints 6 + 12/4 bytes for each parameter of a rank at TP=2 DP=4: weights, gradients, a share of the states."""
    made = made_by("08", ("imports", "parameters", "config-model", "config-run"), work=Path("."))
    cfg, vocab_size = made["cfg"], made["vocab_size"]
    cfg.tokenizer.vocab_size = cfg.model.vocab_size = vocab_size  # the ranks learn it from the tokenizer
    planned = memory.states(cfg, ranks=8)[0].total_bytes
    parameters = made["recipes"].parameter_count(cfg.model, vocab_size=vocab_size) / 2
    checks.close(planned / units.MiB, parameters * (6 + 12 / 4) / units.MiB, rtol=0.01, what="states", unit="MiB")


def test_lesson_10_expects_fourteen_bytes_a_parameter():
    """A GPU's checkpoint holds bf16 weights, their fp32 copy and two moments; eight ranks write a share of the latter each."""
    made = made_by("10", ("imports", "parameters", "config", "predict"), print=gives(None))
    states = memory.states(made["cfg"], ranks=8)[0]
    assert made["state_bytes"] == 14
    written = states.weights_bytes + 8 * states.optimizer_bytes
    assert written == pytest.approx(14 * made["parameters"], rel=0.001)
    parts = pd.DataFrame(
        {"part": ["weights", "states"], "size_bytes": [2 * made["parameters"], 12 * made["parameters"]]}
    )
    facts = {name: made[name] for name in ("parameters", "state_bytes")}
    facts |= {"checkpoints": Some(tensors=gives(parts)), "saved": Some(size_bytes=14.5 * made["parameters"])}
    holds("10", "check-size", facts, {"state_bytes": 16})


def test_lessons_07_and_10_do_not_ask_gpus_for_every_digit():
    """Two equal runs on GPUs differ by rounding: that passes there, and on CPU ranks it does not."""
    close = {"warm launch": run_of("cuda", 3.0, 2.0), "torchrun": run_of("cuda", 3.0, 2.02)}
    holds("07", "check-launchers", {"found": close, "steps": 2, "runs": runs}, {"steps": 3})
    for run in close.values():
        run.launch["device"] = "cpu"
    assert not all(verdicts("07", "check-launchers", {"found": close, "steps": 2, "runs": runs}))
    resumed = {"resumed": run_of("cuda", 1.0), "save_interval": 0, "distance": gives(0.01)}
    bounds = {"bound": runs.GPU_ROUNDING, "equal": "within 5%"}
    holds("10", "check-resume", resumed | bounds, {"bound": 0.0})


def test_lesson_11_counts_a_gpus_messages():
    """Half the bytes in the residual stream, one gather for the fused loss; gradients travel in another phase."""
    made = made_by("11", ("imports", "parameters", "config", "predict"))
    cfg, stream = made["cfg"], made["stream_bytes"]
    form = messages.expected(cfg, ranks=8, element_bytes=2)
    of_layers = form[(form.group == "tp") & (form.bytes == stream)]
    loss = of_layers.iloc[:1].assign(operation="all_gather", bytes=3 * 4 * stream // 64, count=made["microbatches"])
    assert made["operations"] == of_layers["count"].sum() + made["microbatches"]
    sent = pd.concat([of_layers, loss, form[form.group != "tp"].assign(phase="backward")], ignore_index=True)
    run = run_of("cuda", config=cfg, collectives=rows_of(sent))
    found = collectives.recorded(run)
    facts = {name: made[name] for name in ("operations", "expected_layers", "on_cpu", "stream_bytes")}
    holds("11", "check-count", facts | {"found": found}, {"operations": made["operations"] + 2 * made["microbatches"]})
    facts |= {"run": run, "collectives": collectives}
    holds("11", "check-form", facts, {"on_cpu": True})
    fewer = run_of("cuda", config=cfg, collectives=rows_of(sent.assign(count=sent["count"] - (sent.bytes == stream))))
    holds("11", "check-form", facts, {"run": fewer})


def test_lesson_12_expects_parameters_back_in_bf16():
    """With shards, fp32 gradients go one way and bf16 parameters come back: three quarters of what all-reduce sends."""
    made = made_by("12", ("imports", "parameters", "config"))
    forms = {
        name: messages.expected(made[cfg], ranks=8, element_bytes=2)
        for name, cfg in (("plain", "cfg_plain"), ("sharded", "cfg"))
    }
    facts = {
        "recipes": made["recipes"], "cfg": made["cfg"], "runs": runs, "run_plain": run_of("cuda", 5.0, rows="plain"),
        "run": run_of("cuda", 5.1, rows="sharded"),
        "collectives": Some(recorded=lambda run: forms[run.rows], by_group=messages.by_group),
    }  # fmt: skip
    holds("12", "check-data", facts, {"run": run_of("cpu", 5.1, rows="sharded")})
    both = {"cfg": made["cfg"], "runs": runs, "run": run_of("cuda", 5.0), "run_cp": run_of("cuda", 5.1)}
    holds("12", "check-context", both | {"collectives": None}, {"run_cp": run_of("cuda", 5.9)})


def test_cores_own_attention_on_a_gpu_is_not_planned(bridge):
    """It keeps every score there; what a CPU rank keeps, whose attention does not, is another plan."""
    from course_lib.stack import devices

    cfg = small.config(tp=1, model__transformer_impl="local")
    with pytest.raises(ValueError, match="keeps every score there"):
        memory.activations(cfg, ranks=1)
    assert memory.activations(devices.applied(cfg), ranks=1).total_bytes > 0


def test_the_kernel_asks_the_same_question_as_the_launcher():
    """What the cells ask is what decides where the ranks are."""
    assert stack.device(8) == "cuda"

"""What the lessons' check cells expect of a run on eight GPUs: bf16, the distributed optimizer, the fused loss.

No GPU is here, so the expectation of each cell is held against the model on meta tensors and the closed forms, and the
same facts must fail the cell where it believes that they come from CPU ranks.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest

from course_lib import runs, stack
from course_lib.common import units
from course_lib.experiments import sweep, tensors
from course_lib.lesson import checks, notebooks
from course_lib.planning import memory, messages
from course_lib.reading import baselines, collectives, throughput
from support import small
from support.lesson_cells import cells, gives, tagged, verdicts


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


def first_loss_in_bf16(vocab_size: int, hidden_size: int, *, tokens: int = 2048, std: float = 0.02) -> float:
    """The first loss as a GPU's last layer and fused loss compute it: normed vectors, weights and logits in bf16."""
    import torch

    draws = torch.Generator().manual_seed(7)
    hidden = torch.nn.functional.rms_norm(torch.randn(tokens, hidden_size, generator=draws), (hidden_size,)).bfloat16()
    weight = (std * torch.randn(vocab_size, hidden_size, generator=draws)).bfloat16()
    labels = torch.randint(vocab_size, (tokens,), generator=draws)
    parts = [(hidden[n : n + 256] @ weight.T).float() for n in range(0, tokens, 256)]
    losses = [torch.nn.functional.cross_entropy(part, labels[256 * n :][:256]) for n, part in enumerate(parts)]
    return float(torch.stack(losses).mean())


def parameters_on_a_gpu(cfg: Any) -> int:
    """Parameters of rank 0 as its log says them: the model of a GPU rank, built on the meta device."""
    return memory.states(cfg, ranks=8)[0].parameters


def test_lesson_03_holds_on_a_gpu(bridge):
    """A bf16 loss is as near to its formula, Transformer Engine's layers have as many parameters, and the hand-made file
    may differ from the launcher by rounding."""
    made = made_by("03", ("imports", "parameters", "recipe", "shrink", "guess", "predict"))
    cfg, vocab_size = made["cfg"], made["vocab_size"]
    first = first_loss_in_bf16(vocab_size, cfg.model.hidden_size)
    log = f" > number of parameters on (tensor, pipeline) model parallel rank (0, 0, 0): {parameters_on_a_gpu(cfg)}"
    run = run_of("cuda", first, 5.5, log=gives(log))
    run.metrics["tokens"] = made["tokens_per_step"]
    facts = {name: made[name] for name in ("cfg", "first_loss", "parameters", "tokens_per_step", "re")} | {"run": run}
    holds("03", "check", facts, {"parameters": made["parameters"] + cfg.model.hidden_size})
    assert not all(verdicts("03", "check", facts | {"first_loss": made["first_loss"] - 0.05}))

    def by_hand(*losses: float, device: str = "cuda") -> dict[str, Any]:
        printed = run_of("cuda", *losses).metrics
        two = run_of(device, 6.9, 6.8, 6.7, 6.6)
        return {"printed": printed, "launch": Some(run=gives(two)), "place": Some(glob=gives([Path("events.1")]))}

    things = {
        "cfg_two": cfg,
        "on_a_node": "",
        "two_steps": 4,
        "by_hand": Some(stderr=""),
        "runs": runs,
        "throughput": throughput,
    }
    near = things | by_hand(6.9, 6.81, 6.69, 6.6)
    holds("03", "check-by-hand", near, by_hand(6.9, 6.81, 6.0, 6.6))
    assert not all(verdicts("03", "check-by-hand", near | by_hand(6.9, 6.81, 6.69, 6.6, device="cpu")))


@pytest.mark.parametrize(("number", "vocab_size", "hidden_size"), [("04", 8192, 64), ("05", 131_072, 64)])
def test_first_losses_in_bf16_are_those_of_the_lessons(number, vocab_size, hidden_size):
    """Rounding the logits of 8,192 or 131,072 ids to bf16 moves the mean by far less than the cells allow."""
    assert f"hidden_size={hidden_size}" in "".join(source for source, _ in cells(number).values())
    first, expected = first_loss_in_bf16(vocab_size, hidden_size), baselines.first_loss(vocab_size, hidden_size, 0.02)
    assert first == pytest.approx(expected, abs=0.02)
    if number == "05":
        facts = {"both": {"Nemotron": run_of("cuda", first)}, "expected": {"Nemotron": expected}, "on_rank_0": [0, 1]}
        facts |= {"added": 2, "per_token": {"Nemotron": 11, "BPE": 6.5}, "per_byte": {"Nemotron": 3.8, "BPE": 3.7}}
        holds("05", "check", facts, {"both": {"Nemotron": run_of("cuda", first + 0.1)}})


def test_lesson_05_adds_rows_and_nothing_else_on_a_gpu(bridge):
    """The larger vocabulary adds its rows to a rank of Transformer Engine's model, too, and 14 of its 18 bytes follow."""
    counts = []
    for vocab_size in (1024, 131_072):
        cfg = small.config(tp=2, tokenizer__vocab_size=vocab_size, model__hidden_size=64)
        cfg.model.share_embeddings_and_output_weights = True
        counts.append(parameters_on_a_gpu(cfg))
    assert 2 * (counts[1] - counts[0]) == (131_072 - 1024) * 64


def test_lesson_09_sees_the_same_differences_through_rounding():
    """Losses of bf16 runs move by up to half a thousandth from one to the next; the verdicts of the lesson do not."""
    draws = random.Random(3)

    def on_gpus(*losses: float) -> list[float]:
        return [loss * (1 + draws.uniform(-5e-4, 5e-4)) for loss in losses]

    base = on_gpus(5.98, 6.05, 6.02)
    after = {
        "by_init": (5.981, 6.051, 6.019),
        "by_rate": (6.4, 6.45, 6.42),
        "by_length": (6.0, 6.03, 6.04),
        "by_shape": (6.3, 6.4, 6.35),
    }
    found = {
        name: sweep.Comparison.of(sweep.Change(name, 1, 2), base, on_gpus(*losses)) for name, losses in after.items()
    }
    seeds = found | {"sweep": sweep}
    holds("09", "check-single-seed", seeds, {"by_init": sweep.Comparison.of(sweep.Change("x", 1, 2), base, base[::-1])})
    things = found | {"plots": MagicMock(), "compare": MagicMock()}
    holds("09", "figure-all", things, {"by_length": found["by_rate"]})


def test_lesson_06_holds_a_gpus_bytes_against_a_gpus_plan(monkeypatch):
    """2 bytes of weights, 4 of gradients, 12/DP of optimizer states, and the activations that fused kernels keep."""
    run = run_of("cuda", path=None)
    given = {"launch": Some(run=gives(run)), "checks": Some(publish=gives(0))}
    given["tensors"] = Some(TARGET="", beside_the_plan=gives({}))
    made = made_by("06", ("imports", "parameters", "recipes", "run"), **given)
    planned = made["small"]
    count = memory.states(planned, ranks=8)[0].parameters
    kept = memory.activations(planned, ranks=8)
    rank_0 = {"weights_bytes": 2 * count, "gradients_bytes": 4 * count, "optimizer_bytes": 12 * count // 4}
    rank_0["activations_bytes"] = kept.per_microbatch_bytes + kept.loss_bytes
    monkeypatch.setattr(tensors, "read", gives(pd.DataFrame([rank_0] * 8)))
    for device, fits in (("cuda", True), ("cpu", False)):
        run.launch["device"] = device
        rows = tensors.beside_the_plan(planned, run)
        assert all(verdicts("06", "check-run", {"rows": rows})) == fits, device


def test_lesson_08_expects_nine_bytes_a_parameter():
    """Bridge prints 6 + 12/4 bytes for each parameter of a rank at TP=2 DP=4: weights, gradients, a share of the states."""
    made = made_by("08", ("imports", "parameters", "config-model"), work=Path("."), blends=[[], []])
    cfg, vocab_size = made["cfg"], made["vocab_size"]
    cfg.tokenizer.vocab_size = cfg.model.vocab_size = vocab_size  # the ranks learn it from the tokenizer
    planned = memory.states(cfg, ranks=8)[0].total_bytes
    parameters = made["closed_forms"].parameter_count(cfg.model, vocab_size=vocab_size) / 2
    checks.close(planned / units.MiB, parameters * (6 + 12 / 4) / units.MiB, rtol=0.01, what="states", unit="MiB")
    state_bytes = parameters * (6 + 12 / 4)
    run = run_of("cuda", 9.0, log=gives(f"weight and optimizer={state_bytes / units.MiB:.2f} MB"))
    run.memory = pd.DataFrame({"rank": range(8), "peak_memory_bytes": planned + 2**20})
    facts = {"throughput": throughput, "run": run, "state_bytes": state_bytes}
    facts |= {"plots": MagicMock(), "compare": MagicMock()}
    facts["plots"].figure.return_value.__enter__.return_value = None, None
    holds("08", "check-memory", facts, {"state_bytes": parameters * (4 + 12 / 4)})


def test_lesson_10_expects_fourteen_bytes_a_parameter():
    """A GPU's checkpoint holds bf16 weights, their fp32 copy and two moments; eight ranks write a share of the latter each."""
    made = made_by("10", ("imports", "parameters", "config", "guess", "predict"), print=gives(None))
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
    resumed = {
        "cfg": Some(train=Some()), "resumed_steps": 1, "saved": Some(path=""), "save_interval": 0, "runs": runs,
        "launch": Some(run=gives(run_of("cuda", 3.0))), "whole": run_of("cuda", 3.03),
    }  # fmt: skip
    holds("10", "check-resume", resumed, {"whole": run_of("cpu", 3.03)})


def test_lesson_11_counts_a_gpus_messages():
    """Half the bytes in the residual stream, one gather for the fused loss; gradients travel in another phase."""
    made = made_by("11", ("imports", "parameters", "config", "guess", "predict"))
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
        "closed_forms": made["closed_forms"], "cfg": made["cfg"], "runs": runs, "run_plain": run_of("cuda", 5.0, rows="plain"),
        "run": run_of("cuda", 5.1, rows="sharded"),
        "collectives": Some(recorded=lambda run: forms[run.rows]), "messages": messages,
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


ELSEWHERE = {
    "texts, tables, plans and files, which know no device": """00/check-table 00/check-broken 02/check-diff 02/check-pattern
        02/check-count 02/check-columns 02/shrink 03/check-first-loss 03/check-mock 04/check-split 04/check-loss-free
        04/check-labels 04/check-cuts 04/check-blend 05/check-ids 05/compare 05/check-padding 05/check-difference
        06/check-states 06/check-fit 06/check-time 06/check-levers 06/check-verdict
        07/check-slurm 07/check-second 07/check-rented 08/check-published 08/check-order 08/check-formula
        09/base-run 09/one-field 09/shape 10/check-changed 13/check-mask 13/check-padding 13/check-share 13/check-slips
        13/check-config 13/check-gpus 14/check-pairs 14/check-keys 14/check-gameable 15/check-nano3
        15/check-plan 16/check-count 16/check-router 16/check-plan 16/check-sends 16/longer
        17/check-pattern 17/check-scan 17/check-memory
        17/check-card 17/check-cost 17/check-move 18/check-mend 18/check-score
        18/check-writer 18/check-study 18/check-ray 18/check-scale 19/check-crossing 19/check-roads
        20/tokens 20/changed 20/check-beta 20/numbers 20/write-plan""",
    "how a launch, a save or a resume ends, which is the same on every device": """07/check-silence 07/check-first
        07/check-habits 09/run-noise 10/recipe-format 10/check-full 10/check-traps 20/killed""",
    "one run held against itself, or against a bound far away": """03/check-real-text 04/check 08/check-baselines
        08/check-log 08/check-sick 08/check-leak 10/check-hub 10/check-rows
        12/state-check 12/check-interleave 12/check-node 20/run""",
    "bytes by the device that their predict cell asks for, and tokens that are counted": "13/check-run",
    "models of transformers on the CPU, wherever ranks trained them, against bounds far away": """13/check-learned
        13/check-merged 14/check-template 14/check-margins 14/check-mend
        14/check-answers 14/check-gamed 14/check-seeds 15/check-export 15/check-hand 15/check-order
        15/check-paired 15/check-ladder 15/check-leak 15/check-bytes 15/check-seeds 19/check-start 20/figure""",
    "routers and paired seeds, whose bounds are far from what rounding moves": "16/check-load 16/check-pay 18/check-pays",
    "verdicts that figure-all takes together": "09/run-learning-rate 09/run-init 09/run-length 09/run-shape",
}
"""Check cells that no test here evaluates for a GPU, and why they need none."""
WITHOUT_RANKS = {"01", "a"}
"""Lessons that start no rank."""
ASKS = r"\bon_cpu\b|\bin_fp32\b|\bbound\b|\bdevice\b|torch\.cuda"
"""What a cell says that asks where its ranks were."""


def test_every_check_cell_knows_about_gpus():
    """Each is evaluated here, asks for the device itself, or is listed with the reason why it need not."""
    source = Path(__file__).read_text(encoding="utf-8")
    here = {
        f"{number}/{name}" for number, name in re.findall(r'(?:holds|verdicts)\(\s*"(\d\d|[a-z])", "([\w-]+)"', source)
    }
    listed = [name for names in ELSEWHERE.values() for name in names.split()]
    numbers = [path.stem.split("_")[0] for path in notebooks.notebooks()]
    every = {f"{number}/{cell}" for number in numbers for cell in tagged(number, "check")}
    asks = {name for name in every if re.search(ASKS, cells(name.split("/")[0])[name.split("/")[1]][0])}
    left = every - here - asks - {name for name in every if name.split("/")[0] in WITHOUT_RANKS}
    assert left - set(listed) == set() and set(listed) - every == set() and len(listed) == len(set(listed))

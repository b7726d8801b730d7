"""Every claim of a check cell of lessons 00 to 03 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace as Some

import pandas as pd
import pytest
from omegaconf import OmegaConf

from course_lib import recipes, runs
from course_lib.machine import stack_map
from course_lib.machine.readings import Finding
from course_lib.planning.census import Census
from course_lib.reading import baselines, throughput
from course_lib.recipes import blueprint
from support.lesson_cells import falsify, gives, tagged


def torch(gpus):
    """A torch that sees so many GPUs."""
    return Some(cuda=Some(is_available=gives(gpus > 0), device_count=gives(gpus)))


def lesson_00():
    """Facts of lesson 00, and for each check cell what may be wrong with them, in words."""
    machine = {
        "importlib": Some(metadata=Some(version=gives("2.13.0+cu130"))), "packages": {"torch": Some(version="2.13.0+cu130")},
        "stack": Some(TESTED={"torch": "2.13.0"}, device=gives("cpu")), "torch": torch(0), "ranks": 8,
        "report": Some(findings=[Finding("import of nemo-run", "ok", "0.11.1, nemo_run")]),
    }  # fmt: skip
    broken = Finding("import of nemo-run", "warn", "nemo_run cannot be imported: ImportError", "Reinstall it.")
    yield "check-table", machine, {
        "the doctor read another version": {"packages": {"torch": Some(version="2.12.0")}},
        "tested with another version": {"stack": Some(TESTED={"torch": "2.12.0"}, device=gives("cpu"))},
        "a package that is installed and broken": {"report": Some(findings=[broken])},
    }  # fmt: skip
    yield "check-device", machine, {
        "GPUs are promised that are not there": {"stack": Some(TESTED={"torch": "2.13.0"}, device=gives("cuda"))},
        "GPUs are there and left alone": {"torch": torch(8)},
    }  # fmt: skip
    warm = pd.DataFrame({"sum": 28, "pid": range(101, 109), "seconds": 1.0, "import_seconds": 10.0, "cuda": True})
    eight = {"warm": warm, "ranks": 8, "device": "cpu", "os": Some(getpid=gives(100)), "seconds_limit": 30.0}
    yield "check-hello", eight, {
        "a rank that added for itself": {"warm": warm.assign(sum=[28] * 7 + [7])},
        "one process that is two ranks": {"warm": warm.assign(pid=[101, *range(101, 108)])},
        "a rank that is the kernel": {"os": Some(getpid=gives(101))},
        "a slow start": {"warm": warm.assign(seconds=31.0, import_seconds=100.0)},
        "ranks that import the stack again": {"warm": warm.assign(seconds=9.0)},
    }  # fmt: skip
    yield "check-kernel", {"torch": torch(0), "stack": Some(gpu_count=gives(0)), "warm": warm}, {
        "CUDA faked in the kernel": {"torch": torch(8)},
        "a rank without the redirection": {"warm": warm.assign(cuda=[True] * 7 + [False])},
    }  # fmt: skip
    stranger = {"fix": "Run `pip uninstall -y megatron`."}
    yield "check-broken", {"doctor_there": Some(returncode=1), "stranger": stranger}, {
        "a doctor that is content": {"doctor_there": Some(returncode=0)},
        "a doctor without a fix": {"stranger": {"fix": ""}},
    }  # fmt: skip


def lesson_01():
    """Facts of lesson 01; the map is the real one."""
    boxes, questions = stack_map.boxes(), stack_map.questions()
    yield "check-engine", {"stack_map": stack_map, "engine": "Megatron-Bridge"}, {
        "what starts ranks": {"engine": "NeMo Run"},
    }  # fmt: skip
    tested = {box.distribution: box.tested for box in boxes}
    table = Some(full=gives(None))
    yield "check-versions", {"stack_map": stack_map, "installation": Some(version=tested.get), "tables": table}, {
        "nothing is installed": {"installation": Some(version=gives(None))},
    }  # fmt: skip
    shared = {"core", "training", "bridge", "energon"}
    yield "check-namespace", {"installation": Some(inside=gives(shared))}, {
        "another package": {"installation": Some(inside=gives(shared | {"nano"}))},
        "a core without its older loop": {"installation": Some(inside=gives(shared - {"training"}))},
    }  # fmt: skip
    flags = ["tensor-model-parallel-size", "micro-batch-size", "lr", "lr-warmup-iters", "save-interval"]
    sections = ["model", "train", "optimizer", "scheduler", "checkpoint"]
    fields = {f"{section}.{flag.replace('-', '_')}": 1 for section, flag in zip(sections, flags, strict=True)}

    def asked(flags, fields):
        def arguments(parser):
            for flag in flags:
                parser.add_argument(f"--{flag}")
            return parser

        bridge = Some(offline=contextlib.nullcontext, flatten=gives(fields))
        return {"add_megatron_arguments": arguments, "llama32_1b_pretrain_config": gives(None), "recipes": bridge}

    yield "check-flags", asked(flags, fields), {
        "no such flag": asked([], fields),
        "no such field": asked(flags, {}),
    }  # fmt: skip

    def automodel(*models, default="force_hf: bool = False"):
        texts = {"registry.py": "".join(f'"{model}ForCausalLM"' for model in models), "auto_model.py": default}
        return {"installation": Some(source=lambda package, name: texts[name.split("/")[-1]])}

    models = ("Llama", "NemotronH", "Qwen3")
    yield "check-automodel", automodel(*models), {
        "no model of its own": automodel(),
        "the Hub's model is the default": automodel(*models, default="force_hf: bool = True"),
    }  # fmt: skip
    proofs = {
        box.name: Some(file="installed.py" if box.distribution else "course_lib/recipes/blueprint.py") for box in boxes
    }
    installed = sum(box.distribution is not None for box in boxes)
    yield "check-roles", {"proofs": proofs, "installed": installed}, {
        "Core shown by the course": {"proofs": proofs | {"Megatron-LM": Some(file="course_lib/stack/__init__.py")}},
    }  # fmt: skip

    def imports(down, up):
        return {"installation": Some(importing=lambda module, other: down if module == "megatron.bridge" else up)}

    yield "check-dependency", imports(600, 3), {
        "Bridge hardly needs Core": imports(90, 1),
        "each needs the other": imports(600, 60),
    }  # fmt: skip
    fewer = [question for question in questions if question.answer != "NeMo Run"]
    yield "check-questions", {"stack_map": stack_map, "Counter": Counter}, {
        "a system that answers nothing": {"stack_map": Some(boxes=stack_map.boxes, questions=gives(fewer))},
        "an answer that is no system": {"stack_map": Some(boxes=gives(boxes[1:]), questions=stack_map.questions)},
    }  # fmt: skip


LLAMA_1B = OmegaConf.create({
    "model": {
        "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 64,
        "ffn_hidden_size": 8192, "seq_length": 8192, "vocab_size": 128_256, "normalization": "RMSNorm",
        "gated_linear_unit": True, "add_bias_linear": False, "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
    },
    "dataset": {"seq_length": 8192},
    "optimizer": {"lr": 3e-4},
})  # fmt: skip
"""What lesson 02 reads of the recipe."""


def other(cfg, **sections):
    """A copy of a configuration with some other settings."""
    return OmegaConf.merge(cfg, sections)


def nano(*, experts=29_374_808_064, embedding=352_321_536, rest=1_850_810_688, **fields):
    """The census of Nemotron 3 Nano on 8 ranks, or of a model that is nearly it."""
    parts = {"routed experts": experts, "input embedding": embedding, "rest": rest}
    on_rank = experts // 8 + embedding + rest
    return {"Nano 30B-A3B": Census("", parts, **{"experts": 128, "chosen": 6, "on_rank": on_rank} | fields)}


def lesson_02():
    """Facts of lesson 02; configurations are compared, shrunk and counted by the real functions."""
    llama_3b = other(LLAMA_1B, model={"num_layers": 28, "hidden_size": 3072})
    nanos = {
        "nano": {"layers": 52, "width": 2688, "experts": 128, "chosen": 6},
        "nano_4b": {"layers": 42, "width": 3136},
    }
    shown = {"copy": copy, "tables": Some(full=gives(None)), "llama_1b": LLAMA_1B, "recipes": recipes}
    yield "check-diff", {"llama_3b": llama_3b, **shown, **nanos}, {
        "another learning rate": {"llama_3b": other(llama_3b, optimizer={"lr": 1e-4})},
        "as deep as 1B": {"llama_3b": other(llama_3b, model={"num_layers": 16})},
        "one Nano twice": {"nano_4b": nanos["nano"]},
    }  # fmt: skip

    def patterned(pattern, layers=5):
        return {"nano": Some(model=Some(num_layers=layers, hybrid_layer_pattern=pattern))}

    deep = {"layers_published": 5, "Counter": Counter, **patterned("MEM*E")}
    yield "check-pattern", deep, {
        "another source": {"layers_published": 4},
        "a recipe that contradicts its pattern": patterned("MEM*E", layers=4),
        "a Mamba layer after another": patterned("MM*EE"),
    }  # fmt: skip
    count = {
        "counted": nano(), "routed": 29_374_808_064, "unused": 27_997_863_936, "ranks": 8, "total_published": 31.6,
    }  # fmt: skip
    yield "check-count", count, {
        "an expert more in the estimate": {"routed": 29_384_785_920},
        "experts that are not shared out": {"counted": nano(on_rank=31_577_940_288)},
        "another report": {"total_published": 30.0},
        "a token that uses 8 experts": {"counted": nano(chosen=8)},
        "a small input embedding": {"counted": nano(embedding=52_321_536, rest=2_150_810_688)},
        "an estimate for 8 experts": {"unused": 27_538_882_560},
    }  # fmt: skip
    found = blueprint.differences()
    written = [row.installed or "" for row in found if row.lesson]
    table = pd.DataFrame({"the recipe you get": written, "verdict": [row.verdict for row in found if row.lesson]})

    def says(table):
        """`blueprint`, whose columns are these."""
        return {"blueprint": Some(columns=gives(table), differences=blueprint.differences)}

    things = {"Counter": Counter, "nano": None, "tables": Some(full=gives(None))}
    yield "check-columns", things | says(table), {
        "upstream changed": says(table.assign(**{"the recipe you get": "another"})),
        "another verdict": says(table.assign(verdict="undecided")),
    }  # fmt: skip

    def shrinks(then):
        """`recipes`, whose `shrink` does one thing more and returns the list that follows from it."""

        def shrink(cfg, **sizes):
            return then(cfg, recipes.shrink(cfg, **sizes))

        return {"recipes": Some(shrink=shrink, diff=recipes.diff)}

    def sets(section, field, value):
        """Set one more field, and list it."""

        def then(cfg, changes):
            setattr(getattr(cfg, section), field, value)
            return recipes.diff(LLAMA_1B, cfg)

        return shrinks(then)

    yield "shrink", shown, {
        "a change that is not listed": shrinks(lambda cfg, changes: changes.iloc[1:]),
        "data of the recipe's length": sets("dataset", "seq_length", 8192),
        "heads of the large model": sets("model", "kv_channels", 64),
    }  # fmt: skip


def trained(*losses, on_rank_0=361_600, tokens=2048):
    """A run of lesson 03: its log and its metrics."""
    counted = f"number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (0, 0, 0): {on_rank_0}"
    return {"run": Some(log=gives(counted), metrics=pd.DataFrame({"loss": losses, "tokens": tokens}))}


def lesson_03():
    """Facts of lesson 03."""
    planned = {"first_loss": 6.957, "parameters": 722_048, "tokens_per_step": 2048}
    cfg = Some(model=Some(num_layers=4, hidden_size=128))
    yield "check", {"cfg": cfg, **planned, **trained(6.97, 6.2)}, {
        "a first loss of another vocabulary": trained(7.6, 6.2),
        "a rank that holds the whole model": trained(6.97, 6.2, on_rank_0=722_048),
        "half a batch": trained(6.97, 6.2, tokens=1024),
        "a learning rate of zero": trained(6.97, 6.97),
    }  # fmt: skip
    yield "check-first-loss", {"others": baselines.known_first_losses(), "baselines": baselines}, {
        "ln V alone": {"baselines": Some(first_loss=lambda ids, *_: math.log(ids))},
        "a narrow model of another vocabulary": {"baselines": Some(first_loss=lambda ids, width, s: math.log(2 * ids))},
    }  # fmt: skip
    table = pd.DataFrame({"step": [1, 2], "loss": [6.96875, 6.5], "grad_norm": [1.25, 1.5]})
    two = Some(run=gives(Some(metrics=table, launch={"device": "cpu"})))
    by_hand = {
        "launch": two, "cfg_two": 0, "two_steps": 2, "printed": table, "by_hand": Some(stderr=""), "runs": runs,
        "throughput": throughput, "place": Some(glob=gives([Path("events.1")])), "on_a_node": "pretrain(cfg, forward_step)",
    }  # fmt: skip
    yield "check-by-hand", by_hand, {
        "a script that failed": {"printed": table[:0]},
        "a script that stopped early": {"printed": table[:1]},
        "another loss": {"printed": table.assign(loss=[6.96875, 6.51])},
        "another gradient": {"printed": table.assign(grad_norm=[1.25, 1.501])},
        "a line that lost its mark": {"on_a_node": "from course_lib import cpu"},
        "TensorBoard's file elsewhere": {"place": Some(glob=gives([]))},
    }  # fmt: skip

    def mock(document):
        """What stands for Megatron's mock data: one document, whose last token is the end."""
        return {"MockGPTLowLevelDataset": gives([document]), "NullTokenizer": gives(None), "vocab_size": 9}

    yield "check-mock", mock([7, 8, 0, 1, 9]), {"other mock data": mock([7, 8, 1, 2, 9])}
    yield "check-real-text", {"run_text": Some(validation=pd.DataFrame({"loss": [6.0, 4.2]})), "unigram": 5.2}, {
        "a run that knows only frequencies": {"unigram": 4.2},
    }  # fmt: skip


LESSONS = {"00": lesson_00, "01": lesson_01, "02": lesson_02, "03": lesson_03}
CELLS = {
    f"{number}:{cell}": (number, cell, facts, wrong.values())
    for number, made in LESSONS.items()
    for cell, facts, wrong in made()
}


@pytest.mark.parametrize("name", CELLS)
def test_each_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """With right facts all claims of the cell hold; for each claim one of the wrong facts makes it fail."""
    falsify(*CELLS[name])


def test_no_check_cell_is_left_out():
    """A new check cell of these lessons needs facts on which it fails."""
    assert {f"{number}:{cell}" for number in LESSONS for cell in tagged(number, "check")} == CELLS.keys()

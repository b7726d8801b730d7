"""Every claim of a check cell of lesson 19 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

from types import SimpleNamespace as Some

import pandas as pd
import pytest

from course_lib import runs, stack
from course_lib.common import config
from course_lib.common.config import ConfigError
from course_lib.experiments import automodel
from course_lib.lesson import tables
from course_lib.planning import messages
from support.lesson_cells import falsify, gives, tagged


def trained(*losses, norm=1.0):
    """A run with these losses."""
    metrics = pd.DataFrame({"step": range(1, 1 + len(losses)), "loss": losses, "grad_norm": norm})
    return Some(metrics=metrics, launch={"device": "cpu"})


def table(*rows):
    """Messages: operation, bytes and count."""
    frame = pd.DataFrame(rows, columns=["operation", "bytes", "count"])
    return frame.assign(phase="forward", group="dp", group_size=8)


def refusing(words):
    """AutoModel's `train`, which refuses with these words."""

    def train(*_, **__):
        raise ConfigError(words)

    return Some(train=train)


def lesson_19():
    """Facts of lesson 19."""
    settings = {"model": {"use_liger_kernel": False}, "step_scheduler": {"local_batch_size": 2}}
    start = {"exported": Some(largest_difference=1e-7, largest_logit=1.0), "tolerance": 1e-5}
    start |= {"automodel": refusing("needs a GPU: Triton"), "settings": settings, "config": config}
    wrong = [{"exported": Some(largest_difference=1e-3, largest_logit=1.0)}, {"tolerance": 0.0}]
    wrong += [{"automodel": refusing("something else")}, {"automodel": Some(train=gives(None))}]
    yield "check-start", start, wrong

    bridge = trained(7.0, 6.5)
    run = {"bridge": bridge, "alone": bridge, "eight": bridge, "steps": 2, "runs": runs, "tolerance": 1e-5}
    run["health"] = Some(symptoms=gives(pd.DataFrame({"verdict": ["ok", "ok"]})))
    wrong = [{"alone": trained(7.0, 6.4)}, {"eight": trained(7.0, 6.5, norm=1.1)}, {"steps": 3}, {"tolerance": 0.0}]
    wrong.append({"health": Some(symptoms=gives(pd.DataFrame({"verdict": ["ok", "look"]})))})
    yield "check-run", run, wrong

    full = table(("all_gather", 400, 1), ("reduce_scatter", 400, 1))
    half = table(("all_gather", 200, 1), ("reduce_scatter", 400, 1))
    narrow = table(("all_gather", 200, 1), ("reduce_scatter", 200, 1))
    eight, default = Some(name="eight"), Some(name="default")

    def recorded(wide, thin):
        return Some(recorded=lambda one: wide if one is eight else thin)

    policy = {
        "in_fp32": True, "moved": pd.Series([1e-4, 3e-4]), "exact": pd.Series([1e-7]), "eight": eight, "default": default,
        "collectives": recorded(full, half),
    }  # fmt: skip
    wrong = [{"moved": pd.Series([1e-6])}, {"collectives": recorded(full, full)}]
    yield "check-policy", policy, [*wrong, {"collectives": recorded(full, narrow)}]

    def row(loss, norm, rate):
        return {"loss from step": loss, "grad_norm from step": norm, "learning_rate from step": rate}

    parted = {
        "order of the data": row(1, 1, None), "first learning rate": row(2, 2, 1), "last learning rate": row(4, 4, 3),
        "stored in bf16": row(5, 1, None), "betas": row(4, 3, None),
        "AutoModel's own Llama": row(None, None, None), "attention": row(None, None, None),
    }  # fmt: skip
    changes = {
        "betas": row(4, 2, None), "stored in bf16": row(5, 5, None),
        "attention": row(5, 5, None), "order of the data": row(2, 1, None),
        "last learning rate": row(4, 4, None),
    }  # fmt: skip
    wrong = [{"parted": parted | {name: row}} for name, row in changes.items()]
    yield "check-undone", {"parted": parted, "in_fp32": True}, wrong

    form = full[[*messages.KEY, "count"]]
    more = form.assign(count=2)
    across = Some(recorded=gives(form), compare=gives(pd.DataFrame({"expected": [1], "recorded": [1]})))
    sent = {
        "copies": bridge, "shapes": {}, "fsdp2_messages": Some(replicas=gives(form)),
        "across": bridge, "bridge": bridge, "bound": 1e-5, "form": form, "messages": messages, "collectives": across,
        "eight": eight, "sent": form, "runs": runs, "stack": stack,
    }  # fmt: skip
    unlike = Some(recorded=gives(form), compare=gives(pd.DataFrame({"expected": [1], "recorded": [2]})))
    wrong = [{"across": trained(7.0, 6.0)}, {"copies": trained(7.0, 6.0)}, {"form": more}, {"collectives": unlike}]
    yield "check-sent", sent, [*wrong, {"fsdp2_messages": Some(replicas=gives(more))}]

    crossing = {"planned": [10.0, 1000.0], "tokens": [1, 100], "flat": 70.0, "whole": {}}
    crossing["fsdp2_messages"] = Some(units=gives([10]))
    wrong = [{"flat": 7.0}, {"flat": 2000.0}, {"fsdp2_messages": Some(units=gives([1]))}]
    yield "check-crossing", crossing, wrong

    def rates(fast, gpus=64):
        common = {"model": "m", "precision": "bf16", "global_batch_size": 512, "seq_length": 4096}
        rows = [{"trainer": "AutoModel", "gpus": 64, "tokens_per_second_per_gpu": fast}]
        rows.append({"trainer": "Megatron-Bridge", "gpus": gpus, "tokens_per_second_per_gpu": 100})
        return pd.DataFrame([one | common for one in rows])

    roads = {"rates": rates(130), "own": {"a", "b"}, "bridged": {"b", "c"}, "tables": tables}
    wrong = [{"rates": rates(101)}, {"rates": rates(130, gpus=8)}, {"own": {"b"}}, {"bridged": {"b"}}]
    yield "check-roads", roads, wrong


CELLS = {cell: (facts, wrong) for cell, facts, wrong in lesson_19()}


@pytest.mark.parametrize("name", CELLS)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """A check that cannot fail proves nothing."""
    falsify("19", name, *CELLS[name])


def test_every_check_cell_is_tried():
    """A new check cell needs facts here."""
    assert set(CELLS) == tagged("19", "check")


def test_runs_part_where_their_numbers_do():
    """Of the loss, of the gradient norm and of the rate; where nothing differs there is no step."""
    columns = {"step": [1, 2, 3], "loss": [7.0, 6.5, 6.0], "grad_norm": [1.0, 1.0, 1.0], "learning_rate": 1e-3}
    one = Some(metrics=pd.DataFrame(columns))
    other = Some(metrics=pd.DataFrame(columns | {"loss": [7.0, 6.5, 6.1], "grad_norm": [1.0, 1.1, 1.0]}))
    found = automodel.parted(one, other, tolerance=1e-5)
    assert (found["loss from step"], found["grad_norm from step"], found["learning_rate from step"]) == (3, 2, None)
    assert found["largest difference"] == pytest.approx(0.1)

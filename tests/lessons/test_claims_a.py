"""Every claim of a check cell of lesson A can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace as Some
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from support.lesson_cells import falsify, gives, tagged


def raises(words):
    """A function that refuses what begins with "bad" by these words, and takes the rest."""

    def look(what, *_, **__):
        if str(what).startswith("bad"):
            raise ValueError(words)
        return Some(lengths=range(10))

    return look


class Deaf:
    """Keeps its value, whatever is assigned."""

    save_interval = 500

    def __setattr__(self, name, value):
        pass


def recipe(*, saves=None):
    """A configuration with a field that its section does not have."""
    return Some(train=Some(save_interval=50), checkpoint=saves or Some(save_interval=500))


def check_fields(cfg):
    """Refuses that configuration."""
    if hasattr(cfg.train, "save_interval"):
        raise ValueError("did you mean cfg.checkpoint.save_interval?")


def hybrid(layers):
    """What Core counts in a pattern."""
    return Some(get_hybrid_total_layer_count=gives(layers))


def blended(which, *_):
    """What the compiled helper does to four samples of two sources."""
    which[:] = [0, 1, 0, 1]


def building(count, *, rooms=3):
    """A museum with so many exhibits, of whose three layers so many have one."""
    layers = ("data", "model", "checkpoint")
    shown = {str(number): Some(layer=layers[number % rooms], sources=(1,)) for number in range(count)}
    return Some(LAYERS=layers, exhibits=gives(shown), Visit=gives(None))


def lesson_a():
    """Facts of lesson A, a room after the other."""
    quiet = Some(quietly=gives(nullcontext()))
    plan = {"plots": MagicMock(), "shelves": MagicMock(), "tempfile": MagicMock(), "Path": Path}
    yield "plan", plan | {"museum": building(15)}, [{"museum": building(14)}, {"museum": building(15, rooms=2)}]
    packages = {
        "place": Some(glob=gives([Path("helpers_cpp.so")])), "torch": torch,
        "helpers": Some(build_blending_indices=blended),
        "hollow": ".", "subprocess": Some(run=gives(Some(stdout="None\n"))),
        "tokenizer": gives(Some(input_ids=[[1]])),
    }  # fmt: skip
    yield (
        "mends-packages",
        packages,
        [
            {"helpers": Some(build_blending_indices=gives(None))},
            {"subprocess": Some(run=gives(Some(stdout="ModuleSpec\n")))},
            {"tokenizer": gives(Some(input_ids=[[0]]))},
        ],
    )
    port = {"torch": Some(distributed=Some(TCPStore=gives(Some(port=2)))), "first": Some(port=1)}
    yield "mends-launch", port, [{"first": Some(port=2)}]
    steps = [gives(Some(load_state_dict=gives(None), lr_decay_steps=number)) for number in (200, 100)]
    configured = {
        "field_values": Some(FieldError=ValueError, check_fields=check_fields),
        "allocation": hybrid(5), "cfg_small": Some(model=Some(hybrid_layer_pattern="", finalize=gives(None))),
        "cfg_experts": Some(model=Some()), "layout": Some(require=gives(Some(tensor_model_parallel_size=2))),
        "schedule": steps[0], "saved": {}, "stack": quiet,
    }  # fmt: skip
    wrong = [
        {"cfg": recipe(saves=Deaf())},
        {"field_values": Some(FieldError=ValueError, check_fields=gives(None))},
        {"allocation": hybrid(6)},
        {"layout": Some(require=gives(Some(tensor_model_parallel_size=1)))},
        {"schedule": steps[1]},
    ]
    # The cell mends its configuration, so each try gets one of its own.
    yield "mends-configuration", configured | {"cfg": recipe()}, [{"cfg": recipe(), **change} for change in wrong]
    decay, left = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 4, 5)
    sums = [(decay[..., None, None] * left[:, :, None]).sum(axis) for axis in (3, 2)]
    begun, transposed = (Some(chunks=gives(Some(decay=decay, left=left, begins=begins))) for begins in sums)
    data = {
        "ids": torch.tensor([7, 1023, 1024]), "embedding": torch.zeros(1024, 4), "torch": torch,
        "layout": Some(padded_vocab_size=gives(1152)),
        "before": [1, 2], "work": Path("."), "text": "t",
        "cut": "bad", "specimens": Some(samples=gives([1, 2]), corpus=gives("good")),
        "microscope": Some(ForeignFile=ValueError, read=raises("cut.bin ends early")),
        "share": gives(0.001), "weights": [0.999, 0.001],
        "losses": torch.ones(2, 2), "mask": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
    }  # fmt: skip
    yield (
        "mends-data",
        data,
        [
            {"embedding": torch.zeros(1025, 4)},
            {"torch": Some(zeros=torch.zeros, nn=Some(functional=Some(embedding=gives(torch.zeros(2, 4)))))},
            {"before": [1]},
            {"microscope": Some(ForeignFile=ValueError, read=gives(Some(lengths=range(9))))},
            {"share": gives(0.1)},
            {"mask": torch.ones(2, 2)},
            {"losses": torch.full((2, 2), float("inf"))},
        ],
    )
    model = {"state_spaces": begun, "torch": torch, "Doubled": object, "squares": gives(np.full(4, 8.0))}
    yield "mends-model", model, [{"state_spaces": transposed}, {"squares": gives(np.full(4, 4.0))}]
    last = Some(step=10, path="saves/iter_0000010")
    saves = {
        "saves": "saves", "like": "model", "stack": quiet,
        "cfg": Some(model=Some(hidden_size=64)), "recipes": Some(offline=nullcontext),
        "checkpoints": Some(latest=gives(last), WrongCheckpoint=ValueError, require=raises("names specimens._run")),
        "AutoBridge": Some(from_auto_config=gives(Some(hf_pretrained=Some(hidden_size=64)))),
        "marker": Some(unlink=gives(None), exists=gives(False)), "theirs": "bad",
    }  # fmt: skip
    unfinished = Some(latest=gives(Some(step=20, path="s")), WrongCheckpoint=ValueError, require=raises("specimens"))
    let_in = Some(latest=gives(last), WrongCheckpoint=ValueError, require=gives(None))
    yield (
        "mends-checkpoint",
        saves,
        [
            {"checkpoints": unfinished},
            {"checkpoints": let_in},
            {"marker": Some(unlink=gives(None), exists=gives(True))},
        ],
    )
    two = {"x": 1, "y": 2}
    end = {
        "visit": Some(cases=two, silent=["x"]), "museum": Some(exhibits=gives(two), sources=gives(None)),
        "tables": Some(full=gives(None)),
    }  # fmt: skip
    yield "exit", end, [{"visit": Some(cases=two, silent=[])}, {"visit": Some(cases={"x": 1}, silent=["x"])}]


CELLS = {cell: (facts, wrong) for cell, facts, wrong in lesson_a()}


@pytest.mark.parametrize("name", CELLS)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """A check that cannot fail proves nothing."""
    falsify("a", name, *CELLS[name])


def test_every_check_cell_is_tried():
    """A new check cell needs facts here."""
    assert set(CELLS) == tagged("a", "check")

"""Every claim of a check cell of lesson A can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace as Some

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


def lesson_a():
    """Facts of lesson A, an exhibit after the other."""
    shown = {"x": Some(sources=(1,))}
    plan = {"count": 17, "museum": Some(exhibits=gives(shown)), "shelf": {"data": ["x"]}}
    yield "check-plan", plan, [{"count": 14}, {"shelf": {"data": []}}]
    built = {
        "place": Some(glob=gives([Path("helpers_cpp.so")])),
        "torch": torch,
        "helpers": Some(build_blending_indices=blended),
    }
    yield "mend-no-makefile", built, [{"helpers": Some(build_blending_indices=gives(None))}]
    hollow = {"hollow": ".", "subprocess": Some(run=gives(Some(stdout="None\n")))}
    yield "mend-hollow-package", hollow, [{"subprocess": Some(run=gives(Some(stdout="ModuleSpec\n")))}]
    yield "mend-gone-method", {"tokenizer": gives(Some(input_ids=[[1]]))}, [{"tokenizer": gives(Some(input_ids=[[0]]))}]
    port = {"torch": Some(distributed=Some(TCPStore=gives(Some(port=2)))), "first": Some(port=1)}
    yield "mend-port-taken", port, [{"first": Some(port=2)}]
    fields = {"cfg": recipe(), "field_values": Some(FieldError=ValueError, check_fields=check_fields)}
    deaf = {"cfg": recipe(saves=Deaf())}
    late = {"cfg": recipe(), "field_values": Some(FieldError=ValueError, check_fields=gives(None))}
    yield "mend-no-such-field", fields, [deaf, late]
    small = {"allocation": hybrid(5), "cfg_small": Some(model=Some(hybrid_layer_pattern="", finalize=gives(None)))}
    yield "mend-pattern-count", small, [{"allocation": hybrid(6)}]
    experts = {"cfg_experts": Some(model=Some()), "layout": Some(require=gives(Some(tensor_model_parallel_size=2)))}
    yield "mend-lone-experts", experts, [{"layout": Some(require=gives(Some(tensor_model_parallel_size=1)))}]
    steps = [gives(Some(load_state_dict=gives(None), lr_decay_steps=number)) for number in (200, 100)]
    schedule = {"schedule": steps[0], "saved": {}, "stack": Some(quietly=nullcontext)}
    yield "mend-longer-schedule", schedule, [{"schedule": steps[1]}]
    ids = torch.tensor([7, 1023, 1024])
    table = {
        "ids": ids,
        "embedding": torch.zeros(1024, 4),
        "torch": torch,
        "layout": Some(padded_vocab_size=gives(1152)),
    }
    fewer = Some(zeros=torch.zeros, nn=Some(functional=Some(embedding=gives(torch.zeros(2, 4)))))
    yield "mend-foreign-id", table, [{"embedding": torch.zeros(1025, 4)}, {"torch": fewer}]
    stale = {"before": [1, 2], "work": Path("."), "text": "t", "specimens": Some(samples=gives([1, 2]))}
    yield "mend-stale-index", stale, [{"before": [1]}]
    cut = {
        "cut": "bad", "specimens": Some(corpus=gives("good")),
        "microscope": Some(ForeignFile=ValueError, read=raises("cut.bin ends early")),
    }  # fmt: skip
    short = Some(ForeignFile=ValueError, read=gives(Some(lengths=range(9))))
    yield "mend-cut-file", cut, [{"microscope": short}]
    yield "mend-tiny-weight", {"share": gives(0.001), "weights": [0.999, 0.001]}, [{"share": gives(0.1)}]
    mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    answer = {"losses": torch.ones(2, 2), "mask": mask}
    yield "mend-no-answer", answer, [{"mask": torch.ones(2, 2)}, {"losses": torch.full((2, 2), float("inf"))}]
    decay, left = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 4, 5)
    sums = [(decay[..., None, None] * left[:, :, None]).sum(axis) for axis in (3, 2)]
    right, wrong = (Some(chunks=gives(Some(decay=decay, left=left, begins=begins))) for begins in sums)
    yield "mend-chunk-border", {"state_spaces": right, "torch": torch}, [{"state_spaces": wrong}]
    view = {"Doubled": object, "squares": gives(np.full(4, 8.0))}
    yield "mend-view-gradient", view, [{"squares": gives(np.full(4, 4.0))}]
    saves = {
        "saves": "saves", "like": "model", "cfg": Some(model=Some(hidden_size=64)), "recipes": Some(offline=nullcontext),
        "checkpoints": Some(latest=gives(Some(step=10, path="saves/iter_0000010"))),
        "AutoBridge": Some(from_auto_config=gives(Some(hf_pretrained=Some(hidden_size=64)))),
    }  # fmt: skip
    yield "mend-unfinished-save", saves, [{"checkpoints": Some(latest=gives(Some(step=20, path="saves/iter_0000020")))}]
    code = {
        "marker": Some(unlink=gives(None), exists=gives(False)), "theirs": "bad",
        "checkpoints": Some(WrongCheckpoint=ValueError, require=raises("names specimens._run")),
    }  # fmt: skip
    let_in = {"checkpoints": Some(WrongCheckpoint=ValueError, require=gives(None))}
    yield "mend-code-in-metadata", code, [let_in, {"marker": Some(unlink=gives(None), exists=gives(True))}]
    end = {"visit": Some(cases={"x": 1, "y": 2}), "museum": Some(exhibits=gives({"x": 1, "y": 2})), "silent": ["x"]}
    yield "check-exit", end, [{"silent": []}]


CELLS = {cell: (facts, wrong) for cell, facts, wrong in lesson_a()}


@pytest.mark.parametrize("name", CELLS)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name):
    """A check that cannot fail proves nothing."""
    falsify("a", name, *CELLS[name])


def test_every_check_cell_is_tried():
    """A new check cell needs facts here."""
    assert set(CELLS) == tagged("a", "check")

"""Every claim of a check cell of lesson 20 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Some

import pandas as pd
import pytest

from course_lib.experiments import lineage
from support.lesson_cells import falsify, gives, tagged

SIZE = {"memory of a GPU, GiB": 20.0}


def scored(value):
    """An estimate with an interval of 0.2 around it."""
    return Some(value=value, low=value - 0.1, high=value + 0.1)


def attempt(**losses):
    """A run that did these steps with these losses, on a CPU."""
    metrics = pd.DataFrame({"step": [int(name[1:]) for name in losses], "loss": losses.values()})
    return Some(metrics=metrics, launch={"device": "cpu"})


def walks(refs):
    """A store whose walk goes over these artifacts."""
    return Some(back=gives(pd.DataFrame({"ref": refs})))


def lesson_20(folder: Path):
    """Facts of lesson 20."""
    (folder / "prose-train.bin").write_bytes(bytes(20))
    kept = pd.DataFrame({"documents": [9, 5], "repetition": [7, 5]})
    text = {"kept": kept, "counted": {"prose-train": 10}, "data": Some(path=folder)}
    yield "check-text", text, [{"kept": kept.assign(repetition=[9, 5])}, {"counted": {"prose-train": 11}}]
    trained = {
        "recipe": Some(model=Some(init_method_std=0.02)), "cfg": Some(model=Some(hidden_size=64)),
        "miniature": Some(VOCAB_SIZE=2048), "baselines": Some(first_loss=gives(7.63)),
        "run": Some(metrics=pd.DataFrame({"loss": [7.6]}), validation=pd.DataFrame({"loss": [5.0]})),
    }  # fmt: skip
    slow = Some(metrics=pd.DataFrame({"loss": [7.6]}), validation=pd.DataFrame({"loss": [7.0]}))
    yield "check-run", trained, [{"baselines": Some(first_loss=gives(7.0))}, {"run": slow}]
    doomed, again = attempt(s40=6.0, s41=5.9), attempt(s41=5.9, s42=5.8)

    def attempts(*both):
        return {"miniature": Some(attempts=gives(both)), "tuned": None, "save_interval": 40}

    early, other = attempt(s40=6.0, s41=5.9), attempt(s41=5.7, s42=5.8)
    wrong = [attempts(doomed, early), attempts(doomed, other)]
    yield "check-killed", attempts(doomed, again), wrong
    losses = {"base": scored(6.0), "tuned": scored(5.0)}
    shares = {"tuned": scored(0.5), "aligned": scored(0.9)}
    worse = [{"losses": losses | {"tuned": scored(5.9)}}, {"shares": shares | {"aligned": scored(0.6)}}]
    yield "check-judge", {"losses": losses, "shares": shares}, worse
    refs = [f"nano3-{name}:v1" for name in ("raw-text", *"abcdefghi")]
    walked = pd.DataFrame({"ref": refs})
    walk = {
        "walked": walked, "scores": Some(ref="x"), "store": Some(back=gives(walked)), "lineage": lineage,
        "theirs": {"name": "x", "version": 1},
    }  # fmt: skip
    wrong = [{"walked": pd.DataFrame({"ref": refs[1:]})}, {"store": Some(back=gives(walked[:3]))}]
    yield "check-walk", walk, [*wrong, {"theirs": {"digest": "d"}}]
    two = ["nano3-aligned-model", "nano3-evaluation"]
    beta = {
        "fine_tune": gives(None), "align": gives(None), "other_beta": 0.3, "judge": gives(Some(ref="x")),
        "walked": walked, "after_beta": two, "store": walks([*refs, *(f"{name}:v2" for name in two)]),
    }  # fmt: skip
    wrong = [{"store": walks(refs)}, {"store": walks(["nano3-sft-model:v2", *(f"{name}:v2" for name in two)])}]
    yield "check-beta", beta, wrong
    yield "check-numbers", {"whole": 31.58e9, "hours": 4e5}, [{"whole": 30e9}, {"hours": 1000.0}]
    names = ("config.yaml", "launch.json", "job.sbatch", "plan.txt")
    for name in names:
        (folder / name).touch()
    plan = {
        "prepared": Some(path=folder), "texts": {"job.sbatch": "", "plan.txt": "[ ] the corpus is read"},
        "inside": "a/config", "scripts": ["run a/config", "srun a/config"], "needs": 20, "room": 70, "plan": SIZE, "size": "1B",
        "passes": 700.0,
    }  # fmt: skip
    elsewhere = {"docker.sh": "", "plan.txt": "[ ] the corpus is read"}
    wrong = [{"texts": elsewhere}, {"scripts": ["run a/config", "run b/config"]}, {"needs": 71}, {"passes": 1.0}]
    yield "check-plan", plan, wrong


NAMES = [
    "check-text",
    "check-run",
    "check-killed",
    "check-judge",
    "check-walk",
    "check-beta",
    "check-numbers",
    "check-plan",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name, tmp_path):
    """A check that cannot fail proves nothing."""
    cells = {cell: (facts, wrong) for cell, facts, wrong in lesson_20(tmp_path)}
    falsify("20", name, *cells[name])


def test_every_check_cell_is_tried(tmp_path):
    """A new check cell needs facts here."""
    assert {cell for cell, _, _ in lesson_20(tmp_path)} == set(NAMES) == tagged("20", "check")

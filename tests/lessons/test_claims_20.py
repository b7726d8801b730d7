"""Every claim of a check cell of lesson 20 can fail: the cell runs on facts made up here, right and wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace as Some
from unittest.mock import MagicMock

import pandas as pd
import pytest

from course_lib.experiments import lineage
from support.lesson_cells import falsify, gives, tagged


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


def changing(folder, walked, *, notices=True, mends=True):
    """A store over one file, which notices that it was changed, and whose walk is whole again when it is put back."""
    place, walks = folder / "code-train.bin", []
    place.write_bytes(b"ids")

    def back(_):
        walks.append(place.read_bytes())
        if notices and walks[-1] != b"ids":
            raise lineage.Changed("code-train.bin is not the file that was published")
        return walked if mends or walks[-1] != b"ids" else walked[:3]

    return {"store": Some(back=back), "miniature": Some(prefix=gives(place.with_suffix("")))}


def lesson_20(folder: Path):
    """Facts of lesson 20."""
    (folder / "prose-train.bin").write_bytes(bytes(20))
    (folder / "blend.json").write_text("{}")
    (folder / "tokens.json").write_text('{"prose-train": 10}')
    other = folder / "other"
    shutil.copytree(folder, other)
    (other / "tokens.json").write_text('{"prose-train": 11}')
    kept = pd.DataFrame({"documents": [9, 5], "repetition": [7, 5]})
    text = dict.fromkeys(("miniature", "curated", "text"))
    text |= {"kept": kept, "store": Some(stage=gives(Some(path=folder)))}
    yield "tokens", text, [{"kept": kept.assign(repetition=[9, 5])}, {"store": Some(stage=gives(Some(path=other)))}]
    drawn = {"plots": MagicMock(), "compare": MagicMock()}

    def trained(loss):
        run = Some(path=folder, metrics=pd.DataFrame({"loss": [7.6]}), validation=pd.DataFrame({"loss": [loss]}))
        return {"miniature": Some(VOCAB_SIZE=2048, settings=gives({}), attempts=gives([run]))}

    learned = drawn | trained(5.0) | {
        "recipe": Some(model=Some(init_method_std=0.02)), "cfg": Some(model=Some(hidden_size=64)), "data": None,
        "store": Some(stage=gives(None)), "baselines": Some(first_loss=gives(7.63)),
    }  # fmt: skip
    yield "run", learned, [{"baselines": Some(first_loss=gives(7.0))}, trained(7.0)]
    doomed, again = attempt(s40=6.0, s41=5.9), attempt(s41=5.9, s42=5.8)

    def attempts(*both):
        return {"miniature": Some(attempts=gives(both), settings=gives({}), killing=gives(None))}

    killed = dict.fromkeys(("base", "pairs", "cfg_tuned", "launch"))
    killed |= {"store": Some(stage=gives(None)), "kill_after": 50, "save_interval": 40}
    early, other = attempt(s40=6.0, s41=5.9), attempt(s41=5.7, s42=5.8)
    yield "killed", killed | attempts(doomed, again), [attempts(doomed, early), attempts(doomed, other)]

    def found(tuned, aligned):
        shares = {"base": scored(0.1), "tuned": scored(0.5), "aligned": scored(aligned)}
        losses = {"base": scored(6.0), "tuned": scored(tuned), "aligned": scored(5.0)}
        return {"found": {name: {"answer loss": losses[name], "passes": shares[name]} for name in losses}}

    drawn["plots"].figure.return_value.__enter__.return_value = (None, None)
    yield "figure", drawn | found(5.0, 0.9), [found(5.9, 0.9), found(5.0, 0.6)]
    refs = [f"nano3-{name}:v1" for name in ("raw-text", *"abcdefghi")]
    walked = pd.DataFrame({"ref": refs})
    walk = {
        "walked": walked, "scores": Some(ref="x"), "data": Some(path=folder), "lineage": lineage,
        "theirs": {"name": "x", "version": 1}, **changing(folder, walked),
    }  # fmt: skip
    wrong = [changing(folder, walked, notices=False), changing(folder, walked, mends=False)]
    yield "changed", walk, [*wrong, {"walked": pd.DataFrame({"ref": refs[1:]})}, {"theirs": {"digest": "d"}}]
    two = ["nano3-aligned-model", "nano3-evaluation"]
    beta = {
        "fine_tune": gives(None), "align": gives(None), "other_beta": 0.3, "judge": gives(Some(ref="x")),
        "walked": walked, "after_beta": two, "store": walks([*refs, *(f"{name}:v2" for name in two)]),
    }  # fmt: skip
    wrong = [{"store": walks(refs)}, {"store": walks(["nano3-sft-model:v2", *(f"{name}:v2" for name in two)])}]
    yield "check-beta", beta, wrong
    known = {"model": Some(config={"vocab_size": 131072})}

    def counted(parameters, rate):
        held = Some(parameters=parameters, expert_parameters=4e9)
        rates = Some(tokens_per_second_per_gpu=pd.Series([rate]))
        return {"memory": Some(states=gives([held])), "tables": Some(published=gives(rates))}

    numbers = {
        "recipes": Some(known_models=gives(known)), "cfg": Some(model=Some(hf_model_id="model")), "pd": pd,
        "recipe": Some(tokenizer=Some()), "evaluation": Some(load=MagicMock()), "base_hf": Some(path=folder), "taught": 9,
        "store": Some(read=gives(Some(metadata={"seconds": 1.0}))), "walked": walked, **counted(3.58e9, 16789),
    }  # fmt: skip
    numbers["evaluation"].load().network.num_parameters.return_value = 500_000
    yield "numbers", numbers, [counted(3e9, 16789), counted(3.58e9, 1e9)]
    plan = {
        "prepared": Some(path=folder), "source": Some(path=folder, digest="d"), "store": Some(verify=gives(Some(digest="d"))),
        "cluster": Some(inside=gives("a/config"), sbatch=gives("srun a/config"), docker_run=gives("run a/config"), secrets=any),
        "miniature": Some(checklist=gives("[ ] the corpus is read")), "needs": 20, "room": 70, "passes": 700.0, "nodes": 1,
        "plan": {"days, at best": 3.0}, "size": "1B", "corpus": "c",
    }  # fmt: skip
    elsewhere = Some(**vars(plan["cluster"]) | {"docker_run": gives("run b/config")})
    yield "write-plan", plan, [{"cluster": elsewhere}, {"needs": 71}]


NAMES = ["tokens", "run", "killed", "figure", "changed", "check-beta", "numbers", "write-plan"]


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_holds_on_right_facts_and_fails_on_wrong_ones(name, tmp_path):
    """A check that cannot fail proves nothing."""
    cells = {cell: (facts, wrong) for cell, facts, wrong in lesson_20(tmp_path)}
    falsify("20", name, *cells[name])


def test_every_check_cell_is_tried(tmp_path):
    """A new check cell needs facts here."""
    assert {cell for cell, _, _ in lesson_20(tmp_path)} == set(NAMES) == tagged("20", "check")

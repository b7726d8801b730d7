"""Every check of lesson 14 can fail: its cell alone, with the numbers of a good run, and with one of them wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from course_lib.common.project import DATA
from course_lib.experiments import aligned, preferences
from course_lib.lesson import tables
from course_lib.reading import evaluation
from course_lib.recipes import blueprint
from course_lib.text import docstrings, tasks
from support.lesson_cells import execute, falsify, gives, tagged

ROW = preferences.Preference("f: def f(x)\n", "Return the value of x.", "Returns the value of x.", "third person")
DPO = ("margin alone", "preferred", "higher beta")
POLICIES = ("fine-tuned", "margin alone", "preferred", "gamed", "with reference")
TEXT = SimpleNamespace(read=gives([]))
KEYS = json.loads((DATA / "nano3_rl_keys.json").read_text(encoding="utf-8"))["rows"]
AS_NANO3 = {name: value for row in KEYS for name, value in row["trl"].items()}


def rows(*some: preferences.Preference) -> dict[str, Any]:
    """What makes these preferences of whatever it gets, and what the cell makes of them."""
    made = {"preferences": SimpleNamespace(preferences=gives(list(some))), "stages": SimpleNamespace(text=gives(TEXT))}
    return made | {"held_out": [], "seed": 1, "separator": "\n", "pd": pd, "tables": tables, "docstrings": docstrings}


def asked(nats_per_token: dict[str, float]) -> SimpleNamespace:
    """An `evaluation` whose loss depends on what a question ends with."""

    def log_probabilities(model: object, pairs: list[tuple[str, str]]) -> pd.DataFrame:
        (question, _), *_ = pairs
        return pd.DataFrame({"nats": [-2 * nats_per_token[question[len("f: def f(x)") :]]], "tokens": [2]})

    return SimpleNamespace(log_probabilities=log_probabilities)


def ended(
    *,
    first: float = math.log(2),
    margin: float = 1.0,
    share: float = 0.95,
    chosen: tuple[float, ...] = (-35.0, -2.0, -19.0),
) -> dict[str, Any]:
    """How the first DPO run begins, and the three end on held-out pairs."""
    table = pd.DataFrame({"rewards_margins": margin, "rewards_accuracies": share, "chosen_nats": chosen}, index=DPO)
    alone = SimpleNamespace(metrics=pd.DataFrame({"loss": [first, 0.6]}))
    return {"ends": table, "pair_of_runs": dict.fromkeys(DPO[:2]), "run_alone": alone, "first_loss": math.log(2)}


def measured(passes: tuple[float, ...], losses: tuple[float, ...]) -> dict[str, Any]:
    """The table of the five models."""
    return {"table": pd.DataFrame({"passes": passes, "answer loss": losses}, index=POLICIES)}


FIRST_SEED = evaluation.seeds().xs(1, level="seed")


def here(**changed: float) -> dict[str, Any]:
    """What the first seed measured, as the lesson has it, with some policy's share that passes changed."""
    table = FIRST_SEED.loc[list(POLICIES), ["passes", "answer loss"]].copy()
    table.loc[list(changed), "passes"] = list(changed.values())
    return {"table": table, "ends": FIRST_SEED.loc[list(DPO), ["chosen nats"]].set_axis(["chosen_nats"], axis=1)}


def spoken(likeliest: int = 9, **changed: int) -> SimpleNamespace:
    """An `evaluation` in which each model has so many words, and at temperature 0 all the same; `_` stands for the space."""
    usual = {"fine-tuned": 200, "gamed": 40, "with reference": 170}
    many = usual | {
        name.replace("_", " ").replace("fine tuned", "fine-tuned"): count for name, count in changed.items()
    }

    def sample(model: str, *_: Any, temperature: float, **__: Any) -> list[str]:
        return [" ".join(f"word{number}" for number in range(many[model] if temperature else likeliest))]

    return SimpleNamespace(Model=lambda *given: given[-1], sample=sample)


def told(reward: float) -> SimpleNamespace:
    """A score that likes the constant sentence that much."""
    return SimpleNamespace(score=lambda text: reward if text == "Return the value." else 0.9)


def config(**changed: Any) -> Any:
    """A `GRPOConfig` that takes what it is given, or something else."""

    def make(**arguments: Any) -> SimpleNamespace:
        made = {"generation_batch_size": 2048, **arguments, **changed}
        return SimpleNamespace(**made)

    make.__dataclass_fields__ = {name: SimpleNamespace(default=None) for name in AS_NANO3}
    return make


RIGHT_PASSES, RIGHT_LOSSES = (0.4, 0.66, 0.81, 0.96, 0.85), (4.7, 6.8, 5.0, 6.3, 5.0)
PAIR = tasks.Pair("f: def f(x)", "Return the value of x.", "m")
TEMPLATE = {
    "held_out": [PAIR], "start": None, "separator": "\n",
    "before": SimpleNamespace(answer_loss=SimpleNamespace(value=4.7)),
    "evaluation": asked({"": 4.7, "\n": 5.1}),
}  # fmt: skip
GAMEABLE = {
    "held_out": [PAIR], "pd": pd, "docstrings": told(1.0), "evaluation": SimpleNamespace(word_f1=gives(0.1)),
}  # fmt: skip
KEYS_FACTS = {
    "GRPOConfig": config(), "place": {}, "as_nano3": AS_NANO3, "blueprint": blueprint, "stage2": pd.DataFrame(KEYS),
    "aligned": aligned, "pd": pd,
}  # fmt: skip
ANSWERS = {
    "held_out": [PAIR], "start": SimpleNamespace(network=None), "gamed": None, "kept": None, "tokenizer": None, "seed": 1,
    "pd": pd, "tables": SimpleNamespace(full=gives(None)), "evaluation": spoken(),
    "table": pd.DataFrame({"distinct": [1.0]}, index=["gamed"]),
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "check-pairs": (
        rows(ROW, ROW),
        [
            rows(ROW, dataclasses.replace(ROW, rejected="returns the value of x")),
            rows(dataclasses.replace(ROW, chosen=ROW.rejected)),
        ],
    ),
    "check-template": (TEMPLATE, [{"separator": "\n\n", "evaluation": asked({"": 4.7, "\n": 5.1, "\n\n\n": 6.0})},
                                  {"evaluation": asked({"": 4.7, "\n": 4.6})}]),
    "check-margins": (ended(), [ended(first=0.68), ended(margin=0.1), ended(share=0.5), *(
        {"ends": ended()["ends"].assign(rewards_margins=[1.0, 0.0, 1.0])},
    )]),
    "check-mend": (
        ended(), [ended(chosen=(-5.0, -1.0, -3.0)), ended(chosen=(-35.0, -30.0, -19.0)), ended(chosen=(-35.0, -2.0, -40.0))],
    ),
    "check-gameable": (GAMEABLE, [{"docstrings": told(0.8)}]),
    "check-keys": (
        KEYS_FACTS,
        [{"stage2": pd.DataFrame(KEYS[:9])}, {"GRPOConfig": config(epsilon_high=0.2)},
         {"GRPOConfig": config(generation_batch_size=1024)}],
    ),
    "check-gamed": (
        measured(RIGHT_PASSES, RIGHT_LOSSES),
        [measured((0.4, 0.66, 0.81, 0.5, 0.85), RIGHT_LOSSES), measured(RIGHT_PASSES, (4.7, 6.8, 5.0, 4.9, 5.0)),
         measured(RIGHT_PASSES, (4.7, 6.8, 5.0, 6.3, 6.3)), measured((0.4, 0.66, 0.81, 0.96, 0.4), RIGHT_LOSSES),
         measured(RIGHT_PASSES, (4.7, 6.8, 6.5, 6.3, 5.0))],
    ),
    "check-answers": (
        ANSWERS,
        [{"evaluation": spoken(likeliest=40)}, {"evaluation": spoken(gamed=250)}, {"evaluation": spoken(gamed=150)},
         {"evaluation": spoken(with_reference=30)},
         {"table": pd.DataFrame({"distinct": [0.1]}, index=["gamed"])}],
    ),
    "check-seeds": (
        here() | {"evaluation": evaluation},
        [here(gamed=0.1), {"ends": pd.DataFrame({"chosen_nats": [-2.0, -2.0, -2.0]}, index=DPO)}],
    ),
}  # fmt: skip
"""Cell, what it reads where all is well, and what is wrong each time."""


@pytest.mark.parametrize("name", CASES)
def test_every_claim_can_fail(name):
    """All claims hold on right facts, and each of them fails on one of the wrong ones."""
    facts, wrong = CASES[name]
    falsify("14", name, facts, wrong)


def test_a_template_that_is_applied_twice_is_told():
    """The words that the whole lesson's broken run meets."""
    from course_lib.lesson import checks

    with pytest.raises(checks.ClaimFailed, match="Is the template applied twice"):
        execute(
            "14", "check-template", TEMPLATE | {"separator": "\n\n", "evaluation": asked({"\n": 5.1, "\n\n\n": 6.0})}
        )


def test_every_check_of_lesson_14_is_broken_at_least_once():
    """No cell that proves something is without a test that makes it fail."""
    assert tagged("14", "check") == CASES.keys()

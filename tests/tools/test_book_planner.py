"""The plans behind the book's planner: what its page shows is what the planner says, for whole choices drawn by a seed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from book.builder import planner
from course_lib.planning import fully_sharded, memory, usable

PLANS = planner.read()
LEVERS = set(planner.LEVERS)
LLAMAS = {"model": "8B", "tp": "2", "pp": "1", "cp": "1", "sp": "on", "micro": "1", "recompute": "nothing"}
LLAMAS |= {"sharding": "distributed optimizer", "precision": "bf16", "gradients": "fp32", "moments": "fp32"}
LLAMAS |= {"kernel": "Transformer Engine"}


def made(choice: dict[str, str]) -> Any:
    """The configuration that the page's lines make in a fresh namespace."""
    from course_lib import recipes, stack

    stack.prepare_imports()
    names: dict[str, Any] = {}
    with recipes.offline():
        exec(planner.code(choice), names)
    return names["cfg"]


def plan_again(choice: dict[str, str]) -> dict[str, int] | str:
    """What the planner says of a whole choice; Megatron FSDP's states are planned beside it."""
    from course_lib.planning.layout import LayoutError

    cfg, sharded = made(choice), choice["sharding"] == planner.SHARDED
    try:
        plan = memory.plan(made(choice | {"sharding": "distributed optimizer"}) if sharded else cfg, ranks=8)
        if not sharded:
            return plan.components | {"whole layers": 0}
        states = fully_sharded.states(cfg, ranks=8)
    except LayoutError as error:
        return " ".join(str(refusal) for refusal in error.refusals)
    except memory.NotPlanned as error:
        return str(error)
    mine = {name: getattr(states, f"{name}_bytes") for name in ("weights", "gradients", "optimizer")}
    return plan.components | mine | {"whole layers": states.total_bytes - states.sharded_bytes}


def drawn(count: int, *, seed: int) -> list[dict[str, str]]:
    """Choices that the file plans, no two of one layout, so that many layouts are among them."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for choice in planner.sample(400, seed=seed):
        if not isinstance(planner.planned(choice, PLANS), str):
            found.setdefault(tuple(choice[name] for name in ("model", "tp", "pp", "cp")), choice)
    return list(found.values())[:count]


@pytest.mark.parametrize("choice", drawn(10, seed=2026), ids=lambda choice: " ".join(choice.values()))
def test_a_plan_of_the_page_is_the_planners(bridge, choice: dict[str, str]) -> None:
    """Parts that were planned alone add up to the whole, byte by byte; if upstream moved, write the file again."""
    assert planner.planned(choice, PLANS) == plan_again(choice)
    room = planner.row_of(choice, PLANS)["usable"][choice["micro"]]
    assert room["usable"] == usable.of(made(choice), ranks=8).usable_bytes


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"tp": "4", "pp": "4"}, "8 ranks cannot be divided"),
        ({"model": "3B", "tp": "1", "sp": "off", "pp": "8"}, "does not divide 28 layers"),
        ({"model": planner.HYBRID, "tp": "2", "pp": "4", "sp": "on"}, "42 layers"),
    ],
)
def test_a_refusal_of_the_page_is_the_planners(bridge, changed: dict[str, str], word: str) -> None:
    """A choice that cannot run or is not planned has the planner's own reason."""
    told = planner.planned(LLAMAS | changed, PLANS)
    assert word in told and told == plan_again(LLAMAS | changed)


def test_a_hybrid_model_is_planned() -> None:
    """The states of 3,973,556,832 parameters are those that Bridge's recipe holds; its activations are counted, too."""
    row = planner.row_of(LLAMAS | {"model": planner.HYBRID, "tp": "1"}, PLANS)
    weights, gradients, optimizer, _ = row["states"]["distributed optimizer"]["bf16"]["fp32"]["fp32"][0]
    assert gradients == 4 * 3_973_556_832 and optimizer == 12 * 3_973_556_832 // 8
    assert weights == pytest.approx(gradients / 2, rel=1e-5)
    kept = row["activations"]["off"]["1"]["bf16"]
    assert kept["every layer"][0][0] < kept["nothing"][0][0] / 4


def test_every_choice_of_the_page_is_in_the_file() -> None:
    """Each has bytes or a reason, and the file was written with the levers of today."""
    assert PLANS["levers"] == planner.LEVERS and set(LLAMAS) == LEVERS
    planned = [planner.planned(choice, PLANS) for choice in planner.sample(2000, seed=1)]
    assert all(isinstance(one, str) and one or sum(one.values()) > 2**30 for one in planned)
    assert sum("refused" not in row for row in PLANS["layouts"]) > 60


def test_the_eight_gpu_plan_and_this_one_agree() -> None:
    """Both files plan 8B at TP=2 alike."""
    from book.builder import plan as eight_gpu_plan

    rows = eight_gpu_plan.read()["plans"]
    row = next(row for row in rows if (row["model"], row["tp"], row["pp"], row["cp"]) == ("8B", 2, 1, 1))
    assert planner.planned(LLAMAS, PLANS) == row["bytes"] | {"whole layers": 0}


def test_a_file_is_written_as_it_was_read(tmp_path) -> None:
    """Writing changes nothing, and the page gets the same data, which no tag inside ends early."""
    path = tmp_path / "plans.json"
    planner.write(PLANS, path)
    assert path.read_bytes() == planner.FILE.read_bytes()
    page = planner.html(PLANS)
    inside = page.partition('id="memory-plans">')[2].partition("</script>")[0]
    assert json.loads(inside) == PLANS and page.endswith("</script>")

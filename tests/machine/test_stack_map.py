"""The map of the stack is a table, and each role in it can be shown."""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Any

import pytest

from course_lib import launch
from course_lib.machine import installation, stack_map
from course_lib.recipes import blueprint


def test_versions_are_those_installed() -> None:
    """The table describes the versions of this environment, each with a file."""
    for box in stack_map.boxes():
        if box.distribution:
            assert installation.version(box.distribution) == box.tested
    assert not stack_map.table()["imported from"].str.contains("not installed").any()


@pytest.mark.parametrize("name", ["Megatron-Bridge", "Megatron-LM", "Nemotron", "NeMo Run"])
def test_a_role_is_shown_by_an_object(bridge: Any, name: str) -> None:
    """The object of a box exists; the lesson imports the other two as well."""
    box = next(box for box in stack_map.boxes() if box.name == name)
    assert stack_map.prove(box).file.endswith(".py")


def test_a_missing_object_is_named() -> None:
    """A proof that fails names the object and the package, in this process and in one of its own."""
    box = dataclasses.replace(stack_map.boxes()[0], module="json", object="nothing")
    for isolated in (False, True):
        with pytest.raises(ImportError, match="json.nothing of NeMo Curator.*make setup"):
            stack_map.prove(dataclasses.replace(box, isolated=isolated))


def test_an_import_without_an_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof in a process of its own that gives no answer is an import error with the system's name, not a hang."""
    box = dataclasses.replace(stack_map.boxes()[0], module="time", object="sleep", isolated=True)
    monkeypatch.setattr(stack_map, "_LIMIT_S", 0.001)
    with pytest.raises(ImportError, match="time.sleep of NeMo Curator.*no answer within 0.001 s"):
        stack_map.prove(box)


def test_flows_and_questions_name_known_systems() -> None:
    """Arrows join boxes, and each system is the answer to at least one of twenty questions, with a reason."""
    names = {box.name for box in stack_map.boxes()}
    assert {end for flow in stack_map.flows() for end in flow[:2]} == names
    asked = stack_map.questions()
    assert len(asked) == 20 and {question.answer for question in asked} == names
    assert all(question.reason.endswith(".") for question in asked)


def test_what_stands_beside_the_map_has_a_stage_and_a_source() -> None:
    """The systems of stages 2 and 3 are stages of the blueprint, and each row says where it was read."""
    table = stack_map.beside()
    assert set(table.stage) <= set(blueprint.stages().stage) and table.source.str.contains(" @ ").all()


def test_the_diagram_links_every_box_to_its_card() -> None:
    """Each box is a link with a hover text, each link has its card on the page, and each arrow its words."""
    diagram, below = stack_map.linked(selected="NeMo Run"), stack_map.cards()
    assert diagram.html.count("border-width: 4px") == 1
    for box in stack_map.boxes():
        anchor = re.search(rf'href="#([^"]+)" title="([^"]+)"[^>]*><b>{box.name}</b>', diagram.html)
        assert anchor and f'id="{anchor[1]}"' in below.html, box.name
        assert html.escape(box.role) in anchor[2]
        assert box.role in repr(below)
    assert all(what in diagram.text for *_, what in stack_map.flows())
    assert f'aria-label="{html.escape(diagram.text)}"' in diagram.html
    assert diagram._repr_html_() == diagram.html and repr(diagram) == diagram.text


def test_no_two_boxes_share_a_place() -> None:
    """Every system of the table has a place of its own in the diagram."""
    places = [stack_map._corner(box.name) for box in stack_map.boxes()]
    assert len(set(places)) == len(places)


def test_a_card_says_all_that_the_table_knows() -> None:
    """Role, entry, artifacts, object, version and file of each system stand on its card."""
    for box in stack_map.boxes():
        text = stack_map.card(box)
        for words in (box.role, box.enters, box.consumes, box.produces, box.object, stack_map.home(box), box.tested):
            assert html.escape(words) in text


def test_clicking_a_box_shows_its_card() -> None:
    """The buttons are laid out as the diagram; the card follows the click, and hovering says the role."""
    grid, card = stack_map.browse().children
    buttons = {part.description: part for part in grid.children if hasattr(part, "tooltip") and part.description}
    assert set(buttons) == {box.name for box in stack_map.boxes()}
    assert len({part.layout.grid_area for part in grid.children}) == len(grid.children)
    assert "WordCountFilter" in card.value and "does not train" in buttons["NeMo Run"].tooltip
    buttons["NeMo Run"].click()
    assert "LocalExecutor" in card.value and "WordCountFilter" not in card.value
    assert buttons["NeMo Run"].style.font_weight == "bold"


def test_ranks_import_only_the_engine() -> None:
    """What a rank imports for training loads nothing of NeMo Run, Curator and AutoModel, nor what they brought along."""
    (modules,) = launch.call("support.loaded:modules", "megatron.bridge.recipes.llama", ranks=1)
    assert "megatron.bridge.training.pretrain" in modules
    assert not {"nemo_run", "nemo_curator", "nemo_automodel", "ray", "torchao", "leptonai"} & modules.keys()

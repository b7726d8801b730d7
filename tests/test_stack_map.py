"""The map of the stack is a table, and each role in it can be shown."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from matplotlib.figure import Figure

from course_lib import installation, plots, stack_map


def test_versions_are_those_installed() -> None:
    """The table describes the versions of this environment, each with a file."""
    for box in stack_map.boxes():
        if box.distribution:
            assert installation.version(box.distribution) == box.tested
    assert not stack_map.table()["imported from"].str.contains("not installed").any()


@pytest.mark.parametrize("name", ["Megatron-Bridge", "Megatron Core", "Nemotron", "NeMo Run"])
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


def test_flows_and_questions_name_known_systems() -> None:
    """Arrows join boxes, and each system is the answer to at least one of twenty questions, with a reason."""
    names = {box.name for box in stack_map.boxes()}
    assert {end for flow in stack_map.flows() for end in flow[:2]} == names
    asked = stack_map.questions()
    assert len(asked) == 20 and {question.answer for question in asked} == names
    assert all(question.reason.endswith(".") for question in asked)


def test_the_map_shows_every_box() -> None:
    """Each system and each arrow stands in the picture and in its words."""
    with plots.style():
        ax = stack_map.draw(ax=Figure().subplots(), selected="NeMo Run")
    written = {text.get_text() for text in ax.texts}
    assert {box.name for box in stack_map.boxes()} <= written
    assert all(what in ax.get_label() for *_, what in stack_map.flows())


def test_choosing_a_system_shows_its_card() -> None:
    """The card follows the button."""
    buttons, card = stack_map.browse().children
    buttons.value = "NeMo Run"
    assert "LocalExecutor" in card.value


def test_ranks_import_only_the_engine() -> None:
    """What a rank imports for training loads nothing of NeMo Run, Curator and AutoModel, nor what they brought along."""
    code = (
        "import sys; from course_lib import stack; stack.prepare_imports()\n"
        "from megatron.bridge.recipes.llama import llama32_1b_pretrain_config\n"
        "from megatron.bridge.training.pretrain import pretrain\n"
        "names = ('nemo_run', 'nemo_curator', 'nemo_automodel', 'ray', 'torchao', 'leptonai')\n"
        "print('loaded:', [name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "loaded: []" in done.stdout

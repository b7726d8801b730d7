"""Wrong answers are wrong for the reason of their rung, the right one stands anywhere, and the harness can read them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from course_lib.text import docstrings, ladder
from course_lib.text.tasks import Choice, Pair

PAIRS = [
    Pair(f"m{n % 3}.f{n}: def f{n}(a)", f"Return the value number {n} of everything.", f"m{n % 3}") for n in range(300)
]
BUILT = SimpleNamespace(
    documents=lambda source, split: [
        {
            "module": f"m{n}",
            "text": "\n".join(f"    value_{n}_{line} = compute(everything)" for line in range(9)) + "\n# no",
        }
        for n in range(2)
    ]
)


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_items_are_fair(rung: str) -> None:
    """Four different options, one of them the docstring, no favoured place, the same items each time."""
    found = ladder.items(rung, PAIRS, BUILT)
    true = {pair.input: pair.output for pair in PAIRS}
    for item in found:
        assert len(set(item.options)) == 4 and item.options[item.answer] == true[item.question]
    places = Counter(item.answer for item in found)
    assert len(places) == 4 and max(places.values()) < 0.4 * len(found)
    assert ladder.items(rung, PAIRS, BUILT) == found


def test_each_rung_is_wrong_in_its_own_way() -> None:
    """The same words; one fault each; code of the question's module, and no item where the module has too little."""
    for item in ladder.items("words_shuffled", PAIRS):
        assert {tuple(sorted(option.split())) for option in item.options} == {tuple(sorted(item.options[0].split()))}
    for item in ladder.items("pep257_fault", PAIRS):
        assert [docstrings.passes(option) for option in item.options].count(True) == 1
    code = ladder.items("code_lines", PAIRS, BUILT)
    assert {item.module for item in code} == {"m0", "m1"}
    for item in code:
        wrong = [option for place, option in enumerate(item.options) if place != item.answer]
        assert all(option.startswith(f"value_{item.module[1:]}_") for option in wrong)


def test_what_cannot_have_such_faults_is_left_out() -> None:
    """A text that is not well formed itself, or too long, or of one word alone."""
    texts = ("returns nothing at all, sadly.", "Return " + "very " * 40 + "much.", "Aaaaaaaaaaaaaaaaaaaaaaaaaaaa.")
    rest = [Pair(f"m.g{n}: def g{n}()", text, "m") for n, text in enumerate(texts)]
    assert ladder.items("pep257_fault", rest) == [] and len(ladder.items("words_shuffled", rest)) == 1


def test_a_wrong_name_or_a_missing_corpus_is_said() -> None:
    """With the names that there are."""
    with pytest.raises(ValueError, match="words_shuffled, code_lines"):
        ladder.items("hardest", PAIRS)
    with pytest.raises(ValueError, match="give built="):
        ladder.items("code_lines", PAIRS)


def test_the_harness_gets_the_end_of_the_document(tmp_path: Path) -> None:
    """Else the option without its period would always be the more likely one: it is the beginning of the other."""
    item = Choice("m.f: def f()", ("Return it.", "Return it", "return it.", "Returns it."), 0, "m")
    for _ in range(2):  # a second time replaces the first
        place = ladder.write_harness_task("faults", [item], tmp_path, end="<|endoftext|>")
    task = yaml.safe_load(place.read_text())
    row = json.loads(Path(task["dataset_kwargs"]["data_files"]["test"]).read_text())
    assert row["options"][1] == "Return it<|endoftext|>" and row[task["doc_to_target"]] == 0
    assert task["task"] == "faults" and {each["metric"] for each in task["metric_list"]} == {"acc", "acc_norm"}


def test_counting_stems_is_no_model() -> None:
    """The option that shares a word's beginning with the question wins, wherever it stands."""
    items = [
        Choice("m.parse_text: def parse_text(a)", ("Parsed text of a.", "Close a file."), place, "m")
        for place in (0, 1)
    ]
    assert ladder.shared_stems(items) == [True, False]

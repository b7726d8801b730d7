"""Pictures of the cuts: each rank has the part that its cut gives it, and says so in words."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from course_lib.figures import cuts, plots
from course_lib.reading import pipeline


def test_the_picture_cuts_what_the_layers_cut():
    """Each of two ranks has a half of A, of the middle and of B, and one summand of the result; x and y are whole."""
    with plots.figure() as ax:
        cuts.matrix(ax=ax)
        area = dict.fromkeys((None, "///"), 0.0)
        for patch in ax.patches:
            if patch.get_fill() and patch.get_facecolor()[3]:
                area[patch.get_hatch()] += patch.get_width() * patch.get_height()
    assert len(ax.patches) == 10 and area[None] == area["///"] == 3 + 1.5 + 3 + 2


def parts(ax) -> Counter:
    """How many blocks each look has; a look is a rank's, or None where nothing is filled."""
    filled = [patch.get_facecolor()[3] > 0 for patch in ax.patches]
    return Counter(patch.get_hatch() if full else "none" for patch, full in zip(ax.patches, filled, strict=True))


def test_a_copy_has_all_layers_and_a_stage_some() -> None:
    """By batch each rank has four layers and two sequences; by layers two layers, and the sequences are nobody's."""
    with plots.figure(columns=2) as axes:
        copies = cuts.batch(ax=axes[0], ranks=2, layers=4, sequences=4)
        stages = cuts.layers(ax=axes[1], ranks=2, layers=4, sequences=4)
        assert parts(copies) == {None: 6, "///": 6} and parts(stages) == {None: 2, "///": 2, "none": 4}
        assert "all 4 layers and 2 of 4 sequences" in plots.describe(copies)
        assert "2 of 4 layers" in plots.describe(stages)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_part_of_a_sequence_is_equal_work(ranks: int) -> None:
    """One early and one late piece make the same number of blocks for each rank."""
    with plots.figure() as ax:
        counted = parts(cuts.sequence(ax=ax, ranks=ranks))
        assert len(counted) == ranks and set(counted.values()) == {2 * ranks + 1}


def test_the_layer_at_work_is_whole_on_every_rank() -> None:
    """A rank's part of it lies on all four; of the two layers at rest each rank has its own part alone."""
    with plots.figure() as ax:
        counted = parts(cuts.shards(ax=ax, ranks=4, layers=3))
        assert len(counted) == 4 and set(counted.values()) == {4 + 2}


def test_the_steps_of_a_pipeline_say_what_is_kept() -> None:
    """A stage keeps as many microbatches as there are stages from it on, at most, and every pass is drawn once."""
    rows = pipeline.replay(pipeline.one_forward_one_backward(3, 5, backward=2))
    page = cuts.pipeline_steps(rows, title="1F1B")._repr_mimebundle_()
    assert page["text/plain"].endswith("stage 0 keeps 3 at most, stage 1 keeps 2 at most, stage 2 keeps 1 at most")
    assert page["text/html"].count("<rect") == len(rows) == 30
    assert max(map(int, re.findall(r"keeps (\d)<", page["text/html"]))) == 3

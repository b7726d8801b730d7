"""The figures of lesson 15: every mark inside its axes, and each number in the words of the picture."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from course_lib.figures import measures
from course_lib.reading.evaluation import Interval, Measures


@pytest.fixture
def axes():
    """Four axes that are gone after the test."""
    figure, four = plt.subplots(1, 4)
    yield four
    plt.close(figure)


def of(passes: float, loss: float, *, distinct: float = 1.0) -> Measures:
    """A model with these measures."""
    share = Interval(passes, max(0.0, passes - 0.05), min(1.0, passes + 0.05), 200)
    return Measures(share, Interval(loss, loss - 0.1, loss + 0.1, 486), Interval(0.1, 0.08, 0.12, 200), distinct, ())


FOUND = {"base": of(0.0, 5.25), "gamed": of(1.0, 6.5, distinct=0.6)}
SEEDS = pd.DataFrame(
    {"passes": [0.01, 0.02, 0.97, 1.0], "answer loss": [5.2, 5.3, 6.0, 7.25], "shared words": 0.1, "distinct": 1.0},
    index=pd.MultiIndex.from_product([["base", "gamed"], [1, 2]], names=["model", "seed"]),
)


def drawn(ax: Any) -> list[float]:
    """The height of every mark, and of the ends of the intervals."""
    heights = [float(y) for line in ax.lines for y in line.get_ydata() if line.get_transform() == ax.transData]
    ends = [vertex[1] for bars in ax.collections for segment in bars.get_segments() for vertex in segment]
    return heights + ends


def assert_whole(ax: Any) -> None:
    """Every mark is inside the axes with its edge, not with its middle alone."""
    low, high = ax.get_window_extent().intervaly
    radius = ax.figure.dpi / 72 * 7 / 2  # marks have 7 points
    for height in drawn(ax):
        middle = ax.transData.transform((0, height))[1]
        assert low <= middle - radius and middle + radius <= high, height


@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["one seed", "with others"])
def test_no_mark_is_cut(axes, seeds):
    """A share of 1 or 0 stands inside its axis with room for the mark, and so does everything else."""
    measures.four(FOUND, axes, seeds=seeds)
    for ax in axes:
        assert_whole(ax)
    assert (min(drawn(axes[0])), max(drawn(axes[0]))) == (0, 1)


def test_the_words_have_every_number(axes):
    """Who cannot see the picture reads value, interval and the other seeds."""
    measures.four(FOUND, axes, seeds=SEEDS)
    loss = axes[1].get_label()
    assert "base has 5.25 [5.15, 5.35] nats/token, 5.2 and 5.3 in 2 seeds" in loss
    assert "gamed has 6.5 [6.4, 6.6] nats/token, 6 and 7.25 in 2 seeds" in loss
    assert "gamed has 0.6 share of answers" in axes[3].get_label()  # no interval
    crosses = [line for line in axes[1].lines if line.get_marker() == "x"]
    assert [list(line.get_ydata()) for line in crosses] == [[5.2, 5.3], [6.0, 7.25]]


def test_a_model_that_has_no_seeds_is_named(axes):
    """A name that the data does not know is an error, not a mark without its crosses."""
    with pytest.raises(KeyError, match="contaminated"):
        measures.four({"contaminated": of(0.5, 5.0)}, axes, seeds=SEEDS)


def test_the_rungs_stand_beside_chance(axes):
    """Each model has one mark on each rung, chance is a line, and a perfect score is whole."""
    shares = {("words_shuffled", "base"): 1.0, ("docstrings", "base"): 0.25, ("words_shuffled", "gamed"): 0.9}
    shares[("docstrings", "gamed")] = 0.3
    right = {key: Interval(value, value - 0.05, min(1.0, value + 0.05), 140) for key, value in shares.items()}
    measures.rungs(right, axes[0], y="items right", chance=0.25)
    assert max(drawn(axes[0])) == 1
    assert_whole(axes[0])
    assert "gamed, docstrings: 0.3 [0.25, 0.35]" in axes[0].get_label()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["chance", "base", "gamed"]
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == ["words_shuffled", "docstrings"]

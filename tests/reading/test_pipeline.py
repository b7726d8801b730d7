"""The bubble of a pipeline: the formula, the replay of recorded passes, and what a real run recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib import launch, runs
from course_lib.figures import parallelism
from course_lib.reading import pipeline
from support.small import config


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 8), (4, 4), (4, 16)])
def test_equal_passes_wait_as_the_formula_says(stages, microbatches):
    """With passes of one length the replay's waiting is exactly (p - 1) / (m + p - 1)."""
    rows = pipeline.replay(pipeline.one_forward_one_backward(stages, microbatches))
    assert pipeline.idle_share(rows) == pytest.approx(pipeline.bubble_share(stages, microbatches))


def test_unequal_stages_wait_longer():
    """A slow stage makes the others wait: the formula is the best case."""
    rows = pipeline.one_forward_one_backward(2, 8)
    rows.loc[rows.stage == 1, "busy_seconds"] = 2.0
    assert pipeline.idle_share(pipeline.replay(rows)) > pipeline.bubble_share(2, 8) + 0.1


def test_by_order_alone_no_clock_changes_the_waiting():
    """With equal stages the waiting is that of the formula, however uneven the recorded times are."""
    rows = pipeline.one_forward_one_backward(2, 8)
    rows["busy_seconds"] += rows.stage + rows.index % 5
    assert pipeline.idle_share(pipeline.replay(rows)) > pipeline.bubble_share(2, 8) + 0.01
    by_order = pipeline.idle_share(pipeline.replay(rows, equal_stages=True))
    assert by_order == pytest.approx(pipeline.bubble_share(2, 8))


def test_another_order_waits_longer():
    """A schedule that ends each microbatch before it begins the next is not 1F1B, and the waiting by order shows it."""
    rows = pipeline.one_forward_one_backward(2, 4).sort_values(
        ["stage", "microbatch", "kind"], ascending=[True, True, False]
    )
    rows = rows.reset_index(drop=True)
    assert pipeline.idle_share(pipeline.replay(rows, equal_stages=True)) == pytest.approx(0.5)


def recorded(path: Path, spans: dict[int, float]) -> runs.Run:
    """A run of two stages whose steps take so many seconds: a forward pass on each stage, and a backward pass."""
    rows = []
    for step, seconds in spans.items():
        times = [
            (1, "forward", 0.25, 0.5),
            (0, "backward", 0.75, 1.0),
            (0, "forward", 0.0, 0.25),
            (3, "forward", 9.0, 9.5),
        ]
        for rank, kind, begin, end in times:
            row = {"rank": rank, "step": step, "kind": kind, "microbatch": 0, "chunk": 0, "busy_seconds": 0.1}
            rows.append(row | {"begin": 1000 * step + begin * seconds, "end": 1000 * step + end * seconds})
    path.mkdir()
    (path / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}
    (path / "config.yaml").write_text(json.dumps({"model": model}))
    (path / "launch.json").write_text(json.dumps({"ranks": 2}))
    return runs.Run(path)


def test_a_typical_step_is_shown_from_its_first_pass_on(tmp_path):
    """The middle one of the steps from the third on; begin and end are seconds since its first pass began."""
    run = recorded(tmp_path / "many", {1: 90.0, 2: 3.0, 3: 5.0, 4: 1.0, 5: 3.0, 6: 2.0, 7: 4.0})
    rows = pipeline.passes(run)
    assert rows[["stage", "kind"]].values.tolist() == [[0, "forward"], [1, "forward"], [0, "backward"]]
    assert rows.begin.tolist() == pytest.approx([0, 0.75, 2.25]) and rows.end.tolist() == pytest.approx([0.75, 1.5, 3])
    assert pipeline.passes(run, step=6).end.max() == pytest.approx(2.0)
    assert pipeline.passes(recorded(tmp_path / "two", {1: 90.0, 2: 3.0})).end.max() == pytest.approx(3.0)


def test_passes_that_cannot_follow_each_other_are_refused():
    """A recording without some passes is named as such, instead of waiting for ever."""
    rows = pipeline.one_forward_one_backward(2, 2)
    with pytest.raises(ValueError, match="not of one whole step"):
        pipeline.replay(rows[(rows.stage == 1) | (rows.kind == "backward")])


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0)])
def test_sizes_below_one_are_refused(sizes):
    """The formula has no meaning without stages or microbatches."""
    with pytest.raises(ValueError, match="at least 1"):
        pipeline.bubble_share(*sizes)


def test_a_real_interleaved_run_can_be_replayed(bridge, runs_directory):
    """A recorded step has every pass once, no stage does two at a time, and each chunk is told apart."""
    from course_lib.figures import plots

    cfg = config(tp=1, pp=2, model__virtual_pipeline_model_parallel_size=2, train__global_batch_size=4)
    run = launch.run(cfg, ranks=2, show=None, record=True)
    rows = pipeline.passes(run)
    assert not rows.duplicated(["stage", "kind", "microbatch", "chunk"]).any() and len(rows) == 2 * 2 * 2 * 4
    for table in (rows, pipeline.replay(rows)):
        for _, stage in table.sort_values("begin").groupby("stage"):
            assert (stage.begin.iloc[1:].to_numpy() >= stage.end.iloc[:-1].to_numpy() - 1e-6).all()
    with plots.figure() as ax:
        parallelism.schedule(rows, ax=ax)
    assert "32 passes on 2 stages" in ax.get_label()


def test_a_run_without_timeline_is_refused(bridge, runs_directory):
    """Reading the passes of an unrecorded run says how to record them."""
    run = launch.run(config(train_iters=1), ranks=2, show=None)
    with pytest.raises(ValueError, match="record=True"):
        pipeline.passes(run)

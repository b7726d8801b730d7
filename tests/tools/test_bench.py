"""The bench measures what it says: both sides of a ratio in one run, and every step of them."""

from __future__ import annotations

import ast
import json

import pytest

from course_lib.lesson import notebooks
from support.small import config
from tests import bench
from tests.bench import step as bench_step


def test_a_figure_is_the_median_of_its_samples():
    """One slow repeat on a busy machine does not decide."""
    found = bench.figure("step", [1.0, 9.0, 2.0], "s", "-", "-", "by hand")
    assert found.value == 2.0 and found.samples == (1.0, 9.0, 2.0)


def test_one_part_is_measured_alone_and_a_wrong_name_is_answered_with_the_right_ones(monkeypatch, capsys):
    """`--only` runs that part and writes no results; an unknown name costs no measurement."""
    monkeypatch.setenv("COURSE_RUNS", "as it was")
    monkeypatch.setattr(bench, "PROJECT", None)  # nothing may be written
    made = bench.figure("step", [1.0], "s", "-", "-", "by hand")
    monkeypatch.setattr(bench, "parts", lambda work: {"step": lambda: [made], "never": lambda: 1 / 0})
    assert bench.main(["step"]) == 0
    assert "by hand" in capsys.readouterr().out
    with pytest.raises(bench.UnknownPart, match="named stop: choose from step, never"):
        bench.main(["stop"])


def test_bridge_hugging_face_and_products_are_measured_in_turn(bridge, tmp_path):
    """Each counted step of Bridge has a step of Hugging Face and a product beside it, and waits for data within."""
    cfg = config(tp=1, train_iters=bench_step.LEFT_OUT + 4)
    cfg.checkpoint.save = cfg.checkpoint.load = cfg.logger.tensorboard_dir = None
    cfg.to_yaml(str(tmp_path / "one.yaml"))
    rows = bench_step.in_one_rank(tmp_path / "one.yaml", threads=1)
    assert len(rows["bridge"]) == len(rows["data"]) == 3, "the last step has no later one that ends it"
    assert len(rows["hugging face"]) == len(rows["matrix"]) == 4
    assert all(0 < waited < step for waited, step in zip(rows["data"], rows["bridge"], strict=True))
    assert min(rows["matrix"]) > 1e8


def test_the_course_run_is_measured_in_the_shape_of_its_lesson():
    """Lesson 08 shows the sizes and the bench repeats them: a change of one is a change of both."""
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(notebooks.find("08").read_text())["cells"]}
    calls = [node for node in ast.walk(ast.parse(cells["config-model"])) if isinstance(node, ast.Call)]
    (shrunk,) = [call for call in calls if getattr(call.func, "attr", "") == "shrink"]
    assert {word.arg: ast.literal_eval(word.value) for word in shrunk.keywords} == bench_step.COURSE
    assert f"vocab_size = {bench_step.VOCAB_SIZE} " in cells["parameters"]
    assert f"micro_batch_size = {bench_step.SEQUENCES // 4}\n" in cells["config-model"]
    assert f"global_batch_size = {bench_step.SEQUENCES}\n" in cells["config-model"]


def test_a_rank_that_fails_is_told_with_its_log(bridge, tmp_path):
    """The end of the log says why there is no answer."""
    (tmp_path / "one.yaml").write_text("model: {}\n")
    with pytest.raises(RuntimeError, match="does not fit Bridge"):
        bench_step.in_one_rank(tmp_path / "one.yaml", threads=1)

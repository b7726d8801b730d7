"""A sweep that was stopped goes on where it stopped, and its wait is not silent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib import launch, runs
from course_lib.common import screen
from course_lib.common.project import LIBRARY
from course_lib.experiments import sweep
from course_lib.text import indexed
from support.small import config


def test_an_interrupted_run_is_trained_again_and_a_finished_one_is_not(bridge, runs_directory, capsys):
    """Real ranks, stopped in the middle of the second seed: the first is kept, the second begins anew."""

    def stop_in_the_second(run: runs.Run) -> None:
        if "seed2" in run.name and len(run.metrics):
            raise KeyboardInterrupt

    cfg = config(train_iters=4, validation__eval_iters=1)
    with pytest.raises(launch.RunInterrupted):
        sweep.repeat(cfg, seeds=[1, 2], name="base", ranks=2, watch=stop_in_the_second)
    capsys.readouterr()
    one, two = sweep.repeat(cfg, seeds=[1, 2], name="base", ranks=2)
    assert [run.name for run in (one, two)] == ["base-seed1", "base-seed2-2"]
    assert [runs.read(name).outcome.status for name in ("base-seed2", two.name)] == ["interrupted", "succeeded"]
    assert len(two.metrics) == 4 and sweep.held_out(one) != sweep.held_out(two)
    words = capsys.readouterr().out
    assert "base, finished before: seed 1 " in words and "seed 2: trained as base-seed2-2" in words


def trained(name: str) -> runs.Run:
    """A run directory as a finished run leaves it."""
    path = runs.create(name)
    (path / "config.yaml").write_text("train: {}\n")
    (path / "validation.jsonl").write_text('{"step": 1, "time": 0, "loss": 5.0}\n')
    return runs.Run(path)


def test_a_failed_run_is_trained_again(bridge, runs_directory, monkeypatch):
    """What ended before the error is kept; the seed that failed, and those after it, are trained."""
    started: list[str] = []

    def train(cfg: object, *, name: str, **options: object) -> runs.Run:
        run = trained(name)
        started.append(run.name)
        if run.name == "base-seed2":
            raise launch.RunFailed(run, runs.Outcome("failed", rank=3, cause="out of memory"))
        return run

    monkeypatch.setattr(sweep.launch, "run", train)
    with pytest.raises(launch.RunFailed):
        sweep.repeat(config(), seeds=[1, 2, 3], name="base")
    found = sweep.repeat(config(), seeds=[1, 2, 3], name="base")
    assert started == ["base-seed1", "base-seed2", "base-seed2-2", "base-seed3"]
    assert [run.name for run in found] == ["base-seed1", "base-seed2-2", "base-seed3"], "in the order of the seeds"


def test_a_run_without_held_out_loss_is_not_called_finished(bridge, runs_directory, monkeypatch):
    """It could not be compared, so the next attempt trains it again."""

    def train(cfg: object, *, name: str, **options: object) -> runs.Run:
        run = trained(name)
        (run.path / "validation.jsonl").unlink()
        return run

    monkeypatch.setattr(sweep.launch, "run", train)
    with pytest.raises(ValueError, match="eval_iters"):
        sweep.repeat(config(), seeds=[1], name="base")
    assert not list(runs_directory.glob("*/sweep.json"))


def test_the_same_data_written_again_is_the_same_data(bridge, tmp_path, monkeypatch):
    """A notebook that is run again writes its text again: contents count; only of large files size and time."""
    cfg = config(tokenizer__tokenizer_model=str(tmp_path / "text"))
    digests = []
    for ids, age in (([1, 2], 100), ([1, 2], 200), ([1, 3], 200)):
        prefix = indexed.write([ids], tmp_path / "text", vocab_size=10, end_of_document=0).prefix
        os.utime(f"{prefix}.bin", (age, age))
        digests.append(sweep.digest(cfg, 8))
    assert digests[0] == digests[1] != digests[2]
    before = sweep.digest(cfg, 8)
    (tmp_path / "text" / "cache").mkdir(parents=True)
    (tmp_path / "text" / "cache" / "shuffle_index.npy").write_bytes(b"what Megatron makes of the data")
    assert sweep.digest(cfg, 8) == before, "a first run leaves its indices beside the data"
    cfg.checkpoint.pretrained_checkpoint = str(tmp_path)
    before = sweep.digest(cfg, 8)
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "weights.distcp").write_bytes(b"other weights")
    assert sweep.digest(cfg, 8) != before, "files below a directory count as well"
    monkeypatch.chdir(tmp_path)
    cfg.tokenizer.tokenizer_model, cfg.checkpoint.pretrained_checkpoint = "text", "x" * 5000
    before = sweep.digest(cfg, 8)
    (tmp_path / "text.idx").write_bytes(b"other")
    assert sweep.digest(cfg, 8) != before, "a path without a slash is one, and a long text is none"
    cfg.tokenizer.tokenizer_model = str(tmp_path / "text")
    monkeypatch.setattr(sweep, "MOST_BYTES_READ", 1)
    before = sweep.digest(cfg, 8)
    os.utime(f"{prefix}.bin", (300, 300))
    assert sweep.digest(cfg, 8) != before


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def told(monkeypatch, capsys):
    """What a terminal would show: a function that returns the lines so far."""
    monkeypatch.setattr(screen, "where", lambda: "terminal")
    return lambda: capsys.readouterr().err.replace("\x1b[K", "").split("\r")


def test_the_wait_says_which_run_and_how_long(told, monkeypatch):
    """Run of how many, seed, step; no estimate before a run has ended, then the mean of those that have."""
    clock = Clock()
    for module in (sweep, screen):
        monkeypatch.setattr(module, "time", clock)
    waiting = sweep._Waiting("base", missing=3)
    run = SimpleNamespace(metrics=range(12), launch={"train_iters": 30}, stage=lambda: "training")
    for seed, seconds in ((1, 10), (2, 20)):
        waiting.begins(seed)
        clock.now += seconds / 2
        waiting.watch(run)
        clock.now += seconds / 2
        waiting.ends("one more")
    waiting.begins(3)
    clock.now += 5
    waiting.watch(run)
    clock.now += 20
    waiting.watch(run)
    waiting.ends("the last")
    waiting.close()
    assert [line.strip() for line in told()[1:]] == [
        "base: run 1 of 3 (seed 1), starting ranks, time left not known yet",
        "base: run 1 of 3 (seed 1), step 12 of 30, time left not known yet",
        "base: run 2 of 3 (seed 2), starting ranks, about 20 s left",
        "base: run 2 of 3 (seed 2), step 12 of 30, about 10 s left",
        "base: run 3 of 3 (seed 3), starting ranks, about 15 s left",
        "base: run 3 of 3 (seed 3), step 12 of 30, about 10 s left",
        "base: run 3 of 3 (seed 3), step 12 of 30, longer than the others",
        "base: 3 of 3 runs trained in 55 s",
    ]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_change_that_diverges_is_no_equal(loss: float) -> None:
    """A loss that is no number is not within the noise."""
    change = sweep.Change("optimizer.lr", 1e-3, 10.0)
    assert sweep.Comparison.of(change, [5.0, 5.1, 5.2], [loss, 5.1, loss]).verdict == "diverged"


def test_the_noise_is_that_of_the_books() -> None:
    """Welch's interval and the paired one, as SciPy has them; equal results have none, and one result has no spread."""
    from scipy import stats

    change, before, after = sweep.Change("optimizer.lr", 1e-3, 1e-4), [5.0, 5.1, 5.3], [5.5, 5.65, 6.1]
    found = sweep.Comparison.of(change, before, after)
    for noise, test in (
        (found.noise, stats.ttest_ind(after, before, equal_var=False)),
        (found.paired_noise, stats.ttest_rel(after, before)),
    ):
        low, high = test.confidence_interval(0.95)
        assert noise == pytest.approx((high - low) / 2, rel=1e-9)
        assert found.difference == pytest.approx((high + low) / 2, rel=1e-9)
    same = sweep.Comparison.of(change, [5.0, 5.0], [5.0, 5.0])
    assert (same.difference, same.noise, same.verdict) == (0.0, 0.0, "no difference beyond noise")
    assert sweep.Comparison.of(change, [5.0, 5.0], [4.5, 4.5]).verdict == "better"
    assert sweep.Comparison(change, (5.0,), (5.5,), difference=0.5, noise=0.5).verdict == "no difference beyond noise"
    with pytest.raises(ValueError, match="2 and 1 results"):
        sweep.Comparison.of(change, [5.0, 5.1], [5.2])


def test_the_last_held_out_loss_counts(runs_directory) -> None:
    """A run that was evaluated twice is compared by its end."""
    run = trained("twice")
    with open(run.path / "validation.jsonl", "a") as file:
        file.write('{"step": 2, "time": 1, "loss": 4.5}\n')
    assert sweep.held_out(runs.Run(run.path)) == 4.5


def test_two_configurations_are_compared_seed_by_seed(monkeypatch) -> None:
    """The first is the base, its results are the first group, and what follows from the change may differ too."""
    asked = []

    def repeat(cfg: dict, **options: object) -> list[float]:
        asked.append((cfg["lr"], options))
        return [cfg["lr"] + seed for seed in options["seeds"]]

    monkeypatch.setattr(sweep, "repeat", repeat)
    monkeypatch.setattr(sweep, "held_out", lambda run: run)
    one, other = {"lr": 1.0, "steps": 4}, {"lr": 4.0, "steps": 2}
    found = sweep.compare(one, other, seeds=[1, 2], name="rate", tied=["steps"])
    assert found.change == sweep.Change("lr", 1.0, 4.0)
    assert (found.before, found.after, found.difference) == ((2.0, 3.0), (5.0, 6.0), 3.0)
    given = {"seeds": [1, 2], "ranks": 8}
    assert asked == [(1.0, given | {"name": "base"}), (4.0, given | {"name": "rate"})]
    with pytest.raises(ValueError, match="zip"):
        _ = sweep.Comparison(found.change, (5.0, 5.1), (5.0, 5.1, 5.2), difference=0.0, noise=1.0).paired_noise
    with pytest.raises(sweep.NotOneChange, match="2 fields differ"):
        sweep.compare(one, other, seeds=[1, 2], name="rate")


def test_what_follows_from_several_fields_is_derived(bridge) -> None:
    """8 ranks at TP=2: four replicas, 16 sequences in micro-batches of 2, so two each a step."""
    cfg = config(train_iters=4, tp=2, train__global_batch_size=16, train__micro_batch_size=2)
    assert sweep._derived(cfg, 8) == {
        "data-parallel size": 4,
        "micro-batches in a step": 2,
        "tokens in a step": 16 * cfg.model.seq_length,
        "sequences in the run": 64,
        "tokens in the run": 64 * cfg.model.seq_length,
    }


def test_another_engine_is_another_run(tmp_path: Path) -> None:
    """A changed file of what a rank executes makes a finished run stale; the same files elsewhere do not."""
    shutil.copytree(LIBRARY, tmp_path, dirs_exist_ok=True)
    assert sweep._engine(tmp_path) == sweep._engine()
    with open(tmp_path / "ranks/cpu/kernels.py", "a") as file:
        file.write("# changed\n")
    assert sweep._engine(tmp_path) != sweep._engine()


def test_the_same_runs_read_crossed_and_paired():
    """Two seeds that lie far apart: crossed they contradict each other, paired both moved by a tenth."""
    one = sweep.Comparison.of(sweep.Change("x", 1, 2), [5.0, 6.0], [5.1, 6.1])
    table = sweep.readings({"x": one})
    assert list(table.index) == ["x, crossed", "x, paired"]
    assert table.loc["x, crossed"].tolist()[:2] == [4, 3] and table.loc["x, paired"].tolist()[:2] == [2, 2]
    assert table.lowest.round(6).tolist() == [-0.9, 0.1] and table.highest.round(6).tolist() == [1.1, 0.1]
    assert table["95% interval, +-"].tolist() == [one.noise, one.paired_noise]

"""A run that some other trainer wrote in a plain process reads like one of Bridge's ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib import runs
from course_lib.common import screen
from course_lib.common.config import ConfigError
from course_lib.figures import live, plots
from course_lib.launch import RunFailed
from course_lib.reading import health
from course_lib.runs import writer

CONFIG = {"learning_rate": 1e-3, "loss_type": ["sigmoid"], "output_dir": Path("here"), "train": "all"}
STEPS = 12


def train(mine: writer.Writer, *, steps: int = STEPS, every: int = 1, **others: float) -> None:
    """A tiny stand-in for a trainer: its loss falls, and it tells each `every`-th step."""
    mine.begin()
    for step in range(1, steps + 1):
        mine.begin_step()
        mine.end_step(step)
        if step % every == 0:
            mine.metrics(step, loss=2 - step / 10, grad_norm=1.0, learning_rate=1e-3, tokens=100 * every, **others)
    mine.validation(steps, loss=1.5)


def recorded(**options: object) -> object:
    """A run of the stand-in trainer."""
    return writer.recording("other", config=CONFIG, train_iters=STEPS, **options)


def test_every_reader_reads_it(runs_directory, monkeypatch, capsys):
    """Tables, outcome, live view, figures and health know no other trainer from Bridge."""
    monkeypatch.setattr(screen, "where", lambda: "terminal")
    monkeypatch.setattr(live, "SECONDS_BETWEEN_LINES", 0.0)
    with recorded(view=live.view(STEPS, name="other"), seed=7) as mine:
        train(mine, rewards_margins=0.5)
    (run,) = runs.listing()
    assert run.outcome.status == "succeeded" and run.warnings == () and run.stage() == "done"
    assert run.config == {"learning_rate": 1e-3, "loss_type": ["sigmoid"], "output_dir": "here", "train": "all"}
    assert run.launch["seed"] == 7 and run.launch["versions"] and run.launch["train_iters"] == STEPS
    assert tuple(run.metrics) == (*runs.COLUMNS["metrics"], "rewards_margins")
    assert run.metrics.tokens.tolist() == [100] * STEPS and (run.metrics.tokens_per_second > 100).all()
    assert len(run.memory) == STEPS + 1 and len(run.steps) == STEPS and run.validation.loss.item() == 1.5
    signs = health.symptoms(run, vocab_size=None)
    assert (signs.verdict == "ok").all() and "first loss" not in " ".join(signs.index)
    with pytest.raises(ValueError, match="has no model.hidden_size and no model.init_method_std.*vocab_size=None"):
        health.symptoms(run, vocab_size=100)
    assert "loss 0.800 nats/token" in capsys.readouterr().err
    assert "from 1.9 at step 1 to 0.8 nats per token" in plots.loss(run).get_label()


def test_a_loss_of_another_unit_is_told_as_such(runs_directory, monkeypatch, capsys):
    """A preference's loss is no loss of a token, and tokens that nobody counted give no rate."""
    monkeypatch.setattr(screen, "where", lambda: "terminal")
    monkeypatch.setattr(live, "SECONDS_BETWEEN_LINES", 0.0)
    with recorded(view=live.view(1, name="pairs"), loss_unit="nats/pair") as mine:
        mine.begin_step()
        mine.end_step(1)
        mine.metrics(1, loss=0.69)
    words = capsys.readouterr().err
    assert "loss 0.690 nats/pair" in words and "tokens/s" not in words and "nan" not in words
    ax = plots.loss(runs.Run(mine.path))
    assert ax.get_ylabel() == "loss (nats per pair)"


def test_a_crash_in_the_middle_leaves_an_outcome_that_says_failed(runs_directory):
    """The error goes on to whoever called, and the run says it too; so does a stop."""
    with pytest.raises(ValueError, match="minus seven"), recorded() as mine:
        train(mine, steps=3)
        raise ValueError("a loss of minus seven is impossible")
    outcome = runs.Run(mine.path).outcome
    assert (outcome.status, outcome.rank, outcome.exception) == ("failed", 0, "ValueError")
    assert outcome.cause == "rank 0 raised ValueError: a loss of minus seven is impossible"
    assert len(runs.Run(mine.path).metrics) == 3
    with pytest.raises(KeyboardInterrupt), recorded() as mine:
        raise KeyboardInterrupt
    assert runs.Run(mine.path).outcome.status == "interrupted"


def test_a_process_that_is_killed_is_not_taken_for_one_that_trains(runs_directory):
    """Nobody writes the last word of a killed process, so the reader says what is known."""
    code = "import os\nfrom course_lib.runs import writer\nwith writer.recording('gone', config={}, train_iters=9) as mine:\n"
    code += "    mine.begin()\n    os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60)
    run = runs.read("gone")
    assert done.returncode == -9 and not (run.path / "outcome.json").exists()
    assert run.outcome.status == "failed" and "is gone without a word" in run.outcome.cause


def test_ranks_write_a_run_of_their_caller(runs_directory):
    """Ranks of a job write where they are told; the caller's frame has the last word, and names the rank that failed."""
    failed = runs.Outcome("failed", 1, "rank 1 raised OSError: disk", "OSError")
    with pytest.raises(RunFailed), recorded(ranks=2) as mine:
        for rank in range(2):
            train(writer.Writer(mine.path, rank=rank, world=2, device="cpu"))
        raise RunFailed(runs.Run(mine.path), failed)
    run = runs.Run(mine.path)
    assert (run.outcome.rank, run.outcome.cause) == (1, failed.cause) and run.outcome.finished
    assert len(run.metrics) == STEPS and len(run.steps) == 2 * STEPS


def test_rows_of_several_steps_have_the_time_and_tokens_of_one(runs_directory):
    """A trainer that tells each fourth step gives rows that compare with those of one that tells each."""
    with recorded() as mine:
        train(mine, every=4)
    metrics = runs.Run(mine.path).metrics
    assert metrics.step.tolist() == [4, 8, 12] and metrics.tokens.tolist() == [100] * 3
    rate = metrics.tokens / (metrics.elapsed_ms / 1e3)
    assert metrics.tokens_per_second.tolist() == pytest.approx(rate.tolist())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model": {"dtype": object()}}, "model.dtype is of type object, which config.yaml cannot hold"),
        ({"hub": {"key": "hf_" + "a" * 30}}, "would hold an access token"),
    ],
)
def test_a_configuration_that_is_no_data_or_no_secret_leaves_nothing(runs_directory, config, words):
    """What cannot be read back, or must not be read by others, is refused with its name."""
    with pytest.raises(ConfigError, match=words), writer.recording("bad", config=config, train_iters=1):
        pass
    assert list(runs_directory.iterdir()) == []


def test_a_column_of_every_run_has_one_meaning(runs_directory):
    """A trainer's own column may not take the name of another."""
    with pytest.raises(ValueError, match="elapsed_ms as a column"), recorded() as mine:
        mine.metrics(1, loss=1.0, elapsed_ms=3.0)


def test_only_the_rank_with_the_loss_writes_the_runs_rows(tmp_path):
    """Each rank has its memory and its own numbers; the last one writes for all."""
    (tmp_path / "ranks").mkdir()
    for rank in range(2):
        mine = writer.Writer(tmp_path, rank=rank, world=2, device="cpu")
        mine.begin()
        mine.metrics(1, loss=1.0 if rank else None, grad_norm=2.0)
        mine.validation(1, loss=1.0)
    run = runs.Run(tmp_path)
    assert len(run.metrics) == len(run.validation) == 1
    assert run.steps["rank"].tolist() == run.memory["rank"].tolist() == [0, 1]


def test_the_writer_needs_the_standard_library_only():
    """A rank imports it at the start, so nothing heavy comes with it."""
    heavy = "{'torch', 'pandas', 'numpy', 'yaml', 'psutil', 'megatron', 'matplotlib'}"
    code = f"import sys; from course_lib.runs import writer; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

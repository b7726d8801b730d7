"""The stages' checkpoints are made once, found by content, and never found where they are not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from course_lib import launch, runs
from course_lib.common.config import changed
from course_lib.experiments import stages
from course_lib.runs import checkpoints
from support.small import config


class Trains(Exception):
    """Stands for a training that would begin."""


def tiny() -> Any:
    return config(train_iters=2, checkpoint__save_interval=2)


def trained(cfg: Any) -> runs.Run:
    return stages.trained(cfg, name="stage", processor_seconds=1.0, ranks=2, show=None)


def test_a_stage_is_trained_once_and_found_only_while_it_is_the_same_and_whole(
    bridge, runs_directory, monkeypatch, tmp_path
):
    """Real ranks train two steps; after that only another content or a torn checkpoint makes anybody train."""

    def interrupted(*_: object, **__: object) -> None:
        (runs.create("stage") / "config.yaml").write_text("train: {}\n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny())
    run = trained(tiny())
    assert run.name == "stage-2" and checkpoints.require(run).step == 2, "the interrupted one is not found"

    def trains(*_: object, **__: object) -> None:
        raise Trains

    monkeypatch.setattr(launch, "run", trains)
    assert trained(tiny()).path == run.path
    monkeypatch.chdir(tmp_path)
    assert trained(tiny()).path == run.path, "a recipe's folders are those of the directory in which it is called"
    with pytest.raises(Trains):
        trained(changed(tiny(), {"rng.seed": 7}))
    shard = next(checkpoints.require(run).path.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(Trains):
        trained(tiny())
    shard.write_bytes(whole)
    assert trained(tiny()).path == run.path


def test_the_text_is_made_once_and_again_when_what_makes_it_changes(runs_directory, monkeypatch):
    """Half a folder is none: an error while it is made leaves nothing that anybody could find."""
    made: list[Path] = []

    def fails(half: stages.Text) -> None:
        half.directory.joinpath("half").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(stages, "_write", fails)
    with pytest.raises(OSError, match="no space"):
        stages.text()
    assert not (runs_directory / "stages-text").exists()
    monkeypatch.setattr(stages, "_write", lambda half: made.append(half.directory))
    stages.text()
    stages.text()
    assert len(made) == 1
    monkeypatch.setattr(stages, "VOCAB_SIZE", 1024)
    stages.text()
    assert len(made) == 2


def test_what_a_first_run_writes_beside_the_pairs_does_not_make_them_others(
    bridge, runs_directory, tmp_path, monkeypatch
):
    """Bridge leaves an index beside each JSONL: the second notebook must still find what the first one trained."""
    monkeypatch.setattr(stages, "_write", lambda half: half.pairs.mkdir())
    data = stages.text()
    (data.pairs / "training.jsonl").write_text("{}\n")
    cfg = stages.fine_tuning(data, runs.Run(tmp_path))
    digest = stages.sweep.digest(cfg, 8)
    for name in ("training.jsonl.idx.npy", "training.jsonl.idx.info"):
        (data.pairs / name).write_bytes(b"lines")
    assert stages.sweep.digest(cfg, 8) == digest
    (data.pairs / "training.jsonl").write_text('{"input": ""}\n')
    assert stages.sweep.digest(cfg, 8) != digest

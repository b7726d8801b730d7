"""A file is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from course_lib import runs
from course_lib.common import files


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """While the new text is written, the old file is what stands under the name."""
    path = tmp_path / "notes.txt"
    files.write_text(path, "old")
    with files.replacing(path) as half:
        half.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_writer_that_stops_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """A full disk or an interrupt in the middle: the old file stays, and no second one lies beside it."""
    path = tmp_path / "notes.txt"
    files.write_text(path, "old")
    with pytest.raises(error), files.replacing(path) as half:
        half.write_text("half", encoding="utf-8")
        raise error
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == "old"


def test_a_full_disk_cuts_a_line_and_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that did not fit is an error for its writer; whoever reads the run gets every whole line."""
    run = runs.Run(tmp_path)
    rows = [f'{{"step": {step}, "loss": {step}.5}}' for step in (1, 2, 3)]
    files.append_lines(run.path / "metrics.jsonl", rows[:1])
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:9]))
        with pytest.raises(OSError, match="No space left") as caught:
            files.append_lines(run.path / "metrics.jsonl", rows[1:2])
    assert "metrics.jsonl" in str(caught.value)
    files.append_lines(run.path / "metrics.jsonl", [rows[2], *rows[1:]])
    assert run.metrics.step.tolist() == [1, 2, 3]


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    """While it is filled the old one stands under the name; nothing else is left beside it."""
    path = tmp_path / "corpus"
    for text in ("old", "new"):
        with files.replacing_folder(path) as half:
            (half / "a.txt").write_text(text, encoding="utf-8")
            assert text == "old" or (path / "a.txt").read_text(encoding="utf-8") == "old"
    assert (path / "a.txt").read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_is_not_whole_is_none(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that stops, or a rename that fails after the old folder was moved away: the old folder stays."""
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "a.txt").write_text("old", encoding="utf-8")
    with pytest.raises(error), files.replacing_folder(path) as half:
        (half / "b.txt").write_text("half", encoding="utf-8")
        raise error
    rename, calls = os.replace, []

    def fails_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise error
        rename(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fails_second)
        with pytest.raises(error), files.replacing_folder(path):
            pass
    assert len(calls) == 3 and [p.name for p in path.iterdir()] == ["a.txt"]
    assert list(tmp_path.iterdir()) == [path]

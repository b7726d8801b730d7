"""What lesson 20's stages leave for others to read: the blend of a folder of tokens, and its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib.experiments import miniature


def test_a_folder_of_tokens_says_its_blend_and_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes and weights for each split, no test data; the tokens are those of the training part alone."""
    monkeypatch.setattr(miniature, "VOCAB_SIZE", 258)
    (tmp_path / "text").mkdir()
    texts = {
        "prose.train": ["ab ab ab"] * 3,
        "code.train": ["x = 1"],
        "prose.validation": ["ab"],
        "code.validation": ["x"],
    }
    for name, some in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (tmp_path / "text" / f"{name}.jsonl").write_text(lines)
    folder = tmp_path / "tokens"
    folder.mkdir()
    miniature.tokens(tmp_path / "text", folder, {"prose": 0.75, "code": 0.25})
    train, validation, test = miniature.blends(folder)
    assert train == ([str(folder / "prose-train"), str(folder / "code-train")], [0.75, 0.25])
    assert validation[0] == [str(folder / "prose-validation"), str(folder / "code-validation")] and test is None
    counted = json.loads((folder / "tokens.json").read_text())
    count, ids = miniature.size(folder)
    assert count == counted["prose-train"] + counted["code-train"]
    assert ids == 258

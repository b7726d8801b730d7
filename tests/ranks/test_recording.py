"""What a rank writes down of its steps."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from course_lib import launch
from course_lib.common.config import assign
from course_lib.text import tokenizers
from support import small


def test_padding_is_not_counted(bridge, runs_directory, tmp_path):
    """Batches of whole samples are padded: a step's tokens are those of its samples, over all data-parallel ranks."""
    from megatron.bridge.data.builders import GPTSFTDatasetConfig, PromptCompletionSFTPreprocessingConfig

    words = [f"{'one two three four'[: 3 + number]} {number}" for number in range(16)]
    data, folder = tmp_path / "data", tmp_path / "tokenizer"
    data.mkdir()
    for part in ("training", "validation"):
        rows = [json.dumps({"input": text, "output": text[:3]}) for text in words]
        (data / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    tokenizers.train_bpe(words * 9, folder, vocab_size=280)
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    cfg = small.config(tp=1, train_iters=2)
    cfg.dataset = GPTSFTDatasetConfig(
        dataset_root=str(data), seq_length=64, do_test=False, dataloader_type="batch", seed=1,
        preprocessing=PromptCompletionSFTPreprocessingConfig(
            prompt_column="input", completion_column="output", separator="\n", loss_mode="completion"),
    )  # fmt: skip
    tokens = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder), "vocab_size": None}
    assign(cfg, {f"tokenizer.{name}": value for name, value in tokens.items()})
    run = launch.run(cfg, ranks=2, name="padded", show=None, record=True)
    seen = run.metrics.tokens
    whole = sum(len(encode(f"{text}\n{text[:3]}").ids) + 1 for text in words)  # one ends a document
    assert seen.sum() == whole and (seen < 8 * 64 / 3).all()
    assert len(run.collectives) == 2 * 2 * 2, (
        "gradients and losses, by rank and step: what counts tokens is no part of it"
    )

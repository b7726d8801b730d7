"""Does curation pay?  A small model on a text with noise, and on the same text without it, for as many tokens; for lesson 18."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import recipes
from course_lib.common.project import DATA
from course_lib.experiments import sweep
from course_lib.planning import vocabulary
from course_lib.text import indexed, planted, tokenizers

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from nemo_curator.stages.text.filters import DocumentFilter

    from course_lib.runs import Run

__all__ = ["HELD_OUT", "RANKS", "bits_per_byte", "collected", "config", "kept", "known", "split", "write"]

HELD_OUT = 140
"""Documents that no run trains on."""
SKIPPED = 400
"""Documents before them, which the lesson's crawl is made of."""
TRAINED = 800
VOCABULARY = 1024
LENGTH = 128
BATCH = 8
RANKS = 2


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Good documents to train on, and clean ones that are held out, of what `planted.prose` returns."""
    held_out = SKIPPED + HELD_OUT
    return list(texts[held_out : held_out + TRAINED]), list(texts[SKIPPED:held_out])


def collected(train: Sequence[str], noise_documents: float) -> list[str]:
    """The good documents, and for each of them so many German ones."""
    return planted.faults(train, each=round(noise_documents * len(train)), kinds=["other language"]).text.tolist()


def kept(one: DocumentFilter, texts: Iterable[str]) -> list[str]:
    """The texts that one of Curator's filters keeps."""
    return [text for text in texts if one.keep_document(one.score_document(text))]


def known(name: str) -> dict[str, Any]:
    """What a file of `data/` holds: its source, and its rows as a table."""
    import pandas as pd

    content = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return content | {"table": pd.DataFrame(content["rows"]).astype(object).fillna("")}


def write(
    parts: Mapping[str, Iterable[str]], folder: Path, *, vocabulary_of: Sequence[str]
) -> dict[str, indexed.Written]:
    """Write each text as `.bin` and `.idx`, all by one tokenizer, which is trained on good text."""
    tokenizers.train_bpe(vocabulary_of, folder / "tokenizer", vocab_size=VOCABULARY)
    encoder = tokenizers.load(folder / "tokenizer")
    return {name: indexed.write_texts(list(one), folder / name, tokenizer=encoder) for name, one in parts.items()}


def config(train: indexed.Written, held_out: indexed.Written, *, steps: int) -> ConfigContainer:
    """Llama 3.2 1B's recipe with every size made small, on one of the texts; the number of tokens follows from the steps.

    Call it after `stack.prepare_imports()`.
    """
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    recipes.shrink(
        cfg,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        seq_length=LENGTH,
    )
    tokenizer = str(train.prefix.parent / "tokenizer")
    cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer)
    cfg.tokenizer.use_tokenizer_vocab_size = True
    cfg.dataset.split = None
    cfg.dataset.blend_per_split = [([str(train.prefix)], None), ([str(held_out.prefix)], None), None]
    cfg.train.train_iters = steps
    cfg.train.global_batch_size = BATCH
    cfg.train.micro_batch_size = BATCH // RANKS
    cfg.optimizer.lr = 6e-3
    cfg.optimizer.min_lr = 0.0
    cfg.scheduler.lr_warmup_iters = 3
    cfg.validation.eval_interval = steps + 1  # once, at the end
    cfg.validation.eval_iters = held_out.tokens // (BATCH * LENGTH)
    cfg.logger.log_interval = 10
    return cfg


def bits_per_byte(run: Run, held_out: indexed.Written) -> float:
    """What the held-out text costs after training."""
    return vocabulary.bits_per_byte(sweep.held_out(run), tokens=held_out.tokens, text_bytes=held_out.text_bytes)

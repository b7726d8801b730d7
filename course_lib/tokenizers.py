"""Tokenizers that are made on the spot, in the form that Megatron reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["END_OF_DOCUMENT", "load", "train_bpe"]

END_OF_DOCUMENT = "<|endoftext|>"


def train_bpe(texts: Iterable[str], directory: Path, *, vocab_size: int) -> Path:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer.

    Byte-level: every text can be encoded and decodes to itself.  The end-of-document token has id 0.

    Args:
        texts: What to learn the merges from.
        directory: Where `tokenizer.json` and its configuration go; the value for
            `TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=...)`.
        vocab_size: Number of ids, at least 257: all bytes and the end of a document.

    Returns:
        The directory.

    Raises:
        ValueError: If the vocabulary is too small for all bytes, or larger than the text has merges for.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level BPE needs at least 257 (256 bytes, end of document)")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: this text only has merges for {tokenizer.get_vocab_size()}; ask for no more"
        )
    directory.mkdir(parents=True, exist_ok=True)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT)
    fast.save_pretrained(str(directory))
    return directory


def load(directory: Path) -> object:
    """The tokenizer of a directory that `train_bpe` wrote: `.encode(text).ids`, `.decode(ids)`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))

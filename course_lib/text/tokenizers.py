"""Tokenizers that are made on the spot, without a login, in the forms that Megatron reads.

Two kinds: a byte-level BPE trained on your own text, and the encoder of Nemotron, whose vocabulary is Mistral's Tekken
file (a dependency carries it) with 1,000 special ids in front.  Both are `tokenizers.Tokenizer` objects once loaded.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.common import files
from course_lib.common.config import Fields

__all__ = [
    "END_OF_DOCUMENT",
    "Nemotron",
    "NoTokenizer",
    "compare_with_hub",
    "end_of_document",
    "load",
    "nemotron",
    "require",
    "tekken_ranks",
    "train_bpe",
]

END_OF_DOCUMENT = "<|endoftext|>"
ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""Names of the token that closes a document in pretraining: of GPT-2, Qwen and OLMo; Llama 3; Llama 2, Mistral and
Nemotron; Gemma; DeepSeek.  Source: the `tokenizer_config.json` of each."""
# What Megatron builds from vocabulary and merge files, or from a prompt format.
_BY_FILES = ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase", "MultimodalTokenizer")
_BY_HUGGING_FACE = ("HuggingFaceTokenizer", "SFTTokenizer")
HUB_MODEL = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


class NoTokenizer(FileNotFoundError):
    """The configuration names a tokenizer that is not on this machine."""


def train_bpe(texts: Iterable[str], directory: Path, *, vocab_size: int) -> Path:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer.

    Byte-level: every text can be encoded and decodes to itself.  The end-of-document token has id 0.

    Args:
        directory: Where `tokenizer.json` and its configuration go; the value for
            `TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=...)`.
        vocab_size: Number of ids, at least 257: all bytes and the end of a document.

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
    return _save(tokenizer, directory, eos_token=END_OF_DOCUMENT)


def load(directory: Path) -> object:
    """The tokenizer of a directory that `train_bpe` or `nemotron` wrote: `.encode(text).ids`, `.decode(ids)`.

    Raises:
        NoTokenizer: If there is no `tokenizer.json` in it.
    """
    from tokenizers import Tokenizer

    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise NoTokenizer(
            f"{file} does not exist: give a directory that tokenizers.train_bpe or tokenizers.nemotron wrote"
        )
    return Tokenizer.from_file(str(file))


def require(cfg: Any) -> None:
    """Refuse a configuration whose tokenizer is not on this machine: a rank does not ask the Hub.

    Args:
        cfg: A Bridge ``ConfigContainer``, or the same as nested mappings.

    Raises:
        NoTokenizer: Names the field, what it says, and how to get the files.

    Source: megatron-core 0.19.2 `tokenizers/utils/build_tokenizer.py`.
    """
    fields = Fields.of(cfg)
    kind, name = (fields.get("tokenizer", f"tokenizer_{part}", "") for part in ("type", "model"))
    files_of = {f"tokenizer.{part}": fields.get("tokenizer", part) for part in ("vocab_file", "merge_file")}
    for field, path in files_of.items():
        if path and not Path(path).exists():
            raise NoTokenizer(f"cfg.{field}={path!r} does not exist: give the path of a file on this machine")
    if not kind.endswith("Tokenizer") or kind.startswith("Null") or (kind in _BY_FILES and not name):
        return
    made = "tokenizers.train_bpe and tokenizers.nemotron write tokenizers without a network"
    if not name:
        raise NoTokenizer(f"cfg.tokenizer.tokenizer_model is not set, and {kind} needs it; {made}")
    if (path := Path(name)).exists():
        if kind in _BY_HUGGING_FACE and path.is_dir() and not any(path.glob("*token*")):
            raise NoTokenizer(f"cfg.tokenizer.tokenizer_model={name!r} is a folder without a tokenizer in it; {made}")
        return
    revision = (fields.get("tokenizer", "hf_tokenizer_kwargs") or {}).get("revision")
    if kind not in _BY_HUGGING_FACE or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise NoTokenizer(f"cfg.tokenizer.tokenizer_model={name!r} does not exist: give a path on this machine; {made}")
    if not _is_cached(name, revision):
        raise NoTokenizer(
            f"cfg.tokenizer.tokenizer_model={name!r} is neither a folder here nor in this machine's cache of the Hugging "
            f"Face Hub, and no rank asks the Hub: run `hf download {name} --include '*token*' config.json` first, set it to "
            f"a folder, or take cfg.tokenizer.tokenizer_type='NullTokenizer' for mock data; {made}"
        )


def _is_cached(repository: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    kept = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in kept)


def end_of_document(tokenizer: object) -> int:
    """The id that closes a document.

    Not always what a model's repository calls `eos`: that of the Nemotron base models names the end of a *chat turn*,
    id 11, whose embedding the base model never trained.

    Args:
        tokenizer: As `load` returns it.

    Raises:
        ValueError: If the vocabulary has no token for it.
    """
    # Only special tokens: Gemma's vocabulary has `</s>` as the HTML tag, too.
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for name in ENDS:
        if name in special:
            return special[name]
    shown = ", ".join(list(special)[:8]) or "none at all"
    raise ValueError(
        f"none of {', '.join(ENDS)} is a special token of this vocabulary, so no token that is known here closes a "
        f"document; its special tokens: {shown}"
    )


@dataclass(frozen=True)
class Nemotron:
    """Nemotron's encoder on disk, in the two forms that Megatron reads.

    Attributes:
        tiktoken: The value for `TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=...)`.
        hugging_face: The same ids as a Hugging Face tokenizer; `load` reads it.
        vocab_size: Number of ids, 131,072.
        special_ids: How many of them, from 0, are no text.
    """

    tiktoken: Path
    hugging_face: Path
    vocab_size: int
    special_ids: int


def nemotron(directory: Path) -> Nemotron:
    """Write Nemotron's encoder, without a network.

    An id is the rank in the Tekken file plus 1,000; the ids below are special tokens, named as Megatron names them.

    Raises:
        RuntimeError: If the installed Tekken file and Megatron do not agree about the pattern that cuts text.

    Source: mistral_common 1.13.1 `data/tekken_240718.json` (Apache-2.0); megatron-core 0.19.2
    `tokenizers/text/libraries/tiktoken_tokenizer.py`.
    """
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as megatron
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tekken = _tekken()
    config, pattern = tekken["config"], megatron._PATTERN_TIKTOKEN_V2
    if config["pattern"] != pattern:
        raise RuntimeError("mistral_common's Tekken pattern is not Megatron's pattern v2: use the pinned versions")
    vocab_size, special_ids = config["default_vocab_size"], config["default_num_special_tokens"]
    entries = tekken["vocab"][: vocab_size - special_ids]
    directory.mkdir(parents=True, exist_ok=True)
    tiktoken = directory / "nemotron.json"
    files.write_text(tiktoken, json.dumps(entries))

    names = [*megatron.SPECIAL_TOKENS]
    names += [megatron.SPECIAL_TOKEN_TEMPLATE.format(id=number) for number in range(len(names), special_ids)]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    ids = dict(zip(names, range(special_ids), strict=True)) | {_spell(t): r + special_ids for t, r in ranks.items()}
    # A tiktoken vocabulary has no list of merges: any two tokens may join if their sum is a token, lowest rank first.
    tokenizer = Tokenizer(models.BPE(ids, _merges(ranks), ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    hugging_face = _save(tokenizer, directory / "hugging-face", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    return Nemotron(tiktoken, hugging_face, vocab_size, special_ids)


def tekken_ranks(texts: Iterable[str]) -> list[list[int]]:
    """The ranks that the Tekken file itself gives, by tiktoken and without Megatron: what an id must be, minus 1,000.

    Returns:
        One list a text.
    """
    import tiktoken

    tekken = _tekken()
    config = tekken["config"]
    entries = tekken["vocab"][: config["default_vocab_size"] - config["default_num_special_tokens"]]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    encoding = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary_batch(list(texts))


def _tekken() -> dict[str, Any]:
    file = importlib.resources.files("mistral_common") / "data" / "tekken_240718.json"
    return json.loads(file.read_text(encoding="utf-8"))


def compare_with_hub(mine: Nemotron, texts: Iterable[str], *, model: str = HUB_MODEL) -> int:
    """With a network: give the same texts to NVIDIA's own tokenizer file from the Hub.

    Returns:
        The number of texts that were compared.

    Raises:
        ValueError: If a text gets other ids; names it and the first id that differs.
    """
    from huggingface_hub import hf_hub_download

    theirs = load(Path(hf_hub_download(model, "tokenizer.json")).parent)
    ours, count = load(mine.hugging_face), 0
    for count, text in enumerate(texts, start=1):  # noqa: B007
        one, other = (each.encode(text, add_special_tokens=False).ids for each in (ours, theirs))
        if one != other:
            where = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(min(one, other)))
            shown = f"here {one[where : where + 3]}, there {other[where : where + 3]}"
            raise ValueError(f"text {count - 1} gets other ids in {model}, first at token {where}: {shown}")
    return count


def _save(tokenizer: object, directory: Path, **special: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(directory))
    return directory


@functools.cache
def _letters() -> dict[int, str]:
    """The printable letter in which byte-level tokenizers store each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _spell(token: bytes) -> str:
    return "".join(map(_letters().__getitem__, token))


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Every pair of tokens whose sum is a token, in the order of the sums' ranks."""
    merges = []
    for token in ranks:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(_spell(left), _spell(right)) for left, right in known]
    return merges

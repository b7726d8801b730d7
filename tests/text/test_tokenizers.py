"""Nemotron's encoder without a network: equal ids in both forms on the whole corpus, the right end of a document."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from course_lib import recipes
from course_lib.common.project import DATA
from course_lib.planning import layout, vocabulary
from course_lib.text import corpus, tokenizers


@pytest.fixture(scope="module")
def nemotron(bridge, tmp_path_factory):
    """The encoder, written once."""
    return tokenizers.nemotron(tmp_path_factory.mktemp("nemotron"))


@pytest.fixture(scope="module")
def megatron(nemotron):
    """The same encoder as Megatron builds it from a configuration."""
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    return build_tokenizer(
        TokenizerConfig(
            tokenizer_type="TikTokenizer",
            tokenizer_model=str(nemotron.tiktoken),
            tiktoken_pattern="v2",
            vocab_size=nemotron.vocab_size,
        )
    )


def test_both_forms_agree_on_the_corpus(nemotron, megatron, built):
    """Every third document gets equal ids from Megatron's TikTokenizer and from Hugging Face, and decodes to itself."""
    texts = [t for source in built.sources for split in corpus.SPLITS for t in built.texts(source, split)][::3]
    texts += [
        "naïve ¿日本語? 𝄞\r\n\t tabs  ",
        "aaaaaaaaaaaaaaaaaaa",
        "0123456789",
        "a </s> in the text, and <SPECIAL_11>",
    ]
    fast = tokenizers.load(nemotron.hugging_face)
    ids = [found.ids for found in fast.encode_batch_fast(texts)]
    assert sum(map(len, ids)) > 500_000
    assert [n for n, text in enumerate(texts) if megatron.tokenize(text) != ids[n]] == []
    assert fast.decode_batch(ids, skip_special_tokens=False) == texts


def test_an_id_is_the_rank_plus_a_thousand(nemotron, megatron):
    """tiktoken on the Tekken file alone gives the ranks; the ids below 1,000 are special, and there are 131,072."""
    text = "Swap the tokenizer."
    assert megatron.tokenize(text) == [rank + 1000 for rank in tokenizers.tekken_ranks([text])[0]]
    assert (nemotron.vocab_size, nemotron.special_ids, megatron.vocab_size) == (131072, 1000, 131072)
    assert tokenizers.load(nemotron.hugging_face).get_vocab_size() == 131072


def test_the_table_of_special_ids_is_what_the_packages_say(nemotron, megatron):
    """Sizes, the first names and the end of a document; the names that a third party reports are beyond this test."""
    table = json.loads((DATA / "nemotron_special_ids.json").read_text())
    assert (table["vocab_size"], table["special_ids"]) == (nemotron.vocab_size, nemotron.special_ids)
    fast = tokenizers.load(nemotron.hugging_face)
    assert all(fast.id_to_token(number) == table["names"][str(number)] for number in range(3))
    assert table["end_of_document"] == megatron.eod != table["eos_of_the_base_repository"]


def test_another_pattern_is_refused(bridge, tmp_path, monkeypatch):
    """If a later Tekken file cuts text in another way than Megatron, nothing is written."""
    changed = tokenizers._tekken()
    changed["config"]["pattern"] += "x"
    monkeypatch.setattr(tokenizers, "_tekken", lambda: changed)
    with pytest.raises(RuntimeError, match="pattern"):
        tokenizers.nemotron(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_end_of_a_document_is_not_the_end_of_a_turn(nemotron, megatron, tmp_path):
    """Id 2 for Nemotron, as Megatron has it, 0 for the BPE; a vocabulary without one is refused."""
    from tokenizers import Tokenizer, models

    assert tokenizers.end_of_document(tokenizers.load(nemotron.hugging_face)) == megatron.eod == 2
    bpe = tokenizers.train_bpe(["some text"], tmp_path, vocab_size=257)
    assert tokenizers.end_of_document(tokenizers.load(bpe)) == 0
    with pytest.raises(ValueError, match="none of <|endoftext|>.*special tokens: none at all"):
        tokenizers.end_of_document(Tokenizer(models.BPE()))


@pytest.mark.parametrize(
    ("special", "plain", "expected"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], [], 1),  # Llama 3; the last one ends a turn
        (["<s>", "</s>"], [], 1),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], 0),
        (["<pad>", "<eos>", "<bos>"], ["<s>", "</s>"], 1),  # Gemma, where `</s>` is text that strikes out
        (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], [], 1),
    ],
)
def test_each_family_closes_a_document_by_a_name_of_its_own(special, plain, expected):
    """The end of a chat turn and a tag that is spelt like an end are not taken for it."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    assert tokenizers.end_of_document(tokenizer) == expected
    chat_only = Tokenizer(models.BPE())
    chat_only.add_special_tokens(["<|eot_id|>"])
    with pytest.raises(ValueError, match=r"its special tokens: <\|eot_id\|>"):
        tokenizers.end_of_document(chat_only)


def test_the_file_on_the_hub_is_held_against_ours(nemotron, tmp_path, monkeypatch):
    """Equal files pass with the number of texts, another vocabulary is named with its first other id."""
    import huggingface_hub

    shutil.copy(nemotron.hugging_face / "tokenizer.json", tmp_path / "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model, name: str(tmp_path / name))
    assert tokenizers.compare_with_hub(nemotron, ["one", "two"]) == 2
    tokenizers.train_bpe(["one"], tmp_path, vocab_size=257)
    with pytest.raises(ValueError, match="text 0 gets other ids"):
        tokenizers.compare_with_hub(nemotron, ["one"])


def test_bits_per_byte_do_not_depend_on_the_cut():
    """Two ways to cut one text into tokens that know equally much have equal bits per byte."""
    assert vocabulary.bits_per_byte(2.0, tokens=500, text_bytes=1000) == pytest.approx(
        vocabulary.bits_per_byte(4.0, tokens=250, text_bytes=1000)
    )
    assert vocabulary.bits_per_byte(math.log(2), tokens=3, text_bytes=4) == pytest.approx(0.75, rel=1e-12)
    assert vocabulary.bits_per_byte(1.0, tokens=1, text_bytes=1) == pytest.approx(1 / math.log(2), rel=1e-12)
    with pytest.raises(ValueError, match="text_bytes=0"):
        vocabulary.bits_per_byte(1.0, tokens=1, text_bytes=0)


def test_the_comparison_counts_every_token(tmp_path):
    """With bytes as tokens a text has as many tokens as bytes, and one for its end."""
    encoder = tokenizers.load(tokenizers.train_bpe(["x"], tmp_path, vocab_size=257))
    row = vocabulary.compare({"bytes": encoder}, ["naïve", "text"]).iloc[0]
    assert (row["ids"], row["tokens"]) == (257, 6 + 1 + 4 + 1)
    assert row["bytes per token"] == pytest.approx(10 / 12, rel=1e-12)
    assert row["even guess, nats/token"] == pytest.approx(math.log(257), rel=1e-12)
    assert row["even guess, bits/byte"] == pytest.approx(math.log2(257) * 12 / 10, rel=1e-12)


def test_padding_is_megatrons(bridge):
    """The table equals what Megatron computes."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    for ids in (1024, 32000, 128256, 131072):
        expected = [calculate_padded_vocab_size(ids, 128, tp, logging_enabled=False) for tp in (1, 2, 4, 8)]
        table = vocabulary.padding({"x": ids})
        assert table.iloc[0].tolist() == ["x", ids, *expected]
        assert table.columns.tolist() == ["vocabulary", "ids", *(f"rows at TP={tp}" for tp in (1, 2, 4, 8))]


def test_the_cost_of_a_swap_is_rows_times_width():
    """Tied embeddings count each row once, untied ones twice; the totals are the known ones of 1B, 3B and 8B."""
    table = vocabulary.swap_cost(128256, 131072, tensor_model_parallel_size=1, data_parallel_size=8)
    assert table.after.tolist() == [1_241_581_568, 3_221_400_576, 8_053_329_920]
    shapes = [recipes.known_models()[name].config for name in vocabulary.DENSE]
    rows = 131072 - layout.padded_vocab_size(128256)
    added = sorted(rows * s["hidden_size"] * (1 if s["tie_word_embeddings"] else 2) for s in shapes)
    assert table.added.tolist() == added
    assert table["added, %"].tolist() == pytest.approx(
        [100 * added / (after - added) for after, added in zip(table.after, table.added, strict=True)], rel=1e-12
    )
    assert table["added per rank, GiB (planned)"].tolist() == pytest.approx(
        [7.5 * number / 2**30 for number in added], rel=1e-12
    )
    two = vocabulary.swap_cost(128256, 131072)  # by default TP=2, so half of the rows, and DP=4: 6 + 12/4 bytes each
    assert two["added per rank, GiB (planned)"].tolist() == pytest.approx(
        [9 / 2 * number / 2**30 for number in two.added], rel=1e-12
    )

"""From text to tokens to a number: the parts that lesson 03 uses, and how they refuse bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from course_lib import launch, runs
from course_lib.experiments import generate
from course_lib.reading import baselines
from course_lib.text import corpus, indexed, tokenizers
from support.small import config


@pytest.fixture(scope="module")
def text():
    """The language reference of this Python."""
    return corpus.language_reference()


def test_the_corpus_is_real_and_its_parts_share_nothing(text):
    """Hundreds of kilobytes, no topic twice, nothing held out that was trained on, and the same at every call."""
    assert sum(map(len, text.train)) > 300_000 and sum(map(len, text.validation)) > 20_000
    topics = [*text.train, *text.validation]
    assert len(set(topics)) == len(topics) and all(topic.strip() for topic in topics)
    assert corpus.language_reference() == text
    with pytest.raises(ValueError, match="validation_percent=0"):
        corpus.language_reference(validation_percent=0)


def test_a_tokenizer_loses_nothing_and_is_reproducible(text, tmp_path):
    """Byte-level: any text decodes to itself; trained again on the same text it gives the same ids."""
    one = tokenizers.load(tokenizers.train_bpe(text.train[:9], tmp_path / "one", vocab_size=400))
    two = tokenizers.load(tokenizers.train_bpe(text.train[:9], tmp_path / "two", vocab_size=400))
    for sample in (*text.validation[:2], "naïve ¿日本語?\n\t tabs"):
        assert one.decode(one.encode(sample).ids) == sample
        assert one.encode(sample).ids == two.encode(sample).ids
    assert one.get_vocab_size() == 400 and one.token_to_id(tokenizers.END_OF_DOCUMENT) == 0


@pytest.mark.parametrize(("vocab_size", "words"), [(256, "at least 257"), (5000, "only has merges for")])
def test_an_impossible_vocabulary_is_refused(tmp_path, vocab_size, words):
    """Too few ids for all bytes, or more than the text has merges for."""
    with pytest.raises(ValueError, match=words):
        tokenizers.train_bpe(["a small text"], tmp_path, vocab_size=vocab_size)


def test_what_is_written_is_what_megatron_reads(bridge, tmp_path):
    """Megatron's own reader finds the documents, each closed, in two bytes a token."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    written = indexed.write([[5, 6], [7]], tmp_path / "text", vocab_size=1000, end_of_document=0)
    assert (written.documents, written.tokens) == (2, 5)
    dataset = IndexedDataset(str(written.prefix))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[5, 6, 0], [7, 0]]
    assert dataset[0].dtype == np.uint16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


@pytest.mark.parametrize("documents", [[], [[1], []], [[1], [1000]], [[-1]]])
def test_bad_documents_leave_nothing_half_written(bridge, tmp_path, documents):
    """An empty document or an id outside the vocabulary is refused, and no file that looks whole remains."""
    with pytest.raises(ValueError, match="document"):
        indexed.write(documents, tmp_path / "text", vocab_size=1000, end_of_document=0)
    assert list(tmp_path.iterdir()) == []


def test_a_unigram_model_is_as_good_as_the_entropy():
    """On many tokens of known frequency its loss is their entropy."""
    tokens = [0] * 9000 + [1] * 1000
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert baselines.unigram_loss(tokens, tokens, vocab_size=2) == pytest.approx(entropy, abs=1e-3)


def test_a_bigram_model_is_one_whose_chances_sum_to_one():
    """Counted by hand: 0 was followed by 1 twice and by 2 once, so two of five parts stay with the unigram model."""
    train = np.array([[0, 1], [0, 1], [0, 2]])
    unigram = {0: 1 / 7, 1: 3 / 7, 2: 2 / 7, 3: 1 / 7}
    counted = {1: 2, 2: 1}
    chances = {token: (counted.get(token, 0) + 2 * unigram[token]) / 5 for token in unigram}
    assert sum(chances.values()) == pytest.approx(1)
    for token, chance in chances.items():
        one = np.array([[0, token]])
        assert baselines.bigram_loss(train, one, vocab_size=4) == pytest.approx(-math.log(chance))
    unseen = baselines.bigram_loss(train, np.array([[3, 1]]), vocab_size=4)
    assert unseen == pytest.approx(-math.log(unigram[1])), "a token that never came first has only the unigram model"


def test_a_bigram_model_sees_the_order_and_a_unigram_model_does_not():
    """On shuffled labels both are worth the same; on a counting sequence only the bigram model is."""
    ids = np.arange(4000) % 16
    straight = np.stack([ids, (ids + 1) % 16], axis=1)
    shuffled = np.stack([ids, np.random.default_rng(0).permutation(ids)], axis=1)
    unigram = baselines.unigram_loss(ids.tolist(), ids.tolist(), vocab_size=16)
    assert baselines.bigram_loss(straight, straight, vocab_size=16) < 0.05 < unigram
    assert baselines.bigram_loss(shuffled, shuffled, vocab_size=16) == pytest.approx(unigram, rel=0.03)


@pytest.mark.parametrize("wrong", [np.zeros((0, 2), int), np.zeros(4, int), np.array([[0, 9]]), np.array([[-1, 0]])])
def test_pairs_that_are_none_are_refused(wrong):
    """The message says what was given."""
    good = np.array([[0, 1]])
    with pytest.raises(ValueError, match="validation has"):
        baselines.bigram_loss(good, wrong, vocab_size=4)
    with pytest.raises(ValueError, match="train has"):
        baselines.bigram_loss(wrong, good, vocab_size=4)


def test_generating_without_a_checkpoint_is_refused(tmp_path):
    """The message says how to get one."""
    with pytest.raises(FileNotFoundError, match="save=True"):
        generate.texts(runs.Run(tmp_path), ["x"])


FIRST_LOSSES = baselines.known_first_losses()


@pytest.mark.parametrize("row", FIRST_LOSSES["published"] + FIRST_LOSSES["measured"], ids=lambda row: row["name"])
def test_a_first_loss_is_ln_v_and_the_spread_of_the_logits(row):
    """NVIDIA's and ours lie within 0.04 of the formula, and ln V alone misses every wide model by a tenth or more."""
    expected = baselines.first_loss(row["vocab_size"], row["hidden_size"], row["init_method_std"])
    assert row["source"] and row["first_loss"] == pytest.approx(expected, abs=0.04)
    assert row["hidden_size"] < 1000 or row["first_loss"] - math.log(row["vocab_size"]) > 0.1


@pytest.mark.parametrize("row", FIRST_LOSSES["measured"], ids=lambda row: row["name"])
def test_a_fresh_model_starts_where_the_data_say(row, bridge, runs_directory):
    """One step of Megatron's own model at this width, on one rank, has the loss that `data/first_loss.json` holds."""
    cfg = config(
        tp=1,
        train_iters=1,
        model__num_layers=1,
        model__hidden_size=row["hidden_size"],
        model__share_embeddings_and_output_weights=False,
        tokenizer__vocab_size=row["vocab_size"],
        train__global_batch_size=16,
        train__micro_batch_size=8,
    )
    run = launch.run(cfg, ranks=1, show=None)
    assert run.metrics.loss.iloc[0] == pytest.approx(row["first_loss"], abs=0.02)

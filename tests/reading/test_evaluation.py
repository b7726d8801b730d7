"""Measures of a model and how sure they are, on models whose answers are known beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from course_lib.reading import evaluation
from course_lib.text import tokenizers
from course_lib.text.tasks import Choice, Pair

PAIRS = [Pair(f"m.f{n}: def f{n}(a)", "Return the value of a." + " It is long." * (n % 3), "m") for n in range(24)]


@pytest.fixture(scope="module")
def folder(bridge: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights in Hugging Face's format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("random")
    tokenizers.train_bpe([f"{pair.input}\n{pair.output}" for pair in PAIRS], place, vocab_size=280)
    torch.manual_seed(0)
    sizes = {"vocab_size": 280, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=0)
    LlamaForCausalLM(shape).save_pretrained(place)
    return place


@pytest.fixture
def model(folder: Path) -> evaluation.Model:
    """Fresh, because a test may change its weights."""
    return evaluation.load(folder)


@pytest.fixture
def even(model: evaluation.Model) -> evaluation.Model:
    """A model to which all 280 tokens are always equally likely."""
    model.network.lm_head.weight.data.zero_()
    return model


def test_an_even_model_costs_the_logarithm_of_its_vocabulary(even: evaluation.Model) -> None:
    """Nats per token of an answer, whose end counts and whose question does not; bits per byte of a text in windows."""
    found = evaluation.answer_loss(even, PAIRS)
    assert (found.value, found.low, found.high) == pytest.approx((math.log(280),) * 3) and found.n == len(PAIRS)
    row = evaluation.log_probabilities(even, [("what?", "Return it.")]).iloc[0]
    counted = len(even.tokenizer("\nReturn it.")["input_ids"]) + 1
    assert row.tokens == counted and row.nats == pytest.approx(-counted * math.log(280)) and row.characters == 10
    texts = ["Return the value of a. " * 9, "def f1(a)"]
    tokens = sum(len(even.tokenizer(text)["input_ids"]) + 1 for text in texts)
    expected = tokens * math.log2(280) / sum(len(text.encode()) for text in texts)
    for window in (7, 1000):
        assert evaluation.bits_per_byte(even, texts, window=window) == pytest.approx(expected)


def test_padding_changes_no_probability(model: evaluation.Model) -> None:
    """Rows of other lengths in one batch, on the right for scores and on the left for samples."""
    rows = [(pair.input, pair.output) for pair in PAIRS]
    alone, together = (evaluation.log_probabilities(model, rows, batch=batch).nats for batch in (1, 24))
    assert np.allclose(alone, together, atol=1e-4)
    asked = [pair.input + " " * n for n, pair in enumerate(PAIRS[:6])]
    greedy = [evaluation.sample(model, asked, temperature=0, new_tokens=6, batch=batch) for batch in (1, 6)]
    assert greedy[0] == greedy[1]


def test_samples_are_those_of_their_seed(model: evaluation.Model) -> None:
    """The same seed writes the same, another one something else, and the process's own dice stay where they are."""
    import torch

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    asked = [pair.input for pair in PAIRS]
    one, again, other = (evaluation.sample(model, asked, new_tokens=8, seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other and torch.equal(before, torch.random.get_rng_state())


def test_the_normalisation_decides(even: evaluation.Model) -> None:
    """To an even model the shortest option wins by the sum, the one of long tokens per character; per token all are equal."""
    choices = [Choice("m.f1: def f1(a)", ("zq", "Return the value of a.", "zqzqzqzqzqzqzqzq", "zqz"), 0, "m")] * 3
    found = evaluation.choose(even, choices)
    assert list(found.columns) == list(evaluation.NORMALISATIONS)
    assert found["sum"].tolist() == [True] * 3 and found["per character"].tolist() == [False] * 3


def test_measures_put_the_four_together(model: evaluation.Model) -> None:
    """Samples of the first questions, the loss of all pairs, and a checker of one's own."""
    found = evaluation.measure(model, PAIRS, samples=6, passes=lambda text: True)
    assert found.pass_rate.value == 1 and found.pass_rate.n == 6 == len(found.answers) == found.word_f1.n
    assert found.answer_loss.n == 24 and found.answer_loss.low < found.answer_loss.value < found.answer_loss.high
    assert 0 < found.distinct <= 1


def test_intervals_are_those_of_the_books() -> None:
    """Wilson's of 5 in 10 (Newcombe 1998 gives 0.2366 to 0.7634), and Student's of three numbers."""
    found = evaluation.proportion([True] * 5 + [False] * 5)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.5, 0.2366, 0.7634)
    assert evaluation.proportion([False] * 20).low == 0 and evaluation.proportion([False] * 20).high > 0.1
    assert evaluation.mean([2.0, 4.0, 6.0]).high == pytest.approx(4 + 4.303 * 2 / math.sqrt(3), rel=1e-3)


def test_words_in_common_are_counted_once() -> None:
    """Three of three and of four words: precision 1, recall 3/4; the order, the case and repetitions do not matter."""
    assert evaluation.word_f1("Two one, two three.", "three ONE two four") == pytest.approx(2 * 0.75 / 1.75)
    assert evaluation.word_f1("one", "One!") == 1
    assert evaluation.word_f1("one", "two") == 0


def test_only_items_on_which_models_disagree_count() -> None:
    """One lost and eight won: twice (1 + 9) / 512; no disagreement says nothing; unequal items are refused."""
    one = [True] + [False] * 8 + [True] * 91
    other = [False] + [True] * 8 + [True] * 91
    found = evaluation.paired(one, other)
    assert (found.only_first, found.only_second, found.n) == (1, 8, 100)
    assert found.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert evaluation.paired(one, one).p_value == 1
    with pytest.raises(ValueError, match="the same items"):
        evaluation.paired(one, other[:50])


def test_the_number_of_items_is_the_one_that_sees_the_difference() -> None:
    """A test with that many items sees it in four of five trials: simulated, with the same numbers each time."""
    first, second = 0.25, 0.40
    n = evaluation.items_needed(first, second)
    dice = np.random.default_rng(0)
    rates = dice.binomial(n, (first, second), size=(4000, 2)) / n
    middle = rates.mean(1)
    seen = np.abs(rates[:, 1] - rates[:, 0]) > 1.96 * np.sqrt(2 * middle * (1 - middle) / n)
    assert seen.mean() == pytest.approx(0.8, abs=0.03)
    assert evaluation.visible_difference(first, n) == pytest.approx(second - first, abs=0.002)
    assert math.isnan(evaluation.visible_difference(0.9, 2))
    with pytest.raises(ValueError, match="two different numbers"):
        evaluation.items_needed(0.3, 0.3)


def test_a_merged_adapter_moves_the_base_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    """Rank 2 on queries and values: 2 x (16 + 16) weights each, in two layers; the product is added, and then stays."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    thin = get_peft_model(evaluation.load(folder).network, settings)
    with torch.no_grad():
        for name, weight in thin.named_parameters():
            if "lora_" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    thin.save_pretrained(tmp_path)
    plain = evaluation.load(folder)
    by_hand = plain.network.state_dict()["model.layers.1.self_attn.q_proj.weight"].clone()
    layer = thin.base_model.model.model.layers[1].self_attn.q_proj
    by_hand += 4 / 2 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    model, merge = evaluation.merged(folder, tmp_path, PAIRS[0].input)
    found = model.network.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert torch.allclose(found, by_hand, atol=1e-6) and merge.parameters == 2 * 2 * 2 * (16 + 16)
    ids = plain.tokenizer(PAIRS[0].input, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        moved = (model.network(ids).logits - plain.network(ids).logits).abs().max()
        largest = model.network(ids).logits.abs().max()
    assert (merge.moved, merge.largest) == pytest.approx((float(moved), float(largest)), rel=1e-4)
    assert 0 <= merge.difference < 1e-5 * merge.largest < merge.moved


def test_the_judge_prefers_by_likelihood(even: evaluation.Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an even model fewer tokens are likelier: it prefers a docstring to its fault where that one is longer."""
    pairs = [Pair(f"m.f{n}: def f{n}(a)", "Return the value of a as a number.", "m") for n in range(12)]
    monkeypatch.setattr(evaluation, "load", lambda folder: even)
    found = evaluation.judged({"even": folder}, pairs)["even"]
    rows = evaluation.preferences.preferences(pairs, seed=1)
    longer = [
        len(even.tokenizer(row.rejected)["input_ids"]) > len(even.tokenizer(row.chosen)["input_ids"]) for row in rows
    ]
    assert found["preferred"].value == sum(longer) / 12 and 0 < sum(longer) < 12
    assert found["answer loss"].value == pytest.approx(math.log(280)) and found["passes"].n == 12


def test_seeds_are_read_as_shares_with_the_test_against_the_model_before(tmp_path: Path) -> None:
    """Counts become shares, a base has no test, and five won of five are as rare as a coin says: 2 in 32."""
    loss = [5.0, 4.9, 5.1]
    rungs = {"docstrings": {"n": 8, **dict.fromkeys(evaluation.NORMALISATIONS, [4, 0, 5])}}
    first = {
        "seed": 1,
        "model": "base",
        "passes": 1,
        "answers": 4,
        "answer loss": loss,
        "shared words": [0.1, 0.0, 0.2],
    }
    rows = [first, first | {"model": "fine-tuned", "passes": 3, "lost": 0, "won": 5, "rungs": rungs}]
    (tmp_path / "alignment_seeds.json").write_text(json.dumps({"rows": rows}))
    table = evaluation.seeds(directory=tmp_path)
    assert table.loc[("fine-tuned", 1), ["passes", "answer loss", "shared words"]].tolist() == [0.75, 5.0, 0.1]
    assert table.p_value[("fine-tuned", 1)] == 2 / 32 and math.isnan(table.p_value[("base", 1)])
    of_rungs = evaluation.seeds_of_rungs(directory=tmp_path)
    assert len(of_rungs) == 3
    row = of_rungs.loc[("docstrings", "per token", "fine-tuned", 1)]
    assert (row.right, row.n, row.share, row.won, row.p_value) == (4, 8, 0.5, 5, 2 / 32)


def test_the_harness_starts_no_other_program(monkeypatch, tmp_path, capfd):
    """Where the course was copied without its history, git's complaint would stand in the learner's cell."""
    import lm_eval

    def evaluate(**_):
        return lm_eval.evaluator.get_git_commit_hash(), lm_eval.evaluator.add_env_info({})

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.chdir(tmp_path)
    assert evaluation.harness(tmp_path, [], tmp_path) == (None, None)
    assert "git" not in capfd.readouterr().err

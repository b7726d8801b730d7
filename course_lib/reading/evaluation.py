"""How good is a model that writes docstrings?  Measures of an exported model, and how sure one can be of them.

Everything is taken from a Hugging Face folder in a plain process, so that a base, a fine-tuned and an aligned model, by
whatever program, are measured alike.  A measure of some items is an estimate: intervals, a paired test and the number of
items that a difference needs stand beside the measures.

A question ends with the separator that fine-tuning put there, a new line, for every model.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import runs, stack
from course_lib.common.project import DATA
from course_lib.experiments import export, preferences
from course_lib.stack.patches import Patches, applied
from course_lib.text import docstrings
from course_lib.text.tasks import SEPARATOR

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from course_lib.text.tasks import Choice, Pair

__all__ = [
    "NORMALISATIONS",
    "SEPARATOR",
    "Interval",
    "Measures",
    "Merge",
    "Model",
    "Paired",
    "answer_loss",
    "bits_per_byte",
    "choose",
    "distinct",
    "harness",
    "items_needed",
    "judged",
    "load",
    "log_probabilities",
    "mean",
    "measure",
    "merged",
    "paired",
    "proportion",
    "read",
    "sample",
    "seeds",
    "seeds_of_rungs",
    "visible_difference",
    "word_f1",
    "write",
]

LEVEL = 0.95
NORMALISATIONS = ("sum", "per token", "per character")
"""What the log probability of an option is divided by before the largest wins: nothing, its tokens, its characters.

Source: lm_eval 0.4.13 `api/task.py` calls the first `acc` and the last `acc_norm`; it has none for tokens."""


@dataclass(frozen=True)
class Model:
    """A causal language model of transformers and its tokenizer, ready to be asked."""

    tokenizer: Any
    network: Any
    name: str


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds the true value in 95 of 100 such measurements."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Paired:
    """Two models on the same items, of which only those count on which they disagree.

    Attributes:
        only_first: Items that the first model alone got right.
        only_second: Items that the second model alone got right.
        p_value: How often a difference at least as large comes about if both are equally good; both directions count.
        n: Items.
    """

    only_first: int
    only_second: int
    p_value: float
    n: int


@dataclass(frozen=True)
class Measures:
    """What lessons 13 to 15 say of a model.

    Attributes:
        pass_rate: Share of sampled answers with all five checks of `docstrings`.
        answer_loss: Of the true docstrings and the end after them, nats per token.
        word_f1: Mean over the sampled answers.
        distinct: Share of sampled answers that differ from all others.
        answers: The samples, in the order of the questions.
    """

    pass_rate: Interval
    answer_loss: Interval
    word_f1: Interval
    distinct: float
    answers: tuple[str, ...]


def load(folder: Path) -> Model:
    """The model of a folder that `experiments.export` or a trainer of TRL wrote, in fp32 on the CPU."""
    from transformers import AutoTokenizer

    return Model(AutoTokenizer.from_pretrained(folder), export.loaded(folder), Path(folder).name)


@dataclass(frozen=True)
class Merge:
    """An adapter's model before and after it was merged, asked with one text.

    Attributes:
        parameters: Weights of the adapter, as PEFT counts them.
        largest: Absolute value of the largest logit with the adapter on top.
        moved: By how much a logit differs from the base's, at most.
        difference: By how much a logit of the merged model differs from that with the adapter on top, at most.
    """

    parameters: int
    largest: float
    moved: float
    difference: float


def merged(base: Path, adapter: Path, text: str) -> tuple[Model, Merge]:
    """The base with an adapter of PEFT's format added to its weights, and what the addition did to the logits of a text.

    Args:
        base: The base's folder.
        adapter: The adapter's folder.
        text: Any.
    """
    from peft import PeftModel

    thin = load(base)
    ids = thin.tokenizer(text, return_tensors="pt")["input_ids"]
    with _asking():
        plain = thin.network(ids).logits
        on_top = PeftModel.from_pretrained(thin.network, adapter)
        parameters = sum(one.numel() for name, one in on_top.named_parameters() if "lora_" in name)
        before = on_top(ids).logits
        network = on_top.merge_and_unload()
        after = network(ids).logits
    largest, moved, difference = (float(one.abs().max()) for one in (before, before - plain, after - before))
    return Model(thin.tokenizer, network, Path(adapter).name), Merge(parameters, largest, moved, difference)


@contextmanager
def _asking() -> Iterator[None]:
    """No gradients, and one thread."""
    import torch

    with preferences.one_thread(), torch.inference_mode():
        yield


def log_probabilities(model: Model, rows: Sequence[tuple[str, str]], *, batch: int = 64) -> pd.DataFrame:
    """How likely a model finds answers: one row a question and answer, with `nats`, `tokens` and `characters`.

    The end of the document counts as a token of the answer, the question does not count.

    Args:
        rows: Question and answer.
        batch: Sequences at a time; they are sorted by length, so few tokens are padding.
    """
    import pandas as pd
    import torch

    end = model.tokenizer.eos_token_id
    questions, answers = [question for question, _ in rows], [SEPARATOR + answer for _, answer in rows]
    prompts, said = (model.tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (questions, answers))
    encoded = [([*prompt, *text, end], len(text) + 1) for prompt, text in zip(prompts, said, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: len(encoded[row][0]))
    nats = [0.0] * len(rows)
    for begin in range(0, len(order), batch):
        some = order[begin : begin + batch]
        ids = torch.full((len(some), len(encoded[some[-1]][0])), end)
        for place, row in enumerate(some):
            ids[place, : len(encoded[row][0])] = torch.tensor(encoded[row][0])
        lengths = torch.tensor([len(encoded[row][0]) for row in some])[:, None]
        counted = torch.tensor([encoded[row][1] for row in some])[:, None]
        position = torch.arange(1, ids.shape[1])
        answer = (position >= lengths - counted) & (position < lengths)
        begins = int((lengths - counted).min()) - 1  # no row has an answer before it, so no logits are needed there
        with _asking():
            logits = model.network(input_ids=ids, logits_to_keep=ids.shape[1] - begins).logits
            logits = logits[:, :-1][answer[:, begins:]].float()
        chosen = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:][answer][:, None])[:, 0]
        for row, tokens in zip(some, chosen.split(counted[:, 0].tolist()), strict=True):
            nats[row] = float(tokens.sum())
    table = {"nats": nats, "tokens": [counted for _, counted in encoded]}
    return pd.DataFrame(table | {"characters": [len(answer) for _, answer in rows]})


def answer_loss(model: Model, pairs: Sequence[Pair]) -> Interval:
    """Loss of the true docstrings in nats per token, all tokens together, as Bridge's validation loss counts them."""
    from scipy import stats

    found = log_probabilities(model, [(pair.input, pair.output) for pair in pairs])
    rows = (-found.nats.to_numpy(), found.tokens.to_numpy())
    drawn = stats.bootstrap(
        rows, _ratio, paired=True, vectorized=True, n_resamples=2000, method="percentile", rng=0, confidence_level=LEVEL
    )
    low, high = drawn.confidence_interval
    return Interval(float(_ratio(*rows)), float(low), float(high), len(found))


def _ratio(nats: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return nats.sum(axis=axis) / tokens.sum(axis=axis)


def choose(model: Model, choices: Sequence[Choice]) -> pd.DataFrame:
    """Which items a model gets right: one row an item, one column a normalisation."""
    import numpy as np
    import pandas as pd

    found = log_probabilities(model, [(each.question, option) for each in choices for option in each.options])
    divided = {
        "sum": found.nats,
        "per token": found.nats / found.tokens,
        "per character": found.nats / found.characters,
    }
    answers, width = np.array([each.answer for each in choices]), len(choices[0].options)
    scores = {name: values.to_numpy().reshape(-1, width) for name, values in divided.items()}
    return pd.DataFrame({name: scores[name].argmax(1) == answers for name in NORMALISATIONS})


def harness(folder: Path, tasks: Sequence[str], place: Path) -> dict[str, Any]:
    """What lm-eval says of a model: `results` with the scores of each task, and `samples` with every item.

    Args:
        folder: In Hugging Face's format.
        tasks: Their names.
        place: Where their YAML files lie; no other task is looked for.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    given = {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}
    manager = TaskManager(include_path=str(place), include_defaults=False)
    preferences.quiet()
    with preferences.one_thread(), _alone(), stack.quietly("lm_eval"), contextlib.redirect_stderr(io.StringIO()):
        return lm_eval.simple_evaluate(
            model="hf", model_args=given, tasks=list(tasks), task_manager=manager, batch_size=64
        )


def _alone() -> contextlib.AbstractContextManager[None]:
    """lm-eval starts no other program: it would ask git and pip what it runs on.

    What git says of a folder without history goes to the cell, past every redirection in Python.
    """
    mine = Patches()
    asked = ("lm_eval.evaluator.get_git_commit_hash", "lm_eval.evaluator.add_env_info")
    mine.sets(lambda *_: None, *asked, why="no score depends on what they find", becomes="nothing")
    return applied(mine)


def sample(
    model: Model,
    questions: Sequence[str],
    *,
    temperature: float = 1.0,
    new_tokens: int = 40,
    seed: int = 1,
    batch: int = 128,
) -> list[str]:
    """An answer to each question, all of a batch written at once; what is cut at `new_tokens` has no end.

    Args:
        questions: Such as `Pair.input`.
        temperature: 0 takes the most likely token each time.
        new_tokens: At most.
        seed: Of the dice; the process's own random state stays as it is.
        batch: Questions at a time; another number throws other dice.
    """
    import torch

    end = model.tokenizer.eos_token_id
    written: list[str] = []
    dice = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    with torch.random.fork_rng(), _asking():
        torch.manual_seed(seed)
        for begin in range(0, len(questions), batch):
            ids = [
                model.tokenizer(text + SEPARATOR, add_special_tokens=False)["input_ids"]
                for text in questions[begin : begin + batch]
            ]
            width = max(map(len, ids))
            padded = torch.tensor(
                [[end] * (width - len(row)) + row for row in ids]
            )  # on the left: new tokens come last
            seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
            out = model.network.generate(
                input_ids=padded, attention_mask=seen, max_new_tokens=new_tokens, pad_token_id=end, **dice
            )
            written += model.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in written]


def measure(
    model: Model,
    pairs: Sequence[Pair],
    *,
    samples: int = 200,
    seed: int = 1,
    passes: Callable[[str], bool] = docstrings.passes,
) -> Measures:
    """The four measures of lessons 13 to 15 on held-out pairs.

    Args:
        pairs: All of them give the loss, the first ones the questions of the samples.
        samples: How many answers are sampled, at temperature 1.
        seed: Of the samples.
        passes: What makes an answer well formed.
    """
    asked = list(pairs)[:samples]
    answers = sample(model, [pair.input for pair in asked], seed=seed)
    return Measures(
        pass_rate=proportion([passes(answer) for answer in answers]),
        answer_loss=answer_loss(model, pairs),
        word_f1=mean([word_f1(answer, pair.output) for answer, pair in zip(answers, asked, strict=True)]),
        distinct=distinct(answers),
        answers=tuple(answers),
    )


def judged(models: Mapping[str, Path], pairs: Sequence[Pair], *, seed: int = 1) -> dict[str, dict[str, Interval]]:
    """Three measures of each model on held-out pairs, each with its interval.

    `answer loss` is that of the true docstrings in nats a token; `preferred` the share of pairs whose docstring is likelier
    than the same with one fault; `passes` the share of sampled answers with all five checks of `docstrings`.

    Args:
        models: Hugging Face folders by name.
        seed: Of the faults and of the samples.
    """
    some = preferences.preferences(pairs, seed=seed, separator="")
    asked = [(row.prompt, text) for row in some for text in (row.chosen, row.rejected)]
    found = {}
    for name, folder in models.items():
        model = load(folder)
        nats = log_probabilities(model, asked).nats.to_numpy().reshape(-1, 2)
        answers = sample(model, [pair.input for pair in pairs], seed=seed)
        found[name] = {
            "answer loss": answer_loss(model, pairs),
            "preferred": proportion(list(nats[:, 0] > nats[:, 1])),
            "passes": proportion([docstrings.passes(answer) for answer in answers]),
        }
    return found


def write(found: Mapping[str, Mapping[str, Interval]], place: Path) -> Path:
    """Keep what `judged` found, for `read`; returns the file."""
    runs.write_json(place, {name: {what: vars(one) for what, one in each.items()} for name, each in found.items()})
    return place


def read(place: Path) -> dict[str, dict[str, Interval]]:
    """What `write` kept."""
    found = json.loads(place.read_text(encoding="utf-8"))
    return {name: {what: Interval(**one) for what, one in each.items()} for name, each in found.items()}


def word_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words of an answer, each word once, upper and lower case alike.

    >>> word_f1("Return the file.", "Return a file"), word_f1("", "Return a file")
    (0.6666666666666666, 0.0)
    """
    mine, theirs = (set(re.findall(r"[a-z]+", text.lower())) for text in (answer, truth))
    return 2 * len(mine & theirs) / (len(mine) + len(theirs)) if mine & theirs else 0.0


def distinct(answers: Sequence[str]) -> float:
    """Number of different answers, as a share of all.

    >>> distinct(["a", "b", "b", "b"])
    0.5
    """
    return len(set(answers)) / len(answers)


def bits_per_byte(model: Model, texts: Iterable[str], *, window: int, batch: int = 16) -> float:
    """What a text costs a model, whatever its tokenizer: bits per byte of UTF-8, the end of each document included.

    Args:
        texts: Documents.
        window: Tokens that the model sees at once, those of its training; the first token of a window is not predicted
            from the one before, so a document that is cut costs a little more than it would whole.
        batch: Windows at a time.
    """
    import torch

    end, windows, text_bytes = model.tokenizer.eos_token_id, [], 0
    for text in texts:
        ids = [end, *model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]
        text_bytes += len(text.encode())
        windows += [ids[begin : begin + window + 1] for begin in range(0, len(ids) - 1, window)]
    windows.sort(key=len)
    nats = 0.0
    for begin in range(0, len(windows), batch):
        some = windows[begin : begin + batch]
        ids = torch.full((len(some), len(some[-1])), end)
        counted = torch.zeros(ids.shape)
        for row, each in enumerate(some):
            ids[row, : len(each)], counted[row, : len(each)] = torch.tensor(each), 1.0
        with _asking():
            logits = model.network(input_ids=ids[:, :-1]).logits.float()
        chosen = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        nats -= float((chosen * counted[:, 1:]).sum())
    return nats / math.log(2) / text_bytes


def proportion(right: Sequence[bool]) -> Interval:
    """Share of items that are right, with Wilson's interval, which stays between 0 and 1.

    >>> str(proportion([True] * 10))
    '1 [0.722, 1]'
    """
    import numpy as np
    from scipy import stats

    count, n = int(np.sum(right)), len(right)
    found = stats.binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return Interval(count / n, float(found.low), float(found.high), n)


def mean(values: Sequence[float]) -> Interval:
    """Mean of items, with the interval of Student's t.

    >>> str(mean([1.0, 2.0, 3.0]))
    '2 [-0.484, 4.48]'
    """
    import numpy as np
    from scipy import stats

    array = np.asarray(values, dtype=float)
    half = stats.t.ppf((1 + LEVEL) / 2, len(array) - 1) * stats.sem(array) if len(array) > 1 else float("nan")
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half), len(array))


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """McNemar's exact test of two models on the same items: items on which both are right or both wrong say nothing.

    Args:
        first: What the first model got right, an item each.
        second: The same items, in the same order.

    Raises:
        ValueError: If the numbers of items differ.

    >>> paired([True] * 3 + [False] * 7, [True] * 10).p_value
    0.015625
    """
    import numpy as np

    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} and {len(other)} items: a paired test needs the same items in the same order")
    lost, won = int((one & ~other).sum()), int((~one & other).sum())
    return Paired(lost, won, _as_uneven(lost, won), len(one))


def _as_uneven(lost: float, won: float) -> float:
    """How often a coin falls at least as unevenly; NaN if nothing was compared."""
    from scipy import stats

    if lost != lost:
        return lost
    return float(stats.binomtest(int(won), int(won + lost)).pvalue) if won + lost else 1.0


def items_needed(first: float, second: float, *, power: float = 0.8) -> int:
    """How many items each of two models must answer, so that a test at 5% sees the difference with that probability.

    For two shares that were measured on different items; the same items need fewer where the models agree on many.

    Args:
        first: True share of the first model.
        second: True share of the second one.
        power: How often the difference shall be seen.

    Raises:
        ValueError: If the shares are equal, or no shares.

    Source: Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, 3rd edition, equation 4.14 without
    the correction for continuity.

    >>> items_needed(0.5, 0.6)
    388
    """
    from scipy import stats

    if first == second or not (0 <= first <= 1 and 0 <= second <= 1):
        raise ValueError(f"shares {first} and {second}: two different numbers from 0 to 1 are needed")
    either = (first + second) / 2
    alone = math.sqrt(2 * either * (1 - either))
    apart = math.sqrt(first * (1 - first) + second * (1 - second))
    root = stats.norm.ppf((1 + LEVEL) / 2) * alone + stats.norm.ppf(power) * apart
    return math.ceil((root / (first - second)) ** 2)


def visible_difference(first: float, n: int, *, power: float = 0.8) -> float:
    """The smallest rise above a share that so many items for each model show, by `items_needed`; NaN if not even 1 is.

    >>> round(visible_difference(0.5, 388), 3)
    0.1
    """
    import numpy as np

    rises = np.linspace(0.001, 1 - first, 2000)
    seen = [rise for rise in rises if items_needed(first, first + rise, power=power) <= n]
    return float(seen[0]) if seen else float("nan")


def seeds(*, directory: Path = DATA) -> pd.DataFrame:
    """The measures of lessons 13 to 15 under several seeds, each of which trained its own base: one row a model and seed.

    Columns: `passes`, `answer loss`, `shared words`, `distinct`, `prose` and `code` (bits per byte of held-out text),
    `chosen nats` (of the DPO policies: how much likelier than under the fine-tuned model the chosen answers of held-out
    preferences are, as TRL's evaluation counts them: with the end of the document, without the separator), and
    `lost`, `won` and `p_value` of the paired test of what passes, against the model that this one was made from; the base
    has none.
    """
    import pandas as pd

    rows = [{name: value for name, value in row.items() if name != "rungs"} for row in _of_seeds(directory)]
    table = pd.DataFrame(rows)
    table["passes"] = table.passes / table.answers
    for name in ("answer loss", "shared words"):
        table[name] = [value for value, _, _ in table[name]]
    return _tested(table).set_index(["model", "seed"]).drop(columns="answers").sort_index()


def seeds_of_rungs(*, directory: Path = DATA) -> pd.DataFrame:
    """The ladder under several seeds: one row a rung, normalisation, model and seed.

    Columns: `right` of `n` items, their `share`, and `lost`, `won` and `p_value` as in `seeds`.
    """
    import pandas as pd

    rows = [
        {"rung": rung, "normalisation": name, "model": row["model"], "seed": row["seed"], "n": each["n"]}
        | dict(zip(("right", "lost", "won"), each[name], strict=False))
        for row in _of_seeds(directory)
        for rung, each in row.get("rungs", {}).items()
        for name in NORMALISATIONS
    ]
    table = _tested(pd.DataFrame(rows))
    return table.assign(share=table.right / table.n).set_index(["rung", "normalisation", "model", "seed"]).sort_index()


def _tested(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(p_value=[_as_uneven(lost, won) for lost, won in zip(table.lost, table.won, strict=True)])


def _of_seeds(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "alignment_seeds.json").read_text(encoding="utf-8"))["rows"]

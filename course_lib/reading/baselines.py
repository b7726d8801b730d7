"""How good a trained model is: baselines to beat."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.common.project import DATA

if TYPE_CHECKING:
    import numpy as np

__all__ = ["bigram_loss", "first_loss", "known_first_losses", "token_pairs", "unigram_loss"]


def first_loss(vocab_size: int, hidden_size: int, init_std: float) -> float:
    """The loss to expect of a model with fresh weights: ln V + h s^2 / 2.

    The last norm gives each hidden vector the length sqrt(h), so the logits are normal with the variance h s^2, and
    the logarithm of the sum of V of their exponentials is ln V + h s^2 / 2; the right token's own logit is 0 on average.

    Args:
        vocab_size: Rows of the output layer; padded rows count, because they take part in the softmax.
        init_std: Standard deviation of the first output weights, Megatron's `init_method_std`.

    Returns:
        Nats per token.

    Example:
        >>> round(first_loss(131072, 3136, 0.02), 3)  # Nemotron 3 Nano 4B; NVIDIA measured 12.4325
        12.411
    """
    return math.log(vocab_size) + hidden_size * init_std**2 / 2


def known_first_losses() -> dict[str, list[dict[str, Any]]]:
    """The rows of `data/first_loss.json`: first losses that NVIDIA `published`, and those that the tests `measured`."""
    data = json.loads((DATA / "first_loss.json").read_text(encoding="utf-8"))
    return {"measured": data["measured"], "published": data["published"]}


def unigram_loss(train: Sequence[int], validation: Sequence[int], *, vocab_size: int) -> float:
    """The loss of a model that knows how often each token occurs and nothing else.

    Counts come from the training ids, one is added to each (Laplace), the loss is that of the validation ids.

    Returns:
        Mean negative log likelihood, nats per token.

    Example:
        >>> round(unigram_loss([0, 1] * 5000, [0, 1], vocab_size=2), 4) == round(math.log(2), 4)
        True
    """
    counts, total = Counter(train), len(train) + vocab_size
    return -sum(math.log((counts[token] + 1) / total) for token in validation) / len(validation)


def token_pairs(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """What a trainer asks of these samples: each token, and the label that is to be predicted from it.

    Args:
        samples: Items of Megatron's `GPTDataset` or `BlendedDataset`, with `tokens` and `labels` of `seq_length` ids.

    Returns:
        Shape (samples x seq_length, 2).

    Example:
        >>> import numpy as np
        >>> token_pairs([{"tokens": np.array([5, 6]), "labels": np.array([6, 7])}]).tolist()
        [[5, 6], [6, 7]]
    """
    import numpy as np

    columns = [np.concatenate([np.asarray(sample[name]) for sample in samples]) for name in ("tokens", "labels")]
    return np.stack(columns, axis=1).astype(np.int64)


def bigram_loss(train: np.ndarray, validation: np.ndarray, *, vocab_size: int) -> float:
    """The loss of a model that knows the token before, and how often each token followed it.

    Witten and Bell's smoothing, which has nothing to tune: a token that was seen `n` times before `t` different ones
    leaves `t / (n + t)` of its chances to the unigram model, and so a pair that never occurred costs something finite.

    Args:
        train: Pairs to count, shape (pairs, 2): a token, and the one after it.
        validation: Pairs to judge on, of the same form.

    Returns:
        Mean negative log likelihood, nats per token.

    Raises:
        ValueError: If there is nothing to count or to judge on, or an id is outside the vocabulary.

    Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37 (4), 1991, method C.

    Example:
        >>> import numpy as np
        >>> alternating = np.array([[0, 1], [1, 0]] * 5000)
        >>> bigram_loss(alternating, alternating, vocab_size=2) < 0.001
        True
    """
    import numpy as np

    for name, given in (("train", train), ("validation", validation)):
        if given.ndim != 2 or given.shape[1] != 2 or not len(given):
            raise ValueError(f"{name} has shape {given.shape}, needed (pairs, 2) with at least one pair")
        if given.min() < 0 or given.max() >= vocab_size:
            raise ValueError(
                f"{name} has ids from {given.min()} to {given.max()}, outside a vocabulary of {vocab_size}"
            )
    unigram = np.bincount(train[:, 1], minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    known, times = np.unique(train[:, 0] * vocab_size + train[:, 1], return_counts=True)
    seen = np.bincount(train[:, 0], minlength=vocab_size)
    followers = np.bincount(known // vocab_size, minlength=vocab_size)

    asked = validation[:, 0] * vocab_size + validation[:, 1]
    place = np.searchsorted(known, asked).clip(max=len(known) - 1)
    count = np.where(known[place] == asked, times[place], 0)
    before, after = validation[:, 0], unigram[validation[:, 1]]
    total = np.maximum(seen[before] + followers[before], 1)
    chance = np.where(seen[before] > 0, (count + followers[before] * after) / total, after)
    return float(-np.log(chance).mean())

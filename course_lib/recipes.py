"""NVIDIA's recipes without the Hub: load one, flatten it, compare two, make one small.

``offline()`` is the whole trick.  A recipe such as ``llama32_1b_pretrain_config`` calls
``AutoBridge.from_hf_pretrained("meta-llama/Llama-3.2-1B")`` for the *shape* of the model, and that file is gated.
Inside the context the same call is answered from ``data/models/*.json``; everything else is NVIDIA's own code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.layout_sizes import Fields

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ModelFacts",
    "UnknownModel",
    "diff",
    "flatten",
    "initial_loss",
    "known_models",
    "offline",
    "parameter_count",
    "shrink",
]

_MODELS = Path(__file__).resolve().parent.parent / "data" / "models"
_ABSENT = "(absent)"


class UnknownModel(ValueError):
    """A recipe asked for a model whose values are not in ``data/models``."""


@dataclass(frozen=True)
class ModelFacts:
    """The shape of one model, kept in the project with its source.

    Attributes:
        model_id: The name under which a recipe asks for it.
        config: Values under the names that Hugging Face uses.
        source: Where each value was read.
        path: The file.
    """

    model_id: str
    config: dict[str, Any]
    source: dict[str, Any]
    path: Path


def known_models(*, directory: Path = _MODELS) -> dict[str, ModelFacts]:
    """Which models can be built without the Hub?

    Args:
        directory: Where the ``*.json`` files are.

    Returns:
        The facts by model id.

    Raises:
        ValueError: If a file lacks a key or two files claim one id.

    >>> known_models()["meta-llama/Llama-3.2-1B"].config["num_hidden_layers"]
    16
    """
    found: dict[str, ModelFacts] = {}
    for path in sorted(directory.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in ("model_id", "config", "source") if key not in data]:
            raise ValueError(f"{path} has no {' and no '.join(missing)}: see data/README.md for the three keys")
        facts = ModelFacts(data["model_id"], data["config"], data["source"], path)
        if facts.model_id in found:
            raise ValueError(f"{path} and {found[facts.model_id].path} both describe {facts.model_id}: remove one")
        found[facts.model_id] = facts
    return found


@contextmanager
def offline(*, directory: Path = _MODELS) -> Iterator[None]:
    """Answer ``AutoBridge.from_hf_pretrained`` from ``data/models`` instead of the Hub, inside this block only.

    A path to a local directory still goes to Bridge.  Weights are never made up: asking for them fails in Bridge.

    Args:
        directory: Where the ``*.json`` files are.

    Raises:
        UnknownModel: By the recipe inside, if it asks for a model that has no file.

    Example::

        with recipes.offline():
            cfg = llama32_1b_pretrain_config()

    Source: megatron-bridge 0.6.2 ``models/conversion/auto_bridge.py``, ``from_hf_pretrained`` and ``from_hf_config``.
    """
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    known = known_models(directory=directory)
    original = AutoBridge.__dict__["from_hf_pretrained"]

    def from_facts(cls: type, path: str | Path, **kwargs: Any) -> Any:
        if Path(path).is_dir():
            return original.__get__(None, cls)(path, **kwargs)
        if str(path) not in known:
            raise UnknownModel(
                f"no values for {str(path)!r} in {directory}: known are {', '.join(sorted(known)) or 'none'}. "
                f"Write {str(path).rsplit('/', 1)[-1].lower().replace('.', '').replace('-', '_')}.json there with "
                f'"model_id": "{path}" (see data/README.md), or call the recipe outside recipes.offline() '
                "with a network and, for a gated model, a Hugging Face login"
            )
        config = dict(known[str(path)].config)
        config = AutoConfig.for_model(config.pop("model_type"), **config)
        config.name_or_path = str(path)  # Bridge keeps it as hf_model_id, as if the Hub had answered
        return cls.from_hf_config(config)

    AutoBridge.from_hf_pretrained = classmethod(from_facts)
    try:
        yield
    finally:
        AutoBridge.from_hf_pretrained = original


def flatten(cfg: Any) -> dict[str, Any]:
    """Every setting of a configuration under its dotted name.

    Args:
        cfg: A Bridge ``ConfigContainer``, any dataclass, or nested mappings (``config.yaml`` read back).

    Returns:
        Values by name.  Functions, types and torch dtypes become text, so that two results can be compared.

    >>> flatten({"train": {"train_iters": 10, "sizes": [1, 2]}, "peft": None})
    {'train.train_iters': 10, 'train.sizes': [1, 2], 'peft': None}
    """
    flat: dict[str, Any] = {}
    for name, value in _children(cfg):
        children = dict(_children(value))
        flat |= {f"{name}.{key}": leaf for key, leaf in flatten(children).items()} if children else {name: _leaf(value)}
    return flat


def diff(before: Any, after: Any) -> pd.DataFrame:
    """Which settings differ between two configurations?

    Args:
        before: As for :func:`flatten`, or its result.
        after: The same.

    Returns:
        One row a setting with columns ``field``, ``before``, ``after``, in the order of ``before``.

    >>> diff({"train": {"a": 1, "b": 2}}, {"train": {"a": 1, "b": 3}}).values.tolist()
    [['train.b', 2, 3]]
    """
    import pandas as pd

    old, new = flatten(before), flatten(after)
    rows = [
        (name, old.get(name, _ABSENT), new.get(name, _ABSENT))
        for name in {**old, **new}
        if name not in old or name not in new or not _same(old[name], new[name])
    ]
    return pd.DataFrame(rows, columns=["field", "before", "after"], dtype=object)


def shrink(
    cfg: Any,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    ffn_hidden_size: int | None = None,
    seq_length: int | None = None,
    vocab_size: int | None = None,
) -> pd.DataFrame:
    """Make the model of a recipe small, in place, keeping the settings equal that Bridge wants equal.

    ``seq_length`` is set on the model and on the data; ``vocab_size`` on the model and on the tokenizer;
    ``kv_channels``, which a recipe fixes at the head size of the big model, becomes hidden size / heads.

    Args:
        cfg: A Bridge ``ConfigContainer``.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads.
        ffn_hidden_size: Width of the feed-forward layer.
        seq_length: Tokens in a sequence.
        vocab_size: Ids of the tokenizer.

    Returns:
        The settings that changed, as :func:`diff` shows them.

    Raises:
        ValueError: If the heads do not divide the hidden size; nothing is changed then.
    """
    model, before = cfg.model, flatten(cfg)
    hidden, heads = hidden_size or model.hidden_size, num_attention_heads or model.num_attention_heads
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}: change one of them")
    given = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "ffn_hidden_size": ffn_hidden_size,
        "seq_length": seq_length,
        "vocab_size": vocab_size,
        "kv_channels": hidden // heads if hidden_size or num_attention_heads else None,
    }
    for name, value in given.items():
        if value is not None:
            setattr(model, name, value)
    if seq_length is not None:
        cfg.dataset.seq_length = seq_length
    if vocab_size is not None:
        cfg.tokenizer.vocab_size = vocab_size
    return diff(before, cfg)


def parameter_count(model: Any, *, vocab_size: int | None = None) -> int:
    """How many parameters has a dense Llama-shaped model (RMSNorm, no biases, rotary positions)?

    With hidden size h, heads of c channels, a query heads, g key-value heads, feed-forward width f, L layers, V rows::

        V h  +  L (h c (2 a + 2 g)  +  3 h f  +  2 h)  +  h  [+ V h if input and output embeddings differ]

    (2 h f instead of 3 h f without a gate.)

    Args:
        model: A Bridge model provider, a ``ConfigContainer``, or a mapping with Megatron's field names.
        vocab_size: Rows of the embedding, padded already (``layout.padded_vocab_size``); default the model's.

    Returns:
        The number of parameters, each counted once however many ranks hold it.

    Raises:
        ValueError: If the model has parts that this formula does not count.

    >>> llama = dict(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=8192)
    >>> llama |= dict(normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False)
    >>> llama |= dict(position_embedding_type="rope", share_embeddings_and_output_weights=True)
    >>> parameter_count(llama, vocab_size=128256)
    1235814400
    """
    get = Fields.of(model).model
    wanted = {
        "normalization": ("RMSNorm", "LayerNorm"),
        "add_bias_linear": (False, True),
        "add_qkv_bias": (False, False),
        "qk_layernorm": (False, False),
        "multi_latent_attention": (False, False),
        "num_moe_experts": (None, None),
        "mtp_num_layers": (None, None),
        "hybrid_layer_pattern": (None, None),
        "position_embedding_type": ("rope", "learned_absolute"),
    }
    for name, (counted, default) in wanted.items():
        if (value := get(name, default)) != counted:
            raise ValueError(
                f"{name}={value!r} adds or removes parameters that this formula does not count (it wants {counted!r}): "
                "count the built model instead"
            )
    hidden, heads, layers = get("hidden_size"), get("num_attention_heads"), get("num_layers")
    groups, width = get("num_query_groups", heads), get("ffn_hidden_size", 4 * hidden)
    rows = vocab_size if vocab_size is not None else get("vocab_size")
    if rows is None:
        raise ValueError("the model has no vocab_size: give vocab_size=")
    channels = get("kv_channels", hidden // heads)
    attention = hidden * channels * (2 * heads + 2 * groups)
    feed_forward = hidden * width * (3 if get("gated_linear_unit", False) else 2)
    embeddings = rows * hidden * (1 if get("share_embeddings_and_output_weights", True) else 2)
    return embeddings + layers * (attention + feed_forward + 2 * hidden) + hidden


def initial_loss(vocab_size: int) -> float:
    """The loss of a model that knows nothing: every id is equally likely.

    Args:
        vocab_size: Number of ids among which the model chooses.

    Returns:
        ln(vocab_size), in nats a token.

    Raises:
        ValueError: If it is not positive.

    >>> round(initial_loss(32000), 2)
    10.37
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1")
    return math.log(vocab_size)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), child) for name, child in value.items())
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            # A leading underscore is Bridge's own bookkeeping (process groups, hooks), not a setting.
            if not field.name.startswith("_"):
                yield field.name, getattr(value, field.name, _ABSENT)


def _leaf(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_leaf(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, partial):
        return f"partial({_leaf(value.func)}, {[_leaf(item) for item in value.args]}, {value.keywords})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "torch":  # torch.float32 and friends, without importing torch
        return str(value)
    return value


def _same(one: Any, other: Any) -> bool:
    """Equality that also tells 1 from True and 1 from 1.0: YAML and Megatron do."""
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # arrays and the like
        return one is other

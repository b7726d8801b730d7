"""The shapes of models, kept in ``data/models`` with their sources, and a block in which recipes find them there.

``offline()`` is the whole trick.  A recipe such as ``llama32_1b_pretrain_config`` calls
``AutoBridge.from_hf_pretrained("meta-llama/Llama-3.2-1B")`` for the *shape* of the model, and that file is gated.
Inside the context the same call is answered from ``data/models/*.json``; everything else is NVIDIA's own code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.common.project import DATA
from course_lib.stack.patches import Patches, applied

__all__ = ["ModelFacts", "UnknownModel", "known_models", "offline"]

_MODELS = DATA / "models"


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
def offline() -> Iterator[None]:
    """Answer questions for a model's configuration from ``data/models`` instead of the Hub, inside this block only.

    Recipes ask through ``AutoBridge.from_hf_pretrained``, two of them through ``AutoConfig.from_pretrained``.  A path to
    a local directory still goes to Bridge.  Weights are never made up: asking for them fails in Bridge.

    Raises:
        UnknownModel: By the recipe inside, if it asks for a model that has no file.

    Example::

        with recipes.offline():
            cfg = llama32_1b_pretrain_config()

    Source: megatron-bridge 0.6.2 ``models/conversion/auto_bridge.py``, ``from_hf_pretrained`` and ``from_hf_config``.
    """
    from transformers import AutoConfig

    known, mine, why = known_models(), Patches(), "the Hub cannot be asked"

    @mine.replaces("transformers.AutoConfig.from_pretrained", why=why)
    def config_from_facts(original: Any, cls: type, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        if Path(pretrained_model_name_or_path).is_dir():
            return original(cls, pretrained_model_name_or_path, **kwargs)
        facts = _facts(str(pretrained_model_name_or_path), known)
        values = dict(facts.config)
        made = AutoConfig.for_model(values.pop("model_type"), **values)
        made.name_or_path = facts.model_id  # Bridge keeps it as hf_model_id, as if the Hub had answered
        return made

    @mine.replaces("megatron.bridge.AutoBridge.from_hf_pretrained", why=why)
    def bridge_from_facts(original: Any, cls: type, path: str | Path, **kwargs: Any) -> Any:
        if Path(path).is_dir():
            return original(cls, path, **kwargs)
        return cls.from_hf_config(AutoConfig.from_pretrained(path))

    with applied(mine):
        yield


def _facts(model_id: str, known: dict[str, ModelFacts]) -> ModelFacts:
    if model_id not in known:
        name = model_id.rsplit("/", 1)[-1].lower().replace(".", "").replace("-", "_")
        raise UnknownModel(
            f"no values for {model_id!r} in {_MODELS}, which describes {len(known)} models: the recipe wants "
            f'config.json of that model. Write {name}.json there with "model_id": "{model_id}" (see data/README.md), '
            "or call the recipe outside recipes.offline() with a network and, for a gated model, a Hugging Face login"
        )
    return known[model_id]

"""A configuration is read, changed and compared alike as Bridge's objects and as `config.yaml`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest

from course_lib.common import config
from course_lib.common.config import Fields, UnknownField, changed
from support import small


@dataclass
class Model:
    """What a model provider is here: fields, a list, a section of its own, and bookkeeping."""

    num_layers: int = 4
    moe_layer_freq: list[int] = field(default_factory=lambda: [1, 0])
    activation_func: Any = len
    _group: Any = field(default_factory=object)


@dataclass
class Transformer:
    """The newer model configs keep Megatron's fields here."""

    hidden_size: int = 64
    num_attention_heads: int = 4


@dataclass
class Config:
    """A container with two sections, one of which may be missing."""

    model: Any = field(default_factory=Model)
    peft: Any = None
    mixed_precision: Any = "bf16_mixed"


@pytest.fixture(params=["objects", "mappings"])
def cfg(request: pytest.FixtureRequest) -> Any:
    made = Config()
    kept = {"num_layers": 4, "moe_layer_freq": [1, 0], "activation_func": len}
    return made if request.param == "objects" else {"model": kept, "peft": None, "mixed_precision": "bf16_mixed"}


def test_the_copy_has_the_new_values_and_the_original_its_own(cfg: Any) -> None:
    """However deep the field stands, and whatever is set on the copy afterwards."""
    before = copy.deepcopy(config.flatten(cfg))
    mine = changed(cfg, {"model.num_layers": 2, "mixed_precision": None})
    assert config.diff(cfg, mine).values.tolist() == [
        ["model.num_layers", 4, 2],
        ["mixed_precision", "bf16_mixed", None],
    ]
    config.value(mine, "model.moe_layer_freq").append(1)
    config.assign(mine, {"model.activation_func": print})
    assert config.flatten(cfg) == before
    assert type(mine) is type(cfg)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("model.num_layer", "model.num_layers"), ("mixed_precisions", "mixed_precision"), ("peft.dim", ""), ("x", "")],
)
def test_an_unknown_field_is_refused_with_the_nearest(cfg: Any, path: str, nearest: str) -> None:
    """A slip of a name would otherwise be set and never be read; a section that is None has no fields."""
    before = config.flatten(cfg)
    for change in (changed, config.assign):
        with pytest.raises(UnknownField, match=f"no field '{path}'.*{nearest}"):
            change(cfg, {"mixed_precision": None, path: 1})
    assert config.flatten(cfg) == before
    assert not config.has(cfg, path)
    assert config.has(cfg, "model.num_layers") and config.value(cfg, "model.num_layers") == 4


def test_bookkeeping_is_shared_and_one_object_stays_one() -> None:
    """A process group cannot be copied; a section that stands in two places is changed in both."""
    cfg = Config()
    cfg.peft = cfg.model
    mine = changed(cfg, {"model.num_layers": 2})
    assert mine.model._group is cfg.model._group
    assert mine.peft is mine.model and cfg.model.num_layers == 4


def test_newer_models_keep_their_fields_under_transformer() -> None:
    """The same dotted name reads and changes them."""
    cfg = Config(model={"transformer": Transformer(), "seq_length": 128})
    mine = changed(cfg, {"model.hidden_size": 32, "model.seq_length": 64})
    assert (Fields(mine).model("hidden_size"), Fields(mine).model("seq_length")) == (32, 64)
    assert Fields(cfg).model("hidden_size") == 64 and cfg.model["transformer"].hidden_size == 64


def test_fields_replace_and_default() -> None:
    """A changed value wins over the configuration's; None and a missing section give the default."""
    fields = Fields(Config(), {"model.num_layers": 8})
    assert (fields.model("num_layers"), fields.get("model", "num_layers")) == (8, 8)
    assert fields.get("peft", "dim", 32) == 32 and fields.get("nothing", "at_all", 1) == 1
    assert Fields.of(fields) is fields and fields.is_container and not Fields({"hidden_size": 8}).is_container


@pytest.mark.parametrize(("kv_channels", "channels"), [(None, 16), (128, 128)])
def test_channels_of_a_head(kv_channels: int | None, channels: int) -> None:
    """The width shared by the heads, unless the model fixes them."""
    fields = Fields({"hidden_size": 64, "num_attention_heads": 4, "kv_channels": kv_channels})
    assert fields.head_channels == channels


def test_bridges_own_container_is_copied_whole(bridge: Any) -> None:
    """No section of a recipe is shared with its changed copy, so that a forgotten one cannot leak into the original."""
    cfg = small.config()
    before, mine = config.flatten(cfg), changed(cfg, {"model.tensor_model_parallel_size": 4, "train.train_iters": 9})
    assert set(config.diff(cfg, mine).field) == {"model.tensor_model_parallel_size", "train.train_iters"}
    sections = [name for name, section in vars(cfg).items() if hasattr(section, "__dataclass_fields__")]
    assert len(sections) > 8 and all(getattr(mine, name) is not getattr(cfg, name) for name in sections)
    assert config.flatten(cfg) == before

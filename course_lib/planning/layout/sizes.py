"""What the layout rules speak about: a configuration's fields, the sizes of a layout, and a reason against it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import ceil, prod
from typing import Any

from course_lib.common.config import Fields


@dataclass(frozen=True)
class Refusal:
    """One reason why a layout cannot run.

    Attributes:
        field: The configuration field to change, e.g. ``model.tensor_model_parallel_size``.
        changes: Alternative remedies, each with new values by dotted field; ``ranks`` is the world size.
    """

    field: str
    message: str
    fix: str = ""
    changes: tuple[Mapping[str, Any], ...] = ()

    @property
    def kind(self) -> tuple[str, str]:
        """Equal for two refusals by the same rule about the same field, whatever the numbers."""
        return self.field, re.sub(r"\d+", "", self.message)

    @property
    def remedy(self) -> str:
        """The changes and the remark, as a sentence has them."""
        own = [change[self.field] for change in self.changes if set(change) == {self.field}]
        words = [f"choose {either(own)}"] if own else []
        for change in [change for change in self.changes if set(change) != {self.field}][:3]:
            same = len(set(map(repr, change.values()))) == 1
            each = [" and ".join(change)] if same else change
            values = list(change.values())
            words.append("set " + " and ".join(f"{name} to {value}" for name, value in zip(each, values, strict=False)))
        remark = f" ({self.fix})" if words and self.fix else self.fix
        return ", or ".join(words) + remark

    def __str__(self) -> str:
        return f"{self.field}: {self.message}: {self.remedy}"


class LayoutError(ValueError):
    """A layout cannot run; ``refusals`` holds every reason, not only the first."""

    def __init__(self, *refusals: Refusal) -> None:
        self.refusals = refusals
        super().__init__("\n".join(["this layout cannot run:", *(f"  - {refusal}" for refusal in refusals)]))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks of one run are divided.

    Attributes:
        tensor_model_parallel_size: TP, ranks that share each matrix.
        pipeline_model_parallel_size: PP, stages that share the layers.
        context_parallel_size: CP, ranks that share each sequence.
        expert_model_parallel_size: EP, ranks that share the experts of a layer.
        expert_tensor_parallel_size: ETP, ranks that share each expert's matrices; ``None`` as in Megatron.
        virtual_pipeline_model_parallel_size: Model chunks per stage, or ``None`` without interleaving.
        sequence_parallel: Whether activations between the tensor parallel regions are split along the sequence.

    >>> str(Layout(world_size=8, tensor_model_parallel_size=2))
    'TP=2 PP=1 DP=4'
    """

    world_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False

    @classmethod
    def from_config(cls, cfg: Any, *, ranks: int) -> Layout:
        """Read the layout that Bridge would use for a configuration.

        Args:
            cfg: A Bridge ``ConfigContainer``, a model provider, or the same as nested mappings (``config.yaml``).

        Returns:
            The layout.  Sequence parallelism without TP is dropped, as Bridge drops it.

        >>> Layout.from_config({"model": {"tensor_model_parallel_size": 4}}, ranks=8).data_parallel_size
        2
        """
        given = Fields.of(cfg)
        sizes = {field.name: given.model(field.name, field.default) for field in fields(cls)}
        layout = cls(**(sizes | {"world_size": ranks}))
        return replace(layout, sequence_parallel=layout.sequence_parallel and layout.tensor_model_parallel_size != 1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense part of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """DP, the copies of the model that read different samples.

        Raises:
            LayoutError: If TP x PP x CP does not divide the world size.
        """
        return self._copies(
            TP=("tensor_model_parallel_size", self.tensor_model_parallel_size),
            PP=("pipeline_model_parallel_size", self.pipeline_model_parallel_size),
            CP=("context_parallel_size", self.context_parallel_size),
        )

    @property
    def resolved_expert_tensor_parallel_size(self) -> int:
        """ETP as Bridge resolves ``None``: 1 as soon as EP > 1, otherwise TP."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size

    @property
    def expert_model_size(self) -> int:
        """Ranks that hold one copy of the experts: ETP x EP x PP."""
        stages = self.expert_model_parallel_size * self.pipeline_model_parallel_size
        return self.resolved_expert_tensor_parallel_size * stages

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert; differs from DP when EP > 1.

        Raises:
            LayoutError: If ETP x EP x PP does not divide the world size.
        """
        return self._copies(
            EP=("expert_model_parallel_size", self.expert_model_parallel_size),
            ETP=("expert_tensor_parallel_size", self.resolved_expert_tensor_parallel_size),
            PP=("pipeline_model_parallel_size", self.pipeline_model_parallel_size),
        )

    def _copies(self, **sizes: tuple[str, int]) -> int:
        group = prod(size for _, size in sizes.values())
        if self.world_size % group == 0:
            return self.world_size // group
        spelled = " x ".join(f"{name}={size}" for name, (_, size) in sizes.items())
        changes = [
            {f"model.{field}": fitting}
            for field, size in sizes.values()
            for fitting in divisors(self.world_size)
            if size > 1 and self.world_size % (group // size * fitting) == 0
        ]
        field = next(f"model.{field}" for field, size in sizes.values() if size > 1)
        message = f"{self.world_size} ranks cannot be divided into groups of {spelled} = {group}"
        raise LayoutError(Refusal(field, message, changes=({"ranks": next_multiple(group, self.world_size)}, *changes)))

    def __str__(self) -> str:
        copies = "?" if self.world_size % self.model_parallel_size else self.data_parallel_size
        text = f"TP={self.tensor_model_parallel_size} PP={self.pipeline_model_parallel_size} DP={copies}"
        text += f" CP={self.context_parallel_size}" if self.context_parallel_size > 1 else ""
        text += f" EP={self.expert_model_parallel_size}" if self.expert_model_parallel_size > 1 else ""
        chunks = self.virtual_pipeline_model_parallel_size
        return text + (f" VPP={chunks}" if chunks else "") + (" SP" if self.sequence_parallel else "")


def divisors(number: int) -> list[int]:
    """Whole numbers that divide it.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [size for size in range(1, number + 1) if number % size == 0]


def next_multiple(size: int, value: int) -> int:
    """The smallest multiple of a size that is not below a value."""
    return ceil(value / size) * size


def either(choices: Iterable[object]) -> str:
    """Choices as a sentence has them.

    >>> either([1, 2, 4]), either([1])
    ('1, 2 or 4', '1')
    """
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last

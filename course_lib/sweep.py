"""Change one variable and say what it did: runs under several seeds, a difference, and a verdict with its noise.

A sweep compares two configurations that differ in exactly one field, which `recipes.diff` proves before anything runs.
Each is trained once for every seed.  The seeds say how much the result moves when *nothing* is changed, and only a
difference beyond that is called one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import launch, layout, recipes, runs, stack

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Change", "Comparison", "NotOneChange", "compare", "held_out", "moved", "one_change", "repeat", "seeded"]

SEED_FIELDS = ("rng.seed", "dataset.random_seed")
"""The two seeds of a run: first weights (and dropout), and the order of the data."""

CONFIDENCE = 0.95


class NotOneChange(ValueError):
    """Two configurations differ in no field, or in more than one variable."""


@dataclass(frozen=True)
class Change:
    """The one field in which two configurations differ."""

    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Comparison:
    """What a change did.

    Attributes:
        change: The field that was changed.
        before: Held-out loss of each seed without the change, nats per token.
        after: The same with it.
        difference: Mean of `after` minus mean of `before`; negative is better.
        noise: Half width of the 95% interval of that difference, nats per token.
    """

    change: Change
    before: tuple[float, ...]
    after: tuple[float, ...]
    difference: float
    noise: float

    @classmethod
    def of(cls, change: Change, before: Sequence[float], after: Sequence[float]) -> Comparison:
        """Compare two groups of results by Welch's interval, which lets the two groups spread differently.

        Raises:
            ValueError: If a group has fewer than two results: one result has no spread.

        >>> quiet = Comparison.of(Change("x", 1, 2), [5.0, 5.1, 5.2], [5.02, 5.12, 5.16])
        >>> quiet.verdict
        'no difference beyond noise'
        >>> Comparison.of(Change("x", 1, 2), [5.0, 5.1, 5.2], [6.0, 6.1, 6.2]).verdict
        'worse'
        """
        if min(len(before), len(after)) < 2:
            raise ValueError(f"{len(before)} and {len(after)} results: each side needs two seeds or more, better three")
        difference = statistics.fmean(after) - statistics.fmean(before)
        return cls(change, tuple(before), tuple(after), difference, _half_width(before, after))

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"` or `"no difference beyond noise"`."""
        if not abs(self.difference) > self.noise:
            return "no difference beyond noise"
        return "better" if self.difference < 0 else "worse"

    def __str__(self) -> str:
        return f"{self.change}: {self.difference:+.3f} +- {self.noise:.3f} nats/token, {self.verdict}"


def one_change(before: Any, after: Any, *, tied: Sequence[str] = ()) -> Change:
    """Prove that two configurations differ in exactly one field.

    Args:
        before: A configuration, as for `recipes.diff`.
        after: The changed copy.
        tied: Fields that must follow the changed one, such as the number of steps when the batch grows and the tokens
            are to stay equal; they may differ as well.

    Raises:
        NotOneChange: If nothing differs, or more than one field that is not tied.

    >>> print(one_change({"optimizer": {"lr": 1e-3}}, {"optimizer": {"lr": 2e-3}}))
    optimizer.lr: 0.001 -> 0.002
    """
    table = recipes.diff(before, after)
    free = table[~table["field"].isin(tied)]
    changes = [Change(*row) for row in free.itertuples(index=False, name=None)]
    if not changes:
        raise NotOneChange("the configurations do not differ: change one field of the copy")
    if len(changes) > 1:
        listed = "; ".join(map(str, changes))
        raise NotOneChange(
            f"{len(changes)} fields differ ({listed}), so no result could be blamed on one of them. "
            "Change one at a time, or name in tied=[...] those that only follow from the other"
        )
    return changes[0]


def seeded(cfg: Any, seed: int) -> Any:
    """A copy of a configuration with both seeds set: first weights, and order of the data.

    Args:
        cfg: Bridge's `ConfigContainer`; it stays as it is.
        seed: A positive number; Bridge refuses others.
    """
    mine = copy.deepcopy(cfg)
    mine.rng.seed = mine.dataset.random_seed = seed
    return mine


def repeat(cfg: Any, *, seeds: Sequence[int], name: str, ranks: int = 8, show: str | None = None) -> list[runs.Run]:
    """Train a configuration once for each seed; a run that was finished before is read instead of run again.

    Finished means: the same configuration, ranks, versions and data files, and the run succeeded.  So a sweep that was
    stopped goes on where it stopped, and a configuration shared by two comparisons is trained once.

    Args:
        cfg: Bridge's `ConfigContainer`.
        seeds: Positive numbers, each once.
        name: Beginning of the run directories' names.
        ranks: World size.
        show: As for `launch.run`.

    Returns:
        One run a seed, in the order of `seeds`.
    """
    if len(set(seeds)) != len(seeds) or min(seeds, default=0) < 1:
        raise ValueError(f"seeds={list(seeds)}: give different whole numbers from 1 up")
    found = []
    for seed in seeds:
        mine = seeded(cfg, seed)
        digest = _digest(mine, ranks)
        run = _finished(digest)
        if run is None:
            run = launch.run(mine, ranks=ranks, name=f"{name}-seed{seed}", show=show)
            runs.write_json(run.path / "sweep.json", {"digest": digest, "seed": seed})
            print(f"{run.name}: trained, held-out loss {held_out(run):.3f}")
        else:
            print(f"{run.name}: finished before, held-out loss {held_out(run):.3f}")
        found.append(run)
    return found


def compare(
    before: Any, after: Any, *, seeds: Sequence[int], name: str, ranks: int = 8, tied: Sequence[str] = ()
) -> Comparison:
    """Run two configurations under the same seeds and say whether the change made a difference.

    Args:
        before: Bridge's `ConfigContainer`.
        after: The copy with one field changed.
        seeds: As for :func:`repeat`.
        name: What the change is called; names the runs.
        ranks: World size.
        tied: As for :func:`one_change`.

    Raises:
        NotOneChange: Before anything runs.
    """
    change = one_change(before, after, tied=tied)
    base = repeat(before, seeds=seeds, name="base", ranks=ranks)
    changed = repeat(after, seeds=seeds, name=name, ranks=ranks)
    return Comparison.of(change, [held_out(run) for run in base], [held_out(run) for run in changed])


def held_out(run: runs.Run) -> float:
    """The last held-out loss of a run, nats per token.

    Raises:
        ValueError: If the run was never evaluated.
    """
    if run.validation.empty:
        raise ValueError(f"run {run.name!r} has no held-out loss: set cfg.validation.eval_iters above 0")
    return float(run.validation["loss"].iloc[-1])


def moved(before: Any, after: Any, *, ranks: int = 8) -> pd.DataFrame:
    """What else moves when a field is changed: quantities that follow from several fields.

    Returns:
        One row for each of these that differs: sequences drawn (they also decide the order of the data), training
        tokens, tokens per step, micro-batches per step, data-parallel size.
    """
    import pandas as pd

    one, other = _derived(before, ranks), _derived(after, ranks)
    rows = [(name, one[name], other[name]) for name in one if one[name] != other[name]]
    return pd.DataFrame(rows, columns=["quantity", "before", "after"]).set_index("quantity")


def _derived(cfg: Any, ranks: int) -> dict[str, int]:
    parallel = layout.Layout.from_config(cfg, ranks=ranks).data_parallel_size
    batch, length = cfg.train.global_batch_size, cfg.model.seq_length
    return {
        "data-parallel size": parallel,
        "micro-batches in a step": batch // (cfg.train.micro_batch_size * parallel),
        "tokens in a step": batch * length,
        "sequences in the run": batch * cfg.train.train_iters,
        "tokens in the run": batch * length * cfg.train.train_iters,
    }


def _half_width(one: Sequence[float], other: Sequence[float]) -> float:
    """Half of Welch's 95% interval for the difference of two means."""
    from scipy.stats import t

    shares = [statistics.variance(group) / len(group) for group in (one, other)]
    total = sum(shares)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(s**2 / (len(g) - 1) for s, g in zip(shares, (one, other), strict=True))
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)


def _digest(cfg: Any, ranks: int) -> str:
    """A number that is equal for runs that must give the same result."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        cfg.to_yaml(str(path))
        text = path.read_text()
    data = [
        _stamp(value) for value in sorted({str(leaf) for leaf in _leaves(recipes.flatten(cfg)) if "/" in str(leaf)})
    ]
    whole = json.dumps([text, data, ranks, stack.device(ranks), stack.versions()])
    return hashlib.sha256(whole.encode()).hexdigest()


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _stamp(name: str) -> list[Any]:
    """Size and time of the files behind a path or a data prefix, so that new data means a new run."""
    files = [Path(name), Path(f"{name}.bin"), Path(f"{name}.idx")]
    files += sorted(files[0].iterdir()) if files[0].is_dir() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _finished(digest: str) -> runs.Run | None:
    for run in runs.listing():
        note = run.path / "sweep.json"
        if note.exists() and json.loads(note.read_text())["digest"] == digest:
            return run  # the note is written after success only
    return None

"""Change one variable and say what it did: runs under several seeds, a difference, and a verdict with its noise.

A sweep compares two configurations that differ in exactly one field, which `recipes.diff` proves before anything runs.
Each is trained once for every seed.  The seeds say how much the result moves when *nothing* is changed, and only a
difference beyond that is called one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib import launch, runs, stack
from course_lib.common import files
from course_lib.common.config import changed, diff, flatten
from course_lib.common.project import LIBRARY
from course_lib.common.screen import Line
from course_lib.common.units import duration
from course_lib.launch import forkserver
from course_lib.planning import layout

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Change",
    "Comparison",
    "NotOneChange",
    "compare",
    "digest",
    "find",
    "held_out",
    "moved",
    "note",
    "one_change",
    "readings",
    "repeat",
    "seeded",
]

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
        before: Held-out loss of each seed without the change, nats per token.
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
        """`"better"`, `"worse"`, `"no difference beyond noise"`, or `"diverged"` where a loss is no number."""
        if not math.isfinite(self.difference):
            return "diverged"
        if not abs(self.difference) > self.noise:
            return "no difference beyond noise"
        return "better" if self.difference < 0 else "worse"

    @property
    def paired_noise(self) -> float:
        """Half width of the 95% interval of the difference within a seed; for results in the same order of seeds.

        What a seed does to both results of a pair cancels, so this is the shorter one where a change disturbs neither
        the first weights nor the order of the data.

        >>> round(Comparison.of(Change("x", 1, 2), [5.0, 5.1, 5.2], [5.02, 5.12, 5.23]).paired_noise, 3)
        0.014
        """
        from scipy.stats import t

        within = [after - before for before, after in zip(self.before, self.after, strict=True)]
        share = statistics.stdev(within) / math.sqrt(len(within))
        return float(t.ppf((1 + CONFIDENCE) / 2, len(within) - 1)) * share

    def __str__(self) -> str:
        return f"{self.change}: {self.difference:+.3f} +- {self.noise:.3f} nats/token, {self.verdict}"


def one_change(before: Any, after: Any, *, tied: Sequence[str] = ()) -> Change:
    """Prove that two configurations differ in exactly one field.

    Args:
        before: A configuration, as for `recipes.diff`.
        tied: Fields that must follow the changed one, such as the number of steps when the batch grows and the tokens
            are to stay equal; they may differ as well.

    Raises:
        NotOneChange: If nothing differs, or more than one field that is not tied.

    >>> print(one_change({"optimizer": {"lr": 1e-3}}, {"optimizer": {"lr": 2e-3}}))
    optimizer.lr: 0.001 -> 0.002
    """
    table = diff(before, after)
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
    return changed(cfg, {"rng.seed": seed, "dataset.random_seed": seed})


def repeat(
    cfg: Any,
    *,
    seeds: Sequence[int],
    name: str,
    ranks: int = 8,
    show: str | None = None,
    watch: Callable[[runs.Run], object] | None = None,
) -> list[runs.Run]:
    """Train a configuration once for each seed; a run that was finished before is read instead of run again.

    Finished means: the same configuration, ranks, versions and data, and the run succeeded.  So a sweep that was
    stopped, or whose notebook was closed, goes on where it stopped: a run that failed or was interrupted is trained
    again from its first step.  A configuration shared by two comparisons is trained once.

    While it waits, one line says which run of how many it is at, which step, and how long the rest will take.

    Args:
        cfg: Bridge's `ConfigContainer`.
        seeds: Positive numbers, each once.
        name: Beginning of the run directories' names.
        show: As for `launch.run`.
        watch: As for `launch.run`.

    Returns:
        One run a seed, in the order of `seeds`.
    """
    if len(set(seeds)) != len(seeds) or min(seeds, default=0) < 1:
        raise ValueError(f"seeds={list(seeds)}: give different whole numbers from 1 up")
    digests = {seed: digest(seeded(cfg, seed), ranks) for seed in seeds}
    found = {seed: run for seed in seeds if (run := find(digests[seed])) is not None}
    if found:
        known = ", ".join(f"seed {seed} {held_out(run):.3f}" for seed, run in found.items())
        print(f"{name}, finished before: {known} nats/token")
    waiting = _Waiting(name, missing=len(seeds) - len(found))
    try:
        for seed in [seed for seed in seeds if seed not in found]:
            waiting.begins(seed)
            run = launch.run(
                seeded(cfg, seed),
                ranks=ranks,
                name=f"{name}-seed{seed}",
                show=show,
                watch=lambda run: (waiting.watch(run), watch and watch(run)),
            )
            loss = held_out(run)
            note(run, digest=digests[seed], seed=seed)
            found[seed] = run
            waiting.ends(f"{name}, seed {seed}: trained as {run.name}, held-out loss {loss:.3f} nats/token")
    finally:
        waiting.close()
    return [found[seed] for seed in seeds]


class _Waiting:
    """What a waiting learner reads: run, step, and an estimate from the runs that have ended."""

    def __init__(self, name: str, *, missing: int) -> None:
        self._name, self._missing, self._ended = name, missing, 0
        self._line, self._seed, self._first = Line(), 0, time.monotonic()
        self._last = self._first

    def begins(self, seed: int) -> None:
        self._seed = seed
        self._line.say(self._words("starting ranks"), now=True)

    def watch(self, run: runs.Run) -> None:
        steps = len(run.metrics)
        self._line.say(self._words(f"step {steps} of {run.launch['train_iters']}" if steps else run.stage()))

    def ends(self, words: str) -> None:
        self._ended, self._last = self._ended + 1, time.monotonic()
        print(words)

    def close(self) -> None:
        if self._missing:
            spent = duration(time.monotonic() - self._first)
            self._line.close(f"{self._name}: {self._ended} of {self._missing} runs trained in {spent}")

    def _words(self, doing: str) -> str:
        left = "time left not known yet"
        if self._ended:
            each = (self._last - self._first) / self._ended
            seconds = each * (self._missing - self._ended) - (time.monotonic() - self._last)
            left = f"about {duration(seconds, rough=True)} left" if seconds > 0 else "longer than the others"
        return f"{self._name}: run {self._ended + 1} of {self._missing} (seed {self._seed}), {doing}, {left}"


def compare(
    before: Any, after: Any, *, seeds: Sequence[int], name: str, ranks: int = 8, tied: Sequence[str] = ()
) -> Comparison:
    """Run two configurations under the same seeds and say whether the change made a difference.

    Args:
        before: Bridge's `ConfigContainer`.
        seeds: As for :func:`repeat`.
        tied: As for :func:`one_change`.

    Raises:
        NotOneChange: Before anything runs.
    """
    change = one_change(before, after, tied=tied)
    base = repeat(before, seeds=seeds, name="base", ranks=ranks)
    changed = repeat(after, seeds=seeds, name=name, ranks=ranks)
    return Comparison.of(change, [held_out(run) for run in base], [held_out(run) for run in changed])


def readings(comparisons: Mapping[str, Comparison]) -> pd.DataFrame:
    """The same runs read twice: each base run against each changed one, and only against that of its own seed.

    Returns:
        Two rows a comparison, `"NAME, crossed"` and `"NAME, paired"`: how many differences there are, how many are
        worse, the lowest and the highest, and half the width of the 95% interval, nats per token.
    """
    import pandas as pd

    rows: dict[str, list[float]] = {}
    for name, one in comparisons.items():
        crossed = [after - before for before in one.before for after in one.after]
        paired = [after - before for before, after in zip(one.before, one.after, strict=True)]
        for way, each, noise in (("crossed", crossed, one.noise), ("paired", paired, one.paired_noise)):
            rows[f"{name}, {way}"] = [len(each), sum(loss > 0 for loss in each), min(each), max(each), noise]
    columns = ["experiments", "worse", "lowest", "highest", "95% interval, +-"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


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
        One row for each of these that differs: sequences drawn (beyond one pass they also decide the order of the data), training
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


WHERE_A_RUN_WRITES = ("checkpoint.save", "checkpoint.load", "logger.tensorboard_dir")
"""A recipe sets these to folders of the directory in which it was called; `launch.run` sets its own."""
MADE_BESIDE_DATA = (".idx.npy", ".idx.info")
"""Ends of the names of what Bridge writes beside JSONL when it first reads it."""
MOST_BYTES_READ = 256 * 2**20
"""A data file up to this size is told from another by its contents, a larger one by size and time."""


def digest(cfg: Any, ranks: int) -> str:
    """A number that is equal for runs that must give the same result.

    Args:
        cfg: Bridge's `ConfigContainer`, seeds included.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        cfg = changed(cfg, dict.fromkeys(WHERE_A_RUN_WRITES))
        cfg.to_yaml(str(path))
        text = path.read_text()
    leaves = {str(leaf) for leaf in _leaves(flatten(cfg)) if isinstance(leaf, str | Path)} - {"", "."}
    data = [_stamp(value) for value in sorted(leaves)]
    whole = json.dumps([text, data, ranks, stack.device(ranks), stack.versions(), _engine()])
    return hashlib.sha256(whole.encode()).hexdigest()


def _engine(course_lib: Path = LIBRARY) -> str:
    """What this project itself does in a rank: its sums, its norms, its settings for a CPU can change a result too."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in forkserver.rank_code(course_lib))).hexdigest()


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _stamp(name: str) -> list[Any]:
    """What is in the files behind a path or a data prefix, so that new data means a new run and the same data does not.

    A notebook that is run again writes its small files again: their contents count, not their time.  Large ones would
    take too long to read, so for them size and time stand in.
    """
    behind = [Path(name), Path(f"{name}.bin"), Path(f"{name}.idx")]
    if os.path.isdir(name) and not os.path.isfile(f"{name}.bin"):  # below a data prefix Megatron keeps its own indices
        behind += sorted(Path(name).rglob("*"))
    # os.path, because a text that is no path may be too long for one, which pathlib takes for an error
    kept = [file for file in behind if not file.name.endswith(MADE_BESIDE_DATA)]
    return [[str(file), _content(file)] for file in kept if os.path.isfile(file)]


def _content(file: Path) -> str | list[int]:
    about = file.stat()
    if about.st_size > MOST_BYTES_READ:
        return [about.st_size, about.st_mtime_ns]
    return files.sha256(file)


def note(run: runs.Run, *, digest: str, seed: int) -> None:
    """Write into a run's directory that it is whole; only after success."""
    runs.write_json(run.path / "sweep.json", {"digest": digest, "seed": seed})


def find(digest: str, *, where: Callable[[runs.Run], bool] = lambda run: True) -> runs.Run | None:
    """The newest finished run with this digest of which `where` is true, or None."""
    for run in runs.listing():
        path = run.path / "sweep.json"
        if path.exists() and json.loads(path.read_text())["digest"] == digest and where(run):
            return run
    return None

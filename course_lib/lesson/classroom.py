"""The ledgers of a class: one table of who guessed what and solved what, as CSV and as a picture.

Each learner hands over a copy of the ledger; its file's name is all that says whose it is, so it may be a number.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.common.files import replacing
from course_lib.figures import plots
from course_lib.lesson import ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["ClassError", "collect", "draw", "write"]

COLUMNS = ["learner", "lesson", "kind", "name", "guess / measured", "course / measured", "attempts", "right"]


class ClassError(ValueError):
    """There is no ledger to collect, or two have one name."""


def collect(files: Sequence[Path]) -> DataFrame:
    """Put ledgers together.

    Args:
        files: One a learner, `ledger.json` under the learner's name or number; a folder stands for all `.json` in it.

    Returns:
        One row a scored guess (`kind` is "guess") or a tried exercise ("exercise") of each learner, with what is known
        of it.

    Raises:
        ClassError: If there is no file, or two have the same name.
        LedgerError: If one cannot be read; names it.
    """
    import pandas as pd

    found = [file for place in files for file in (sorted(place.glob("*.json")) if place.is_dir() else [place])]
    missing = [str(file) for file in found if not file.is_file()]
    if not found or missing:
        raise ClassError(f"no ledger: {', '.join(missing) or ', '.join(map(str, files)) or 'nothing was given'}")
    names = [file.stem for file in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ClassError(
            f"two ledgers are called {', '.join(twice)}: give each learner a name or a number of their own"
        )
    parts = [pd.DataFrame(columns=COLUMNS)]
    for file in found:
        guesses, tried = ledger.scores(file=file), ledger.exercises(file=file)
        guesses = guesses.set_axis(["lesson", "name", "guess / measured", "course / measured"], axis=1)
        tried = tried.assign(right=tried.state == "right").drop(columns="state").rename(columns={"exercise": "name"})
        for kind, rows in (("guess", guesses), ("exercise", tried)):
            if len(rows):
                parts.append(rows.assign(learner=file.stem, kind=kind).reindex(columns=COLUMNS))
    return pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]


def draw(together: DataFrame, *, axes: Sequence[Axes]) -> None:
    """Draw by how many times guesses were off, a dot each, and how many of those who tried an exercise solved it.

    Args:
        together: What `collect` returns.
        axes: Two, side by side; both have a row a lesson.
    """
    from matplotlib.ticker import LogLocator

    lessons = sorted(together.lesson.unique())
    left, right = axes
    guesses, tried = (together[together.kind == kind] for kind in ("guess", "exercise"))
    off = guesses["guess / measured"].map(lambda ratio: min(max(ratio, 1 / ratio), ledger.AT_MOST))
    left.plot(off, [lessons.index(one) for one in guesses.lesson], "o", alpha=0.5, color=plots.COLOURS["blue"])
    middles = {lesson: statistics.median(off[guesses.lesson == lesson]) for lesson in guesses.lesson.unique()}
    left.plot(
        middles.values(), [lessons.index(one) for one in middles], "|", markersize=18, color=plots.COLOURS["vermilion"]
    )
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("")
    shares = {lesson: float(rows.right.astype(bool).mean()) for lesson, rows in tried.groupby("lesson")}
    places = [lessons.index(one) for one in shares]
    right.barh(places, [100 * share for share in shares.values()], color=plots.COLOURS["green"])
    right.set_xlim(0, 100)
    for ax in axes:
        ax.set_yticks(range(len(lessons)), [lesson.upper() for lesson in lessons])
        ax.set_ylim(len(lessons) - 0.5, -0.5)
    said = [
        f"lesson {lesson.upper()}: guesses are off by a factor of {middle:.2g}" for lesson, middle in middles.items()
    ]
    title = "By how many times guesses are off (line: median)"
    plots.finish(
        left,
        x=f"factor: 1 is exact, {ledger.AT_MOST:g} is that or more",
        y="lesson",
        title=title,
        sentences=said,
        whole_x=False,
    )
    said = [
        f"lesson {lesson.upper()}: {share:.0%} of the tried exercises are right" for lesson, share in shares.items()
    ]
    plots.finish(right, x="% of those tried", y="", title="Exercises that are right", sentences=said, whole_x=False)


def write(files: Sequence[Path], to: Path) -> tuple[Path, Path]:
    """Write the table and the picture of a class, each whole or not at all.

    Args:
        files: As for `collect`.
        to: The table, a `.csv`; the picture stands beside it, with the same name.

    Returns:
        Both files.
    """
    from matplotlib.figure import Figure

    together = collect(files)
    table, picture = to.with_suffix(".csv"), to.with_suffix(".png")
    with plots.style():
        figure = Figure(figsize=(10, 1.6 + 0.3 * together.lesson.nunique()), layout="constrained")
        if len(together):
            draw(together, axes=figure.subplots(1, 2))
        drawn = plots.png(figure)
    for file, content in ((table, together.to_csv(index=False).encode()), (picture, drawn)):
        with replacing(file) as half:
            half.write_bytes(content)
    return table, picture

"""One picture for each cut of a run (matrix, batch, stack of layers, sequence, state), and 1F1B step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from course_lib.figures.plots import COLOURS, INK

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["batch", "layers", "matrix", "pipeline_steps", "sequence", "shards"]

_LOOKS = [{"facecolor": COLOURS["blue"]}, {"facecolor": COLOURS["vermilion"], "hatch": "///"}]
_LOOKS += [{"facecolor": COLOURS["green"], "hatch": ".."}, {"facecolor": COLOURS["purple"], "hatch": "xx"}]
"""Of four ranks, each told from the others without colour, too."""


def _block(ax: Axes, left: float, low: float, wide: float, high: float, rank: int | None = None) -> None:
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = {"facecolor": "none"} if rank is None else _LOOKS[rank]
    ax.add_patch(Rectangle((left, low), wide, high, edgecolor=INK, linewidth=1.2, alpha=0.8, **look))


def matrix(*, ax: Axes) -> Axes:
    """Draw the two matrix products of an MLP on two ranks, each rank's part in its own colour and hatch.

    A^T is cut by columns and B^T by rows, so that the middle is cut alike, and the two results are summands.
    """
    _block(ax, 0, 1.5, 2, 1)  # x
    for rank in (0, 1):
        _block(ax, 3 + 1.5 * rank, 1, 1.5, 2, rank)  # A^T, by columns
        _block(ax, 7 + 1.5 * rank, 1.5, 1.5, 1, rank)  # the middle
        _block(ax, 11, 2 - 1.5 * rank, 2, 1.5, rank)  # B^T, by rows
        _block(ax, 14, 2.25 - 1.5 * rank, 2, 1, rank)  # the summands
    _block(ax, 17.6, 1.5, 2, 1)  # y
    for at, low, text in (
        (1, 2.6, "$x$"), (4.5, 3.1, "$A^T$"), (8.5, 2.6, "$f(x A^T)$"), (12, 3.6, "$B^T$"), (15, 3.35, "summands"),
        (18.6, 2.6, "$y$"), (2.5, 1.9, "$\\times$"), (6.5, 1.9, "$\\to$"), (10.5, 1.9, "$\\times$"), (13.5, 1.9, "="),
        (15, 1.9, "+"), (16.8, 1.9, "="),
    ):  # fmt: skip
        ax.text(at, low, text, ha="center")
    ax.set(xlim=(-0.3, 20), ylim=(0.2, 4.2))
    ax.set_label("The first matrix is cut by columns, the second by rows: each of two ranks has one summand of y")
    return _drawn(ax)


def batch(*, ax: Axes, ranks: int = 2, layers: int = 4, sequences: int = 4) -> Axes:
    """Draw data parallelism: each rank has all layers, and other sequences of the batch."""
    for rank in range(ranks):
        left = 3.4 * rank
        for layer in range(layers):
            _block(ax, left, 0.6 * layer, 2, 0.5, rank)
        for own in range(sequences // ranks):
            number = rank * sequences // ranks + own
            _block(ax, left + 1.05 * own, -1.2, 0.95, 0.5, rank)
            ax.text(left + 1.05 * own + 0.475, -0.95, str(number), ha="center", va="center", color="white")
        ax.text(left + 1, 0.6 * layers + 0.15, f"rank {rank}", ha="center")
        ax.annotate("", (left + 1, -0.05), (left + 1, -0.65), arrowprops={"arrowstyle": "->", "color": INK})
    middle = (3.4 * (ranks - 1) + 2) / 2
    ax.text(middle, -1.75, f"{sequences} sequences of a batch", ha="center")
    ax.text(middle, 0.3 * layers - 0.1, "sum of\ngradients", ha="center", va="center", fontsize=8)
    ax.set(xlim=(-0.3, 3.4 * ranks - 1.1), ylim=(-2.1, 0.6 * layers + 0.7))
    ax.set_label(f"Each of {ranks} ranks has all {layers} layers and {sequences // ranks} of {sequences} sequences")
    return _drawn(ax)


def layers(*, ax: Axes, ranks: int = 2, layers: int = 4, sequences: int = 4) -> Axes:
    """Draw pipeline parallelism: each rank has a part of the layers, and every sequence passes all of them."""
    for layer in range(layers):
        rank = layer * ranks // layers
        _block(ax, 0, 0.6 * layer + 0.3 * rank, 4.1, 0.5, rank)
    for rank in range(ranks):
        middle = 0.6 * (rank + 0.5) * layers / ranks + 0.3 * rank
        ax.text(4.3, middle - 0.05, f"rank {rank}\nstage {rank}", va="center")
    for number in range(sequences):
        _block(ax, 1.05 * number, -1.2, 0.95, 0.5)
        ax.text(1.05 * number + 0.475, -0.95, str(number), ha="center", va="center")
    ax.annotate("", (2.05, -0.05), (2.05, -0.65), arrowprops={"arrowstyle": "->", "color": INK})
    ax.text(2.05, -1.75, f"{sequences} sequences of a batch", ha="center")
    ax.set(xlim=(-0.3, 6), ylim=(-2.1, 0.6 * layers + 0.3 * ranks + 0.4))
    ax.set_label(
        f"Each of {ranks} ranks has {layers // ranks} of {layers} layers, and all {sequences} sequences pass them"
    )
    return _drawn(ax)


def sequence(*, ax: Axes, ranks: int = 2) -> Axes:
    """Draw context parallelism: the pieces of a sequence as rows of its attention, in the colour of the rank that has them.

    A rank takes one early and one late piece, so that all have as many pairs of a query and a key.
    """
    pieces = 2 * ranks
    for row in range(pieces):
        rank = min(row, pieces - 1 - row)
        for column in range(row + 1):
            _block(ax, column, pieces - 1 - row, 1, 1, rank)
        ax.text(-0.2, pieces - 0.5 - row, f"piece {row}: rank {rank}", ha="right", va="center")
    ax.text(pieces / 2, -0.5, "keys and values, by piece", ha="center")
    ax.set(xlim=(-2.6, pieces + 0.2), ylim=(-0.8, pieces + 0.2))
    shares = "; ".join(f"rank {rank} has pieces {rank} and {pieces - 1 - rank}" for rank in range(ranks))
    ax.set_label(f"A sequence in {pieces} pieces, a row of causal attention each: {shares}")
    return _drawn(ax)


def shards(*, ax: Axes, ranks: int = 4, layers: int = 3, at_work: int = 1) -> Axes:
    """Draw FSDP2: each rank keeps a part of every layer, and has all parts of the layer that is at work."""
    for rank in range(ranks):
        for layer in range(layers):
            for owner in range(ranks):
                if owner == rank or layer == at_work:
                    _block(ax, (0.5 * ranks + 0.6) * rank + 0.5 * owner, 0.8 * layer, 0.5, 0.6, owner)
        ax.text((0.5 * ranks + 0.6) * rank + 0.25 * ranks, 0.8 * layers, f"rank {rank}", ha="center")
    for layer in range(layers):
        state = "at work" if layer == at_work else "at rest"
        ax.text(-0.2, 0.8 * layer + 0.3, f"layer {layer}: {state}", ha="right", va="center")
    ax.set(xlim=(-3.2, (0.5 * ranks + 0.6) * ranks), ylim=(-0.2, 0.8 * layers + 0.5))
    ax.set_label(
        f"Each of {ranks} ranks keeps a part of {layers} layers; layer {at_work} is at work and whole on all of them"
    )
    return _drawn(ax)


def _drawn(ax: Axes) -> Axes:
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


_SCRIPT = "this.closest('figure').style.setProperty('--now', this.value)"
_PLAY = (
    "const slider = this.nextElementSibling; slider.value = 0;"
    "const clock = setInterval(() => { slider.stepUp(); slider.oninput();"
    " if (slider.value === slider.max) clearInterval(clock) }, 400)"
)


class _Page:
    """HTML that a notebook and the book show, with no kernel behind it."""

    def __init__(self, html: str, words: str) -> None:
        self._html, self._words = html, words

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/html": self._html, "text/plain": self._words}


def pipeline_steps(rows: pd.DataFrame, *, title: str) -> Any:
    """Passes of a pipeline that appear one after the other: a slider sets the time, also where no kernel runs.

    The last column of each stage counts the microbatches whose activations it keeps at that time.

    Args:
        rows: What `pipeline.replay` returned.

    Returns:
        What JupyterLab and the book draw when it is the last line of a cell.
    """
    from html import escape

    times = sorted({0.0, *rows.begin, *rows.end})
    tick = {time: number for number, time in enumerate(times)}
    stages, last = int(rows.stage.max()) + 1, len(times) - 1
    wide, high = 600 / rows.end.max(), 34
    looks = {"forward": COLOURS["blue"], "backward": COLOURS["vermilion"]}
    drawn = []
    for row in rows.itertuples():
        left, top, width = 62 + row.begin * wide, 8 + row.stage * high, (row.end - row.begin) * wide
        text = (
            f'<text x="{left + width / 2:.1f}" y="{top + 18}" fill="#fff" text-anchor="middle">{row.microbatch}</text>'
        )
        dashes = ' stroke="#fff" stroke-width="2" stroke-dasharray="5 3"' if row.kind == "backward" else ""
        box = f'<rect x="{left:.1f}" y="{top}" width="{width - 1:.1f}" height="26" fill="{looks[row.kind]}"{dashes}/>'
        drawn.append(f'<g style="opacity: clamp(0.12, calc(var(--now) - {tick[row.begin]}), 1)">{box}{text}</g>')
    for stage, own in rows.groupby("stage"):
        y = 26 + stage * high
        drawn.append(f'<text x="0" y="{y}">stage {stage}</text>')
        changes = {0: 0}
        for row in own.sort_values("end").itertuples():
            moment = tick[row.begin] + 1 if row.kind == "forward" else tick[row.end]
            changes[moment] = list(changes.values())[-1] + (1 if row.kind == "forward" else -1)
        moments = [*changes, last + 1]
        for begin, end in zip(moments, moments[1:], strict=False):
            seen = f"min(clamp(0, calc(var(--now) - {begin - 1}), 1), clamp(0, calc({end} - var(--now)), 1))"
            drawn.append(f'<text x="676" y="{y}" style="opacity: {seen}">keeps {changes[begin]}</text>')
    passed = rows.sort_values("end").assign(kept=lambda found: found.kind.map({"forward": 1, "backward": -1}))
    most = passed.groupby("stage").kept.agg(lambda changes: changes.cumsum().max())
    words = f"{title}: {rows.microbatch.nunique()} microbatches on {stages} stages; "
    words += ", ".join(f"stage {stage} keeps {count} at most" for stage, count in most.items())
    size = f'viewBox="0 0 740 {stages * high + 8}" style="width: 100%; max-width: 740px; font: 13px sans-serif"'
    picture = f'<svg {size} fill="currentColor" role="img" aria-label="{escape(words)}">{"".join(drawn)}</svg>'
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="time" oninput="{_SCRIPT}"'
    controls = f'<button onclick="{_PLAY}">Play</button>{slider} style="flex: 1">'
    controls = f'<div style="display: flex; gap: 8px; max-width: 740px">{controls}</div>'
    legend = "<small>Plain: forward; dashed edge: backward. A number is a microbatch.</small>"
    head = f'<figure class="steps" style="--now: {last}; margin: 0"><b>{escape(title)}</b>'
    return _Page(f"{head}{picture}{controls}{legend}</figure>", words)

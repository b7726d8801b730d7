"""Pictures of a hybrid model: its layers in a row, what tokens of a state-space layer keep, and what length costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_lib.figures import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LETTERS", "growth", "influence", "layers"]

LETTERS = {"M": "Mamba", "*": "attention", "-": "feed-forward", "E": "experts"}


def layers(patterns: Mapping[str, str], *, ax: Axes, title: str) -> Axes:
    """Draw each model's pattern as a row of squares, a square a layer, a colour a kind."""
    from matplotlib.patches import Patch

    colours = dict(zip(LETTERS, plots.COLOURS.values(), strict=False))
    for row, pattern in enumerate(patterns.values()):
        for place, letter in enumerate(pattern):
            ax.add_patch(_square(place, row, colours[letter]))
            ax.text(place + 0.5, row, letter, ha="center", va="center", fontsize=7, color="#FFFFFF")
    ax.set_yticks(range(len(patterns)), patterns)
    ax.set_xlim(0, max(map(len, patterns.values())))
    ax.set_ylim(len(patterns) - 0.4, -0.6)
    ax.grid(visible=False)
    handles = [Patch(color=colours[letter], label=f"{letter} {name}") for letter, name in LETTERS.items()]
    ax.figure.legend(handles=handles, ncols=4, loc="outside lower center", frameon=False)
    sentences = [
        f"{name} has " + ", ".join(f"{pattern.count(letter)} {kind} layers" for letter, kind in LETTERS.items())
        for name, pattern in patterns.items()
    ]
    plots.finish(ax, x="layer", y="", title=title, sentences=sentences)
    return ax


def _square(place: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((place + 0.05, row - 0.4), 0.9, 0.8, color=colour)


def influence(left: Any, *, chunk: int, ax: Axes, title: str) -> Axes:
    """Draw what is left at each token of what an earlier one wrote, with the borders of chunks.

    Args:
        left: A square matrix, a row for each token that reads.
        chunk: Tokens of a chunk.
    """
    length = len(left)
    picture = ax.imshow(left, cmap="viridis", vmin=0, vmax=1, extent=(0, length, length, 0))
    for border in range(chunk, length, chunk):
        ax.axhline(border, color="#FFFFFF", linewidth=1)
        ax.axvline(border, color="#FFFFFF", linewidth=1)
    bar = ax.figure.colorbar(picture, ax=ax)
    bar.ax.set_ylabel("share that is left")
    bar.ax.set_label("")
    ax.grid(visible=False)
    sentences = [f"A square of {length} tokens in chunks of {chunk}; later tokens are dark, earlier ones fade"]
    plots.finish(ax, x="token that wrote", y="token that reads", title=title, sentences=sentences)
    return ax


def growth(curves: Mapping[str, Sequence[float]], lengths: Sequence[int], *, ax: Axes, y: str, title: str) -> Axes:
    """Draw what grows with the length of a sequence, a line a name, on axes where a power is a straight line."""
    for (name, values), colour in zip(curves.items(), plots.COLOURS.values(), strict=False):
        ax.loglog(lengths, values, color=colour, marker="o", label=name)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend()
    sentences = [f"{name} goes from {values[0]:.3g} to {values[-1]:.3g}" for name, values in curves.items()]
    plots.finish(ax, x="tokens", y=y, title=title, sentences=sentences, whole_x=False)
    return ax

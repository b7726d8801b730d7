"""The look of every figure and diagram: colours, ink, sizes, and Matplotlib's settings inside one ``with`` block.

Backgrounds are transparent, text is a mid grey, and the colours are the four of Okabe and Ito that keep a contrast of
3:1 on white and on the near-black of a dark notebook, so that one picture serves both themes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["COLOURS", "CSS_PIXELS_PER_INCH", "DOTS_PER_INCH", "INK", "style"]

# Source: Okabe and Ito, "Color Universal Design" (2008). Orange, sky blue and yellow are left out: under 3:1 on white.
COLOURS = {"blue": "#0072B2", "vermilion": "#D55E00", "green": "#009E73", "purple": "#CC79A7"}
INK = "#787878"  # 4.4:1 on white and 4.2:1 on #121212: nearly equal, because one picture serves both
CSS_PIXELS_PER_INCH = 96
DOTS_PER_INCH = 2 * CSS_PIXELS_PER_INCH  # sharp on a dense screen, and still about 40 KB a figure


@contextmanager
def style() -> Iterator[None]:
    """Apply the course's look inside a ``with`` block, and nowhere else.

    Example:
        >>> import matplotlib
        >>> before = matplotlib.rcParams["text.color"]
        >>> with style():
        ...     matplotlib.rcParams["text.color"] == before
        False
        >>> matplotlib.rcParams["text.color"] == before
        True
    """
    import matplotlib as mpl
    from cycler import cycler

    # Line style changes with the colour, so that a curve is told apart without colour too.
    with mpl.rc_context(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": INK,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.prop_cycle": cycler(color=list(COLOURS.values())) + cycler(linestyle=["-", "--", "-.", ":"]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "figure.dpi": DOTS_PER_INCH,
            "figure.edgecolor": "none",
            "figure.facecolor": "none",
            "font.family": ["DejaVu Sans"],
            "font.size": 10,
            "grid.alpha": 0.3,
            "grid.color": INK,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 2,
            "savefig.facecolor": "none",
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        yield

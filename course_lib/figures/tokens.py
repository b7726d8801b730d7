"""Draw tokens as a reader reads them, in the colour of what they are, with a mark under those that a loss is taken of."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from course_lib.figures.plots import COLOURS

if TYPE_CHECKING:
    import pandas as pd

GREY = "#777777"
MARK = COLOURS["vermilion"]  # 3.9:1 on white and 4.9:1 on JupyterLab's dark page, on which black would not be seen
PALE = 0.30
"""Share of a kind's colour in the background: black text on it keeps a contrast of at least 7 to 1."""


class Coloured:
    """Tokens in rows: colours in a notebook and in the book, words where only text can be shown."""

    def __init__(self, frame: pd.DataFrame, kinds: dict[str, str]) -> None:
        self._frame, self._kinds = frame, kinds

    def _repr_html_(self) -> str:
        legend = " ".join(_span(kind, self._kinds[kind], False, kind) for kind in self._kinds)
        legend += " " + _span("with loss", "#ffffff", True, "a mark under a token: a loss is taken of it")
        lines = "".join(
            f'<p style="margin: 0.6em 0; line-height: 2.1; overflow-wrap: anywhere">{self._line(row)}</p>'
            for _, row in self._frame.groupby("row", sort=True)
        )
        return f'<div style="font-size: 88%"><p style="margin: 0 0 0.4em">{legend}</p>{lines}</div>'

    def _line(self, row: pd.DataFrame) -> str:
        return " ".join(
            _span(one.token, self._kinds[one.kind], one.loss, f"label {one.position}, {one.kind}, loss {one.loss}")
            for one in row.itertuples()
        )

    def __repr__(self) -> str:
        lines = []
        for number, row in self._frame.groupby("row", sort=True):
            runs = row.groupby((row.kind != row.kind.shift()).cumsum(), sort=True)
            parts = [f"{one.kind.iloc[0]} {''.join(one.token)!r}, loss {one.loss.iloc[0]}" for _, one in runs]
            lines.append(f"row {number}: " + "; ".join(parts))
        return "\n".join(lines)


def coloured(frame: pd.DataFrame) -> Coloured:
    """Labels of a batch, one row of text a row of the batch.

    Args:
        frame: Columns `row, position, token, kind, loss`, as `microscope.labels` gives them; at most five kinds.

    Returns:
        What a notebook draws when it is the last line of a cell.
    """
    kinds, colours = dict.fromkeys(frame.kind), [*COLOURS.values(), GREY]
    return Coloured(frame, {kind: _pale(colour) for kind, colour in zip(kinds, colours, strict=False)})


def _pale(colour: str) -> str:
    channels = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - channel) * PALE):02x}" for channel in channels)


def _span(text: str, colour: str, loss: bool, title: str) -> str:
    shown = html.escape(text.replace("\n", "\u21b5")).replace(" ", "&nbsp;")
    mark = f"3px solid {MARK if loss else 'transparent'}"
    style = f"background: {colour}; color: #000000; border-bottom: {mark}; padding: 0 2px; font-family: monospace"
    return f'<span style="{style}" title="{html.escape(title)}">{shown}</span>'

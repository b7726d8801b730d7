"""Tables for reading: every word of a cell is shown, and text stands on the left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

__all__ = ["full"]


def full(frame: pd.DataFrame, *, index: bool = True) -> Styler:
    """The table with its long cells whole; a notebook cuts them at 50 characters.

    Args:
        frame: Any table.
        index: Show the index as a column of its own.

    Returns:
        What JupyterLab and the book draw when it is the last line of a cell.

    Example:
        >>> import pandas as pd
        >>> "x" * 80 in full(pd.DataFrame({"why": ["x" * 80]}), index=False).to_html()
        True
    """
    cell = "text-align: left; vertical-align: top; white-space: normal; padding-right: 0.9em; font-size: 88%;"
    last = "min-width: 11em; overflow-wrap: anywhere; padding-right: 0;"
    words = [{"selector": "th, td", "props": cell}, {"selector": "td:last-child", "props": last}]
    styled = frame.style.set_table_styles(words)
    return styled if index else styled.hide(axis="index")

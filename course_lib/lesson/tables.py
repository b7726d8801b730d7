"""Tables for reading: every word of a cell is shown, text stands on the left, and a wide table still fits the page."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from course_lib.common.project import DATA

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

__all__ = ["full", "published"]

_JOINT = re.compile(r"(?<=[._=])(?=[A-Za-z])")
_ROOMY = "min-width: 11em; overflow-wrap: anywhere"
_LONG_PATH = 24  # characters; a shorter one takes no more room than a word


def full(frame: pd.DataFrame, *, index: bool = True) -> Styler:
    """The table with its long cells whole; a notebook cuts them at 50 characters.

    A column is as narrow as the page asks for: `transformer_engine` goes on below after its underscore, a path where
    the line ends.

    Args:
        frame: Any table; a value that is missing becomes a dash, and a number is shown with up to six digits.

    Returns:
        What JupyterLab and the book draw when it is the last line of a cell.

    Example:
        >>> import pandas as pd
        >>> "x" * 80 in full(pd.DataFrame({"why": ["x" * 80]}), index=False).to_html()
        True
    """
    cell = "text-align: left; vertical-align: top; white-space: normal; padding-right: 0.9em; font-size: 88%;"
    words = [
        {"selector": "th, td", "props": cell},
        {"selector": "td:last-child", "props": f"{_ROOMY}; padding-right: 0;"},
    ]
    # As objects: a column of nullable numbers would answer for its missing values itself, and with no words.
    if not (frame.index.is_unique and frame.columns.is_unique):  # pandas can style no other; two frames put together
        frame = frame.set_axis(_distinct(frame.index), axis=0).set_axis(_distinct(frame.columns), axis=1)
    styled = frame.astype(object).style.set_table_styles(words).format(_shown).map(_room)
    styled = styled.format_index(_shown).format_index(_shown, axis=1)
    return styled if index else styled.hide(axis="index")


def published(name: str) -> pd.DataFrame:
    """The rows of a file of facts in `data/`, such as `"published/nemotron_30b"`."""
    import pandas as pd

    return pd.DataFrame(json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))["rows"])


def _distinct(labels: Iterable[object]) -> list[object]:
    """Labels that look the same and are not: each repetition has one more space without width at its end."""
    seen: Counter[object] = Counter()
    found = []
    for label in labels:
        found.append(f"{label}{chr(0x200B) * seen[label]}" if seen[label] else label)
        seen[label] += 1
    return found


def _shown(value: object) -> str:
    """The value as HTML that may go on below at each joint of a name; a path stays in one piece, to be copied whole."""
    import pandas as pd

    if value is not None and pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = html.escape(str(value), quote=False)
    return text if "/" in text else _JOINT.sub("<wbr>", text)


def _room(value: object) -> str | None:
    if isinstance(value, int | float):
        return "white-space: nowrap !important"  # or 3e-05 would go on below after its minus
    return _ROOMY if isinstance(value, str) and "/" in value and len(value) > _LONG_PATH else None

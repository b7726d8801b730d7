"""Access tokens belong in the environment of the process that needs them; find those that stand anywhere else."""

from __future__ import annotations

import os
import re
from pathlib import Path

SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[\w-]{20,})")
"""How access tokens of the Hub, NVIDIA, GitHub and others begin."""

SECRET_NAME = re.compile(r"TOKEN(?!I)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)


def secrets(place: Path | str) -> list[str]:
    """Where access tokens stand in a text, or in the files below a directory, as `where: what`; the value is not shown.

    A token is what looks like one, or the value of an environment variable whose name says so.

    Example:
        >>> secrets("export HF_TOKEN=hf_" + "a" * 30)
        ['text, line 1: hf_...']
        >>> secrets("export HF_TOKEN=$HF_TOKEN")
        []
    """
    mine = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= 12]
    if isinstance(place, Path):
        files = (file for file in sorted(place.rglob("*")) if file.is_file() and file.stat().st_size < 2**22)
        texts = [(str(file.relative_to(place)), file.read_text(errors="replace")) for file in files]
    else:
        texts = [("text", place)]
    return [
        f"{name}, line {number}: {match[0][:3] + '...' if match else 'the value of a secret variable'}"
        for name, text in texts
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := SECRET_VALUE.search(line)) or any(value in line for value in mine)
    ]

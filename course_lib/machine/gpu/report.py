"""Rows of `data/measured/` from a report of `gpu/check`: what was measured, where, with which versions, by which command.

python -m course_lib.machine.gpu.report gpu-report/report.json        # prints the file that belongs into data/measured/
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from course_lib.machine.gpu.check import DRY_DEVICE

STATUSES = ("passed", "differs", "failed", "timed out")
"""A check that failed half-way has rows too: what it measured before is measured."""


class NotMeasured(ValueError):
    """A report holds no measurement of a GPU, or does not say of which."""


def rows(report: dict[str, Any]) -> dict[str, Any]:
    """The file of `data/measured/` that a report becomes.

    Args:
        report: `report.json` of `gpu/check`.

    Returns:
        `about`, `source`, `device`, `driver`, `versions`, `date`, `command`, and `rows`: `check, quantity, unit, expected,
        expected_from, measured, tolerance, holds`, one for each quantity that was measured.

    Raises:
        NotMeasured: For a dry run, and for a report without device, driver, versions, date or command.
    """
    if report.get("device") == DRY_DEVICE:
        raise NotMeasured(f"the report is of a dry run on a CPU ({DRY_DEVICE}), and no number of it is one of a GPU")
    machine = report.get("machine", {})
    about = {
        "device": report.get("device"),
        "driver": machine.get("driver"),
        "versions": machine.get("versions"),
        "date": report.get("date"),
        "command": report.get("command"),
    }
    if missing := [name for name, value in about.items() if value in (None, "", "none", "unknown", {})]:
        raise NotMeasured(
            f"the report does not say {', '.join(missing)}: run the check `machine` into the same folder "
            "(`--only machine`), and take the report again"
        )
    found = [
        {
            "check": name,
            "quantity": row["quantity"],
            "unit": row["unit"],
            "expected": row["expected"],
            "expected_from": row["source"],
            "measured": row["measured"],
            "tolerance": row["tolerance"],
            "holds": row["holds"],
        }
        for name, one in report["checks"].items()
        if one["status"] in STATUSES
        for row in one["rows"]
        if row["measured"] is not None
    ]
    if not found:
        raise NotMeasured("no check of the report has measured anything")
    words = f"Measured by this course on one {about['device']}; `expected` was known before, `expected_from` says how."
    source = f"{about['command']} on {about['date']}, driver {about['driver']}"
    return {"about": words, "source": source, **about, "rows": found}


def file_name(report: dict[str, Any]) -> str:
    """A name for the file: the device and the day."""
    return f"{re.sub(r'[^a-z0-9]+', '_', report['device'].lower()).strip('_')}_{report['date']}.json"


def main(arguments: list[str] | None = None) -> int:
    """Print the rows of a report as JSON; 1 if it holds no measurement of a GPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m course_lib.machine.gpu.report gpu-report/report.json", file=sys.stderr)
        return 2
    try:
        report = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        print(json.dumps(rows(report), indent=1))
    except (OSError, ValueError) as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        return 1
    print(f"this belongs into data/measured/{file_name(report)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

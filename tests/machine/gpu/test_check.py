"""The checks for one GPU: all of them in tiny form, and an orchestra that survives each way in which one can fail."""

from __future__ import annotations

import json
import math
import os
import time

import pytest

from course_lib.machine.gpu import check
from course_lib.machine.gpu.report import NotMeasured, file_name, rows
from course_lib.planning import ceiling

HERE = __name__


def works(context):
    """A check that measures."""
    context.row("size", "GiB", 10.0, 10.2, "a plan", tolerance=0.5)
    context.note(seen=1)


def differs(context):
    """A check whose plan was wrong."""
    context.row("size", "GiB", 10.0, 11.0, "a plan", tolerance=0.5)


def fails(context):
    """A check that fails half-way."""
    context.row("loss", "nats/token", None, 6.5)
    raise RuntimeError("the kernel is not there")


def dies(context):
    """A check that takes its process along."""
    context.note(seen=2)
    os._exit(9)


def hangs(context):
    """A check that never ends, with a process of its own."""
    if os.fork() == 0:
        time.sleep(600)
    context.note(child="begun")
    time.sleep(600)


def a_check(function, limit_seconds: int = 60, **fields) -> check.Check:
    """A check that is no part of the course's."""
    return check.Check(function.__name__, "?", limit_seconds, 1, f"{HERE}:{function.__name__}", **fields)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run of every check."""
    out = tmp_path_factory.mktemp("gpu")
    return out, check.run(out, dry=True, say=lambda line: None)


def test_every_check_runs_in_tiny_form(dry):
    """On CPU ranks each has its quantities, and whatever is judged holds."""
    _, report = dry
    assert {name: (one["status"], one.get("reason", "")) for name, one in report["checks"].items()} == {
        one.name: ("passed", "") for one in check.CHECKS
    }
    judged = {name for name, one in report["checks"].items() if any(row["holds"] for row in one["rows"])}
    assert judged == {one.name for one in check.CHECKS} - {"machine", "imports", "rates"}


def test_the_report_is_on_disk(dry):
    """As JSON, as text with a line for every check, and marked as dry."""
    out, report = dry
    assert json.loads((out / "report.json").read_text())["checks"] == json.loads(json.dumps(report["checks"]))
    text = (out / "report.txt").read_text()
    assert text.startswith("DRY") and all(f"== {one.name} (passed" in text for one in check.CHECKS)


def test_a_dry_report_is_no_measurement(dry):
    """No number of it can become a row of data/measured/."""
    with pytest.raises(NotMeasured, match=r"dry run on a CPU \(cpu \(dry\)\)"):
        rows(dry[1])


def test_a_report_becomes_rows_with_sources(dry):
    """The same report, had it come from a GPU: every measured quantity, what was expected, and from where."""
    report = json.loads(json.dumps(dry[1])) | {"device": "NVIDIA H100 80GB HBM3"}
    with pytest.raises(NotMeasured, match="does not say driver"):
        rows(report)
    report["machine"] = {"driver": "580.0", "versions": {"torch": "2.11.0"}}
    found = rows(report)
    measured = [row for one in report["checks"].values() for row in one["rows"] if row["measured"] is not None]
    assert len(found["rows"]) == len(measured) > 40
    assert found["source"] == f"{report['command']} on {report['date']}, driver 580.0"
    first = next(
        row for row in found["rows"] if row["check"] == "llama_1b" and row["quantity"] == "loss of fresh weights"
    )
    assert (
        first["expected_from"] == "ln V + h s^2 / 2"
        and abs(first["expected"] - math.log(512) - 64 * 0.02**2 / 2) < 1e-9
    )
    assert file_name(report) == f"nvidia_h100_80gb_hbm3_{report['date']}.json"


def test_no_failure_stops_the_others(tmp_path, monkeypatch):
    """One fails, one dies, one hangs, one differs: each is told, nothing of them is left, and the last one still works."""
    monkeypatch.setattr(check, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(check, "DRY_PATIENCE", 1)
    seen = []

    def say(line):
        seen.append(json.loads((tmp_path / "report.json").read_text())["checks"])

    checks = [a_check(fails), a_check(dies), a_check(hangs, limit_seconds=2), a_check(differs), a_check(works)]
    report = check.run(tmp_path, dry=True, checks=checks, say=say)
    found = report["checks"]
    assert {name: one["status"] for name, one in found.items()} == {
        "fails": "failed", "dies": "failed", "hangs": "timed out", "differs": "differs", "works": "passed"
    }  # fmt: skip
    assert (
        found["fails"]["reason"] == "RuntimeError: the kernel is not there"
        and found["fails"]["rows"][0]["measured"] == 6.5
    )
    assert "Traceback" in found["fails"]["log"]
    assert found["dies"]["reason"] == "its process ended with code 9" and found["dies"]["notes"] == {"seen": 2}
    assert found["hangs"]["notes"] == {"child": "begun"}, "what it had written before its time was up"
    assert found["differs"]["reason"] == "outside the stated tolerance: size"
    assert [len(one) for one in seen] == [1, 2, 3, 4, 5], "a whole report after every check"
    assert "DOES NOT HOLD" in (tmp_path / "report.txt").read_text()


def notes_times(context):
    """A check whose rank imports first, and then waits for the GPU."""
    context.note(begun=time.time())
    while not context.gate.exists():
        time.sleep(0.01)
    context.note(had_the_gpu=time.time(), left=context.seconds_left())
    time.sleep(0.3)
    context.note(ended=time.time())


def test_the_next_one_imports_while_one_has_the_gpu(tmp_path, monkeypatch):
    """It begins before the other has ended, gets the GPU after, and its limit counts from then on."""
    monkeypatch.setattr(check.stack, "gpu_count", lambda: 1)
    checks = [check.Check(name, "?", 900, 1, f"{HERE}:notes_times") for name in ("one", "two", "three")]
    found = check.run(tmp_path, checks=checks, budget_seconds=600, say=lambda line: None)["checks"]
    assert [one["status"] for one in found.values()] == ["passed"] * 3, found
    one, two, three = (one["notes"] for one in found.values())
    assert two["begun"] < one["ended"] <= two["had_the_gpu"] and two["ended"] <= three["had_the_gpu"]
    assert all(0 < notes["left"] <= 600 - check.GRACE_SECONDS for notes in (one, two, three)), "cut to the budget"


def test_what_no_longer_fits_is_skipped_by_name(tmp_path):
    """Nothing is begun with less than it needs, and the report says so."""
    checks = [a_check(works), check.Check("long", "?", 900, 500, f"{HERE}:works")]
    report = check.run(tmp_path, dry=True, checks=checks, budget_seconds=120, say=lambda line: None)
    assert report["checks"]["works"]["status"] == "passed"
    assert report["checks"]["long"]["status"] == "skipped"
    assert "of the budget are left, and it needs 500" in report["checks"]["long"]["reason"]


def test_what_is_missing_is_skipped_by_name(monkeypatch):
    """A package or the GPU itself; a dry run needs neither."""
    one = a_check(works, packages=("no_such_package", "json"))
    assert check.why_not(one, left_seconds=100, dry=False) == "not installed here: no_such_package"
    assert check.why_not(one, left_seconds=100, dry=True) is None
    broken = {"json": "NO, undefined symbol"}
    assert check.why_not(a_check(works, packages=("json",)), left_seconds=100, dry=False, told=broken).endswith(
        ": json"
    )
    monkeypatch.setattr(check.stack, "gpu_count", lambda: 0)
    assert "no GPU" in check.why_not(a_check(works), left_seconds=100, dry=False)
    assert check.why_not(a_check(works, gpu=False), left_seconds=100, dry=False) is None


def test_some_checks_join_an_earlier_report(tmp_path):
    """`--only` keeps what is there, and refuses a name that is none."""
    check.run(tmp_path, dry=True, checks=[a_check(differs)], say=lambda line: None)
    checks = [a_check(differs), a_check(works)]
    report = check.run(tmp_path, dry=True, checks=checks, only=["works"], say=lambda line: None)
    assert {name: one["status"] for name, one in report["checks"].items()} == {"differs": "differs", "works": "passed"}
    with pytest.raises(ValueError, match="no check is named llama_2b: choose from differs, works"):
        check.run(tmp_path, dry=True, checks=checks, only=["llama_2b"])


def test_the_order_is_data():
    """Names are unique, limits leave room, and each function exists."""
    import importlib

    names = [one.name for one in check.CHECKS]
    assert len(set(names)) == len(names)
    for one in check.CHECKS:
        module, _, function = one.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert 0 < one.least_seconds < one.limit_seconds <= 300 and one.settles.endswith((".", "?"))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("NVIDIA H100 80GB HBM3, 81559 MiB", "H100 SXM 80GB"),
        ("NVIDIA A100-SXM4-80GB, 81920 MiB", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB, 40960 MiB", None),
        ("NVIDIA H100 NVL, 95830 MiB", None),
        ("NVIDIA GH200 480GB, 97871 MiB", None),
    ],
)
def test_a_ceiling_is_that_of_this_gpu(words, name):
    """Only the model, form and size of a data sheet that is at hand."""
    found = ceiling.named(words)
    assert (found and found.name) == name

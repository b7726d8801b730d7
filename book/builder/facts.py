"""Tables of the book's pages that are made when the book is built: versions, sources of data,
the eight-GPU plan, what to set on a node, the sessions of a class.

A page says `<!-- facts: NAME -->` where a table belongs.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from book.builder import levers, planner, recipes, whole_path
from book.builder import plan as eight_gpu_plan
from course_lib.common.project import VARIABLES
from course_lib.lesson import notebooks
from course_lib.planning import usable

__all__ = ["FACTS", "FactError", "fill"]

MARK = re.compile(r"^<!-- facts: (\w+) -->$", re.MULTILINE)
GROUPS = {"dependencies": "the course runs on", "dev": "tests", "book": "the book"}

SESSIONS = (
    (("00",), "what a machine must have before a run on it means anything"),
    (("01",), "which of the six systems they would read first"),
    (("02",), "which of two contradicting sources is right"),
    (("03",), "why a falling loss proves so little"),
    (("04",), "what was really drawn, and who would have noticed"),
    (("05",), "when two losses may be compared"),
    (("06",), "which layout they would pay for"),
    (("07",), "which rank to believe"),
    (("08",), "what a sick run looks like from outside"),
    (("09",), "what counts as a difference"),
    (("10",), "what survives a crash"),
    (("11",), "where the bytes go"),
    (("12",), "whether a shorter bubble is worth its price"),
    (("13",), "what a model should forget, and who decides"),
    (("14",), "what a reward leaves out"),
    (("15",), "how sure they are that it is better"),
    (("16",), "what a token pays for"),
    (("17",), "what a model may forget"),
    (("18",), "what a filter takes that nobody asked it to"),
    (("19",), "which differences they would accept between two trainers"),
    (("20",), "which link of the chain they would trust unseen"),
    (("a",), "which of these they would have noticed"),
)


PATHS = (
    ("an evening", ("00", "03"), "lessons 00 and 03", "`make run`, then lesson 03 in JupyterLab"),
    (
        "a week",
        tuple(f"{number:02}" for number in range(11)),
        "lessons 00 to 10, one or two a day",
        "each lesson, with its exercises before their solutions",
    ),
    (
        "a node tomorrow",
        ("00", "03", "07", "06", "10"),
        "lessons 00, 03, 07, 06 and 10, then [a node tomorrow](node_tomorrow.md), command by command, and "
        "[before the first step](before_the_first_step.md)",
        "ten steps of 1B on the node, then your own run",
    ),
    (
        "a class",
        tuple(f"{number:02}" for number in range(13)),
        "lessons 00 to 12 in 13 sessions of 90 minutes, with a guess written down before each run",
        "the runs together, and compare your [ledgers](your_ledger.md)",
    ),
)
"""Four ways through the course: what you have, its lessons, what to read, what to run."""


class FactError(ValueError):
    """A page asks for a table that nobody makes."""


def fill(page: str, *, root: Path) -> str:
    """Put the tables into a page.

    Args:
        page: The page's markdown.
        root: The project, whose lock and data are read.

    Raises:
        FactError: There is no table of that name.
    """

    def table(match: re.Match[str]) -> str:
        if match.group(1) not in FACTS:
            raise FactError(f"the page asks for the table {match.group(1)!r}; there are: {', '.join(FACTS)}.")
        return FACTS[match.group(1)](root)

    return MARK.sub(table, page)


def paths(_: Path) -> str:
    """Four ways through the course, with the minutes that their lessons name."""
    minutes = {lesson.number: lesson.minutes or 0 for lesson in notebooks.listing()}
    lines = ["| you have | read | minutes | and run |", "|---|---|--:|---|"]
    for name, numbers, read, run in PATHS:
        lines.append(f"| {name} | {read} | {sum(minutes[number] for number in numbers)} | {run} |")
    return "\n".join(lines)


def lessons(root: Path) -> str:
    """Every lesson by its part, with its question and the minutes that it names."""
    contents = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    lines = ["| part | lesson | its question | minutes |", "|---|---|---|--:|"]
    for part in whole_path.parts(contents, notebooks.listing(directory=root / "notebooks")):
        for place, lesson in enumerate(part.lessons):
            named = f"[{lesson.number.upper()} {lesson.title}](lessons/{lesson.path.name})"
            lines.append(f"| {'' if place else part.caption} | {named} | {lesson.question} | {lesson.minutes or '–'} |")
    return "\n".join(lines)


def sessions(_: Path) -> str:
    """Which lessons a class takes together, how many minutes they name, and what the room should argue about."""
    minutes = {lesson.number: lesson.minutes or 0 for lesson in notebooks.listing()}
    lines = ["| session | lessons | minutes | what the room should argue about |", "|---|---|--:|---|"]
    for number, (names, question) in enumerate(SESSIONS, start=1):
        lines.append(f"| {number} | {', '.join(names).upper()} | {sum(minutes[name] for name in names)} | {question} |")
    return "\n".join(lines)


def versions(root: Path) -> str:
    """What the course names in `pyproject.toml`, at the version that `uv.lock` pins."""
    lock = tomllib.loads((root / "uv.lock").read_text(encoding="utf-8"))
    packages = {package["name"]: package for package in lock["package"]}
    course = packages["nemotron-course"]
    groups = {"dependencies": course["dependencies"], **course["dev-dependencies"]}
    lines = ["| package | version | for |", "|---|---|---|"]
    for group, purpose in GROUPS.items():
        for name in sorted({entry["name"] for entry in groups[group]}):
            lines.append(f"| {name} | {packages[name]['version']} | {purpose} |")
    return "\n".join(lines)


def count(root: Path) -> str:
    """How many packages the lock holds in all."""
    lock = tomllib.loads((root / "uv.lock").read_text(encoding="utf-8"))
    others = [package for package in lock["package"] if "registry" in package["source"]]
    return f"The lock file pins {len(others)} packages, with a checksum for each file."


def provenance(root: Path) -> str:
    """Every file of `data/` with the sources that its rows name, and the day they were read where a file says it."""
    lines = ["| file | its facts were read from |", "|---|---|"]
    for path in sorted((root / "data").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        nested = content.get("source")
        read_on = content.get("read_on") or (nested.get("read_on") if isinstance(nested, dict) else None)
        text = "<br>".join(source.replace("|", "\\|") for source in dict.fromkeys(_sources(content)))
        lines.append(
            f"| `{path.relative_to(root).as_posix()}` | {text}{f'<br>(read on {read_on})' if read_on else ''} |"
        )
    return "\n".join(lines)


def _sources(value: Any) -> Iterator[str]:
    """Every place that a row names: under a key that begins with `source`, or as repository, path and version."""
    if isinstance(value, list):
        for part in value:
            yield from _sources(part)
    elif isinstance(value, dict):
        if {"repository", "path", "version"} <= set(value):
            commit = re.sub(r"commit ([0-9a-f]{7})[0-9a-f]+", r"\1", value["version"])
            yield f"{value['repository']} {value['path']} @ {commit}"
        for key, part in value.items():
            texts = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else [part]
            if key.startswith("source") and all(isinstance(text, str) for text in texts):
                yield from texts
            else:
                yield from _sources(part)


def variables(_: Path) -> str:
    """Every environment variable that the course reads."""
    lines = ["| variable | without it | what it does |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {row.default} | {row.meaning} |" for row in VARIABLES.values()]
    return "\n".join(lines)


def plan(root: Path) -> str:
    """The eight-GPU plan, from its row of data."""
    return eight_gpu_plan.markdown(eight_gpu_plan.read(root / "data" / eight_gpu_plan.FILE.name))


def lever_table(root: Path) -> str:
    """Levers beside the layout, from their row of data."""
    return levers.markdown(levers.read(root / "data" / levers.FILE.name))


def usable_memory(root: Path) -> str:
    """What comes off an H100's 80 GB before a plan, and where that was read."""
    return usable.markdown(root / "data" / usable.FILE.name)


def recipes_8gpu(root: Path, *, tasks: tuple[str, ...]) -> str:
    """NVIDIA's recipes for eight H100 of some tasks, planned."""
    content = recipes.read(root / "data" / recipes.FILE.name)
    return recipes.markdown(content, tasks=tasks)


def nemotron_4b(root: Path) -> str:
    """What NVIDIA saw of Nemotron 3 Nano 4B on eight H100, and what you should see."""
    rows = json.loads((root / "data" / "published" / "nemotron_4b.json").read_text(encoding="utf-8"))["rows"]
    lines = ["| what | NVIDIA measured | what you should see |", "|---|--:|---|"]
    return "\n".join(lines + [f"| {row['what']} | {row['value']:,} {row['unit']} | {row['see']} |" for row in rows])


def memory_planner(root: Path) -> str:
    """The planner that needs no kernel, with every plan that it can show."""
    return planner.html(planner.read(root / "data" / planner.FILE.name))


def recipe_families(root: Path) -> str:
    """Which family of recipes trains on CPU ranks, by the rows that a test runs."""
    rows = json.loads((root / "data" / "recipe_families.json").read_text(encoding="utf-8"))["rows"]
    lines = ["| family | recipe | on CPU ranks |", "|---|---|---|"]
    for row in rows:
        because = row["because"].rpartition("cannot train here: ")[2]
        verdict = "trains" if row["runs"] else "refused: " + re.sub("'([^']+)'", r"`\1`", because)
        lines.append(f"| {row['family']} | `{row['recipe'].partition(':')[2]}` | {verdict} |")
    return "\n".join(lines)


def gpu_checks(_: Path) -> str:
    """The checks of one GPU, in their order, with what each settles and needs."""
    from course_lib.machine.gpu.check import CHECKS

    lines = ["| check | what it settles | needs | limit, s |", "|---|---|---|--:|"]
    for one in CHECKS:
        needs = ", ".join([*(["a GPU"] if one.gpu else []), *(f"`{name}`" for name in one.packages)]) or "nothing"
        lines.append(f"| `{one.name}` | {one.settles} | {needs} | {one.limit_seconds} |")
    return "\n".join(lines)


def gpu_bundle_parts(_: Path) -> str:
    """What goes into a bundle, and what may be left out."""
    from course_lib.machine.gpu.bundle import PARTS

    lines = ["| part | what is in it | needed |", "|---|---|---|"]
    for part in PARTS:
        lines.append(f"| `{part.name}` | {part.what} | {'no' if part.optional else 'yes'} |")
    return "\n".join(lines)


def first_step(root: Path, section: str) -> str:
    """What to set before the first step on a node: one section of its data, with the recipe's values and the sources."""
    lines = ["| what | what to do | source |", "|---|---|---|"]
    for row in _read(root, "first_step_on_a_node.json")["sections"][section]:
        values = "; ".join(f"`{name}` is `{value!r}`" for name, value in row.get("defaults", {}).items())
        given = f"<br>In the 1B recipe {values}." if values else ""
        cells = (row["what"], row["do"] + given, "<br>".join(dict.fromkeys(_sources(row))))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def rates(root: Path) -> str:
    """Published rates as shares of the dense peak, with the operations that each counts for a token."""
    (h100,) = (gpu for gpu in _read(root, "gpus.json")["gpus"] if gpu["name"] == "H100 SXM 80GB")
    others = _read(root, "published/throughput.json")
    card = _read(root, "published/nemotron_4b.json")
    verified = {row["what"]: row["value"] for row in card["rows"]}
    nemotron: dict[str, Any] = {
        "name": "Nemotron 3 Nano 4B, BF16, not tuned",
        "precision": "bf16",
        "source": card["source"],
    }
    nemotron["tflops_per_gpu"] = verified["model TFLOP/s a GPU"]
    nemotron["tokens_per_second_per_gpu"] = verified["tokens a second and GPU"]
    known = [nemotron, *others["other_rows"], *others["rows"]]
    lines = [
        "| run on H100 GPUs | TFLOP/s a GPU | of the dense peak | tokens/s a GPU | GFLOP counted for a token | source |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in known:
        if "tflops_per_gpu" not in row:
            continue
        peak = h100["bf16_tflops"] * (2 if row["precision"] == "fp8" else 1)
        told, tokens = row["tflops_per_gpu"], row["tokens_per_second_per_gpu"]
        cells = (
            row["name"],
            f"{told:.0f}",
            f"{told / peak:.0%} of {peak:,}",
            f"{tokens:,.0f}",
            f"{told * 1e3 / tokens:.1f}",
        )
        lines.append("| " + " | ".join((*cells, row["source"])) + " |")
    return "\n".join(lines)


def _read(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "data" / name).read_text(encoding="utf-8"))


def upstream_tests(root: Path) -> str:
    """How many of NVIDIA's own unit tests passed on eight CPU ranks, folder by folder."""
    rows = json.loads((root / "data" / "upstream_tests.json").read_text(encoding="utf-8"))["rows"]
    lines = ["| folder of `tests/unit_tests` | passed | failed here | what else was not counted |", "|---|--:|--:|---|"]
    for row in rows:
        others = ", ".join(f"{number} {reason}" for reason, number in row["not_counted"].items())
        lines.append(f"| `{row['folder']}` | {row['passed']} | {row['failed']} | {others} |")
    passed, failed = (sum(row[column] for row in rows) for column in ("passed", "failed"))
    lines.append(f"| all | {passed} | {failed} | {sum(sum(row['not_counted'].values()) for row in rows)} |")
    return "\n".join(lines)


FACTS: dict[str, Callable[[Path], str]] = {
    "versions": versions,
    "variables": variables,
    "count": count,
    "provenance": provenance,
    "eight_gpu_plan": plan,
    "levers": lever_table,
    "usable_memory": usable_memory,
    "recipes_pretraining": partial(recipes_8gpu, tasks=("pretrain",)),
    "recipes_tuning": partial(recipes_8gpu, tasks=("sft", "peft")),
    "nemotron_4b": nemotron_4b,
    "memory_planner": memory_planner,
    "recipe_families": recipe_families,
    "upstream_tests": upstream_tests,
    "paths": paths,
    "lessons": lessons,
    "sessions": sessions,
    "gpu_checks": gpu_checks,
    "gpu_bundle": gpu_bundle_parts,
    **{
        f"first_step_{name}": partial(first_step, section=name)
        for name in ("environment", "wires", "indices", "profilers", "curves", "broken", "stop")
    },
    "rates": rates,
}

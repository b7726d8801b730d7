"""What lessons 13 to 15 measure, under several seeds, as `data/alignment_seeds.json`.

`python -m book.builder.alignment 1 2 3` trains a base for each seed, fine-tunes it, aligns the result by each policy of
lesson 14, and measures them all; some five minutes a seed on two cores.  What was trained is found again, and the file is
written after each seed: a command that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from course_lib.common import files
from course_lib.common.project import DATA
from course_lib.experiments import aligned, preferences, stages
from course_lib.reading import evaluation
from course_lib.text import docstrings, ladder

FILE = DATA / "alignment_seeds.json"
ITEMS, SAMPLES, DOCUMENTS = 140, 200, 40
"""Of each rung, of each model, and of each kind of held-out text: those of lesson 15."""
IN_FULL = ("base", "fine-tuned", "preferred", "gamed")
"""The models of lesson 15, with bits per byte and the ladder; the others are those of lesson 14 alone."""


def rows(seed: int) -> list[dict[str, Any]]:
    """One row a model: counts where items are right or wrong, otherwise the value and the ends of its interval."""
    preferences.quiet()
    data, tuned = stages.text(), stages.fine_tuned(seed=seed)
    folders = {"base": stages.exported(stages.base(seed=seed)), "fine-tuned": stages.exported(tuned)}
    folders |= {name: aligned.policy(tuned, name, seed=seed) for name in aligned.POLICIES}
    held_out = data.read("validation") + data.read("test")
    preferred = preferences.preferences(held_out, seed=seed)
    texts = {kind: list(data.built.texts(kind, "test"))[:DOCUMENTS] for kind in ("prose", "code")}
    rungs = _rungs(data)
    found, passed, right = [], {}, {}
    for name, folder in folders.items():
        model, before = evaluation.load(folder), "base" if name == "fine-tuned" else "fine-tuned"
        measured = evaluation.measure(model, held_out, samples=SAMPLES, seed=seed)
        passed[name] = [docstrings.passes(answer) for answer in measured.answers]
        row = {"seed": seed, "model": name, "passes": sum(passed[name]), "answers": SAMPLES}
        row |= {"answer loss": _rounded(measured.answer_loss), "shared words": _rounded(measured.word_f1)}
        row |= {"distinct": measured.distinct}
        row |= {
            kind: round(evaluation.bits_per_byte(model, some, window=stages.SEQUENCE), 4)
            for kind, some in texts.items()
        }
        if name != "base":
            row |= dict(zip(("lost", "won"), _moved(passed[before], passed[name]), strict=True))
        if name in aligned.POLICIES and aligned.POLICIES[name][0] == "DPO":
            row["chosen nats"] = round(chosen_nats(folders["fine-tuned"], folder, preferred), 3)
        if name in IN_FULL:
            for kind, some in texts.items():
                row[kind] = round(evaluation.bits_per_byte(model, some, window=stages.SEQUENCE), 4)
            right[name] = _right(model, folder, rungs)
            earlier = right.get(before) if name != "base" else None
            row["rungs"] = {rung: _counts(each, earlier and earlier[rung]) for rung, each in right[name].items()}
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def chosen_nats(start: Path, folder: Path, preferred: Sequence[preferences.Preference]) -> float:
    """How much likelier than under its start a policy finds the chosen answers, as TRL's evaluation of lesson 14 says it.

    The answer's tokens and the end of the document count, the separator is a part of the prompt; the mean goes over batches.

    Args:
        start: The folder of the model that the policy was trained from.
        folder: The policy's.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_list([asdict(row) for row in preferred])
    with tempfile.TemporaryDirectory() as place:
        args = DPOConfig(output_dir=place, disable_tqdm=True, **aligned.settings("margin alone"))
        policy, reference = (evaluation.load(each).network for each in (folder, start))
        given = {"ref_model": reference, "train_dataset": rows, "eval_dataset": rows}
        said = DPOTrainer(policy, args=args, processing_class=tokenizer, **given).evaluate()
    return said["eval_rewards/chosen"] / args.beta


def _rungs(data: stages.Text) -> dict[str, list[Any]]:
    found = {}
    for rung in ladder.RUNGS:
        some = ladder.items(rung, data.read("validation"), data.built)
        some += ladder.items(rung, data.read("test"), data.built, split="test")
        found[rung] = some[:ITEMS]
    return found


def _right(model: evaluation.Model, folder: Path, rungs: dict[str, list[Any]]) -> dict[str, dict[str, list[bool]]]:
    """Which items are right, by rung and normalisation; lm-eval counts two of the three."""
    with tempfile.TemporaryDirectory() as place:
        for rung, some in rungs.items():
            ladder.write_harness_task(rung, some, Path(place), end=model.tokenizer.eos_token)
        samples = evaluation.harness(folder, list(rungs), Path(place))["samples"]
    found = {}
    for rung, some in rungs.items():
        in_order = sorted(samples[rung], key=lambda item: item["doc_id"])
        found[rung] = {
            "sum": [item["acc"] == 1 for item in in_order],
            "per token": evaluation.choose(model, some)["per token"].tolist(),
            "per character": [item["acc_norm"] == 1 for item in in_order],
        }
    return found


def _counts(right: dict[str, list[bool]], before: dict[str, list[bool]] | None) -> dict[str, Any]:
    counted = {name: [sum(some), *(_moved(before[name], some) if before else ())] for name, some in right.items()}
    return {"n": len(right["sum"])} | counted


def _moved(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    test = evaluation.paired(before, after)
    return test.only_first, test.only_second


def _rounded(estimate: evaluation.Interval) -> list[float]:
    return [round(value, 4) for value in (estimate.value, estimate.low, estimate.high)]


def add(seed: int, *, file: Path = FILE) -> None:
    """Measure a seed and write the file with its rows; those of other seeds stay if the same versions made them."""
    packages = ("torch", "trl", "transformers", "lm-eval", "megatron-bridge", "megatron-core")
    versions = {name: metadata.version(name) for name in packages}
    measured = rows(seed)  # first: another command may write its own seed meanwhile
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = [row for row in before.get("rows", ()) if row["seed"] != seed] if before.get("versions") == versions else []
    found = sorted([*kept, *measured], key=lambda row: row["seed"])
    head = {
        "about": (
            "The models of lessons 13 to 15, once a seed: of first weights, order of the data, faults and samples. Shares "
            "are counts; `lost` and `won` compare with the model before, the base for fine-tuned and that for all others; "
            "a rung has right, lost and won by normalisation. `chosen nats`, of the DPO policies, is what TRL's evaluation "
            "says of held-out preferences, its reward of the chosen answers by its beta: an answer's tokens and the end."
        ),
        "source": "measured by this course: python -m book.builder.alignment 1 2 3, on 2 CPU cores",
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }
    lines = ",\n".join("  " + json.dumps(row) for row in found)
    beginning = json.dumps(head, indent=1).removesuffix("\n}")
    files.write_text(file, f'{beginning},\n "rows": [\n{lines}\n ]\n}}\n')
    print(f"wrote {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="+", type=int)
    for each in parser.parse_args().seeds:
        add(each)

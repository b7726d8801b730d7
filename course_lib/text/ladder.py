"""A ladder of wrong answers: the same question with options that are wrong for another reason on each rung.

Chance is the same on every rung, so what a model has learned shows as the rung up to which it is above chance.  The items
can be handed to lm-eval, EleutherAI's evaluation harness, as tasks of its own.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from course_lib.common import files
from course_lib.text import corpus, docstrings, tasks
from course_lib.text.tasks import OPTIONS, Choice, Pair

__all__ = ["RUNGS", "faults", "items", "shared_stems", "short", "well_formed", "write_harness_task"]

RUNGS = {
    "words_shuffled": "the same words in another order",
    "code_lines": "lines of code of the same module",
    "pep257_fault": "the same text with one fault of PEP 257",
    "docstrings": "docstrings of other functions of the module",
}
"""Name of the harness's task, and what the wrong answers are; from the easiest rung to the hardest."""

LONGEST_QUESTION, SHORTEST, LONGEST = 120, 24, 110
"""Characters: long items cost much and teach the same."""
STEM = 4


def items(
    rung: str, pairs: Iterable[Pair], built: corpus.Built | None = None, *, split: str = "validation"
) -> list[Choice]:
    """The items of one rung: one for each pair that has three wrong answers of that kind.

    The place of the right answer and the choice of the wrong ones depend on the question's text alone.

    Args:
        rung: A key of `RUNGS`.
        pairs: Pairs of one split.
        built: The corpus; only the rung of code lines reads it.
        split: The split of the pairs, whose code is read.

    Raises:
        ValueError: If there is no such rung, or it needs a corpus and got none.
    """
    if rung not in RUNGS:
        raise ValueError(f"no rung {rung!r}: there are {', '.join(RUNGS)}")
    pairs = list(pairs)
    if rung == "docstrings":
        return tasks.multiple_choice(pairs)
    if rung == "code_lines":
        if built is None:
            raise ValueError("the rung code_lines takes its wrong answers from the corpus: give built=")
        lines = _code_lines(built, split)
    found = []
    for pair in filter(short, pairs):
        dice = random.Random(hashlib.sha256(f"{rung} {pair.input}".encode()).digest())
        if rung == "words_shuffled":
            wrong = _shuffled(pair.output, dice)
        elif rung == "pep257_fault":
            wrong = list(faults(pair.output).values()) if well_formed(pair.output) else []
        else:
            known = lines.get(pair.module, [])
            wrong = dice.sample(known, OPTIONS - 1) if len(known) >= OPTIONS - 1 else []
        if len({*wrong, pair.output}) == OPTIONS:
            answer = dice.randrange(OPTIONS)
            options = (*wrong[:answer], pair.output, *wrong[answer:])
            found.append(Choice(pair.input, options, answer, pair.module))
    return found


def short(pair: Pair) -> bool:
    """Whether signature and docstring are of a length at which they cost little."""
    return len(pair.input) < LONGEST_QUESTION and SHORTEST <= len(pair.output) <= LONGEST


def well_formed(text: str) -> bool:
    """Whether a docstring passes `docstrings` and begins with a verb to which an s can be added."""
    first = text.partition(" ")[0]
    return docstrings.passes(text) and len(first) > 2 and first.isalpha()


def faults(text: str) -> dict[str, str]:
    """A well-formed text with each of three faults.

    >>> list(faults("Return the value.").values())
    ['Return the value', 'return the value.', 'Returns the value.']
    """
    first, _, rest = text.partition(" ")
    return {
        "no period": text.removesuffix("."),
        "small first letter": text[:1].lower() + text[1:],
        "third person": f"{first}s {rest}",
    }


def shared_stems(choices: Sequence[Choice]) -> list[bool]:
    """Which items are right if the option wins whose words begin most often as words of the question do; no model is asked.

    >>> shared_stems([Choice("m.parse: def parse(text)", ("Close a file.", "Parse some text."), 1, "m")])
    [True]
    """

    def stems(text: str) -> set[str]:
        words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
        return {word[:STEM] for word in words if len(word) >= STEM}

    right = []
    for each in choices:
        asked = stems(each.question)
        shares = [len(asked & stems(option)) / (len(stems(option)) or 1) for option in each.options]
        right.append(shares.index(max(shares)) == each.answer)
    return right


def write_harness_task(name: str, choices: Sequence[Choice], directory: Path, *, end: str = "") -> Path:
    """Write items as a task that `lm_eval.tasks.TaskManager(include_path=directory)` finds under that name.

    Args:
        name: Of the task.
        choices: Its items.
        directory: Where the JSONL and the YAML go; both are replaced.
        end: The tokenizer's end of a document, which the harness does not add.  Without it, an option that is the beginning
            of another one is always the more likely of the two.

    Returns:
        The YAML.

    Source: lm_eval 0.4.13 `docs/task_guide.md`.
    """
    import yaml

    ended = [Choice(c.question, tuple(option + end for option in c.options), c.answer, c.module) for c in choices]
    rows = tasks.write(ended, Path(directory).absolute() / f"{name}.jsonl")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",  # a column, and no template to compile for each item
        "target_delimiter": "\n",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    place = Path(directory) / f"{name}.yaml"
    files.write_text(place, yaml.safe_dump(task, sort_keys=False))
    return place


def _shuffled(text: str, dice: random.Random) -> list[str]:
    words, wrong = text.split(), []
    for _ in range(10 * OPTIONS):  # a text of few words has few orders
        dice.shuffle(words)
        if (other := " ".join(words)) not in (*wrong, text):
            wrong.append(other)
        if len(wrong) == OPTIONS - 1:
            break
    return wrong


def _code_lines(built: corpus.Built, split: str) -> dict[str, list[str]]:
    """Lines of each module that are neither comments nor strings, and about as long as a docstring."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for document in built.documents("code", split):
        for line in map(str.strip, document["text"].splitlines()):
            if SHORTEST <= len(line) <= LONGEST and not line.startswith(("#", '"', "'")):
                found[document["module"]][line] = None
    return {module: list(lines) for module, lines in found.items()}

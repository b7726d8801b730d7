"""Tasks made from the corpus: signature to docstring pairs, and which docstring belongs to this function.

Both follow the corpus's own split by module, so a model that was pretrained on its training part has seen none of the
validation and test answers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course_lib.common import files
from course_lib.text import corpus, sources

__all__ = ["CHANCE", "Choice", "Pair", "multiple_choice", "docstring_pairs", "write"]

OPTIONS = 4
CHANCE = 1 / OPTIONS
"""The score of a model that guesses."""
SHORTEST, LONGEST = 24, 400
SEPARATOR = "\n"
"""Between signature and docstring: fine-tuning puts it there, and every later prompt ends with it."""


@dataclass(frozen=True)
class Pair:
    """A function's signature and the first paragraph of its docstring, under the names that Bridge's SFT data has.

    Attributes:
        input: Such as `"json.dumps: def dumps(obj)"`.
        output: One paragraph on one line.
        module: The top-level module.
    """

    input: str
    output: str
    module: str


@dataclass(frozen=True)
class Choice:
    """Which of four docstrings belongs to this function?

    Attributes:
        question: As `Pair.input`.
        options: Four different texts.
        answer: Position of the right one, 0 to 3.
        module: The top-level module.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    module: str


def docstring_pairs(built: corpus.Built) -> dict[str, list[Pair]]:
    """Signature to docstring pairs of the standard library.

    A docstring that several functions share is left out everywhere: it would leak from one split to another.

    Args:
        built: What `corpus.python_library` made; its split is taken over.

    Returns:
        Pairs by split.
    """
    split_of = {module: split for split, modules in built.manifest["modules"].items() for module in modules}
    found: dict[str, list[Pair]] = defaultdict(list)
    for function in sources.library_functions():
        first = " ".join(function.docstring.split("\n\n")[0].split())
        if SHORTEST <= len(first) <= LONGEST and function.module in split_of:
            name = f"{function.file}.{function.name}"
            found[first].append(Pair(f"{name}: {function.signature}", first, function.module))
    result: dict[str, list[Pair]] = {split: [] for split in corpus.SPLITS}
    for same in found.values():
        if len(same) == 1:
            result[split_of[same[0].module]].append(same[0])
    return result


def multiple_choice(questions: Iterable[Pair]) -> list[Choice]:
    """A question for each pair: three wrong answers from the same module where it has them, else from the same split.

    The order depends on the question's text alone, so the set is the same at each call.

    Args:
        questions: Pairs of one split.

    Raises:
        ValueError: If the pairs have fewer than four different outputs.
    """
    questions = list(questions)
    if (different := len({pair.output for pair in questions})) < OPTIONS:
        raise ValueError(
            f"{len(questions)} pairs with {different} different outputs: {OPTIONS} are needed for {OPTIONS} options"
        )
    by_module: dict[str, list[str]] = defaultdict(list)
    for pair in questions:
        by_module[pair.module].append(pair.output)
    everything = [pair.output for pair in questions]
    choices = []
    for pair in questions:
        dice = random.Random(hashlib.sha256(pair.input.encode()).digest())
        near = [text for text in dict.fromkeys(by_module[pair.module]) if text != pair.output]
        wrong = dice.sample(near, min(len(near), OPTIONS - 1))
        while len(wrong) < OPTIONS - 1:
            if (other := dice.choice(everything)) not in (*wrong, pair.output):
                wrong.append(other)
        answer = dice.randrange(OPTIONS)
        options = (*wrong[:answer], pair.output, *wrong[answer:])
        choices.append(Choice(pair.input, options, answer, pair.module))
    return choices


def write(rows: Iterable[Any], path: Path) -> Path:
    """Write pairs or choices as JSONL, whole or not at all.

    Args:
        rows: `Pair` or `Choice` objects.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    return path

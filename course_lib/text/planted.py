"""Good text among which faults of known kinds are planted, so that curation can be scored."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from course_lib.text import corpus, sources

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FAULTS", "faults", "prose"]

FAULTS = (
    "exact duplicate",
    "near duplicate",
    "boilerplate",
    "mojibake",
    "shuffled words",
    "too short",
    "other language",
)
NOTICES = (
    "This website uses cookies to improve your experience.",
    "By signing in you accept our terms of use and our privacy policy.",
    "Read more about the use of cookies in our cookie policy.",
)
FEWEST_SHORT, MOST_SHORT = 2, 6
"""Words of a text that is too short."""


def prose(*, fewest_words: int = 50, most_words: int = 500) -> list[str]:
    """Docstrings and topics of this Python with so many words, each once and cleaned, in an order that is always the same."""
    read = (corpus.clean(document.text) for document in sources.python_documents(code=False))
    texts = dict.fromkeys(text for text in read if fewest_words <= len(text.split()) <= most_words)
    return random.Random(0).sample(list(texts), len(texts))


def faults(texts: Sequence[str], *, each: int, kinds: Sequence[str] = FAULTS, seed: int = 0) -> pd.DataFrame:
    """The texts, and after them so many faulty documents of every kind.

    The texts of the mojibake appear nowhere else: mended, they are a gain.  All other faults are made from texts that are
    there as well.

    Args:
        texts: Good documents, all different.
        each: Documents of each kind of fault.
        kinds: Which of `FAULTS`.

    Returns:
        One row a document: `id` from 0 up, `text`, `kind` (`"clean"` or one of `kinds`), and `good`, the text that it was
        made from, empty where it was made from none.

    Raises:
        ValueError: If a kind is unknown, or fewer than `each` texts could be misread.
    """
    import pandas as pd

    if unknown := set(kinds) - set(FAULTS):
        raise ValueError(f"kinds={sorted(unknown)}: there are {', '.join(FAULTS)}")
    chance = random.Random(seed)
    misread = [text for text in texts if "'" in text][:each] if "mojibake" in kinds else []
    clean = [text for text in texts if text not in set(misread)]
    if "mojibake" in kinds and len(misread) < each or not clean:
        raise ValueError(f"each={each}: only {len(misread)} of {len(texts)} texts have an apostrophe to misread")
    german = _words("German")
    make = {
        "exact duplicate": lambda text: (text, text),
        "near duplicate": lambda text: (_edited(text, chance), text),
        "boilerplate": lambda _: (_notices(chance), ""),
        "mojibake": lambda text: (_misread(text), text),
        "shuffled words": lambda text: (_shuffled(text, chance), text),
        "too short": lambda text: (_cut(text, chance), text),
        "other language": lambda text: (_foreign(text, german, chance), ""),
    }
    rows = [(text, "clean", text) for text in clean]
    for kind in kinds:
        passes, rest = divmod(each, len(clean))
        sample = misread if kind == "mojibake" else clean * passes + chance.sample(clean, rest)
        rows += [(text, kind, good) for text, good in map(make[kind], sample)]
    frame = pd.DataFrame(rows, columns=["text", "kind", "good"])
    frame.insert(0, "id", range(len(frame)))
    return frame


def _edited(text: str, chance: random.Random) -> str:
    """The same page fetched on another day: one word is gone, and a line has joined."""
    words = text.split(" ")
    del words[chance.randrange(len(words))]
    return " ".join(words) + f"\n\nLast updated on {chance.randint(1, 28)} March {chance.randint(2010, 2025)}."


def _notices(chance: random.Random) -> str:
    """What a page says on its margin, in any order."""
    return "\n\n".join(chance.choice(NOTICES) for _ in range(chance.randint(4, 12)))


def _misread(text: str) -> str:
    """Typographic apostrophes, written as UTF-8 and read as Windows-1252."""
    return text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}").encode().decode("cp1252", errors="replace")


def _shuffled(text: str, chance: random.Random) -> str:
    """The words of each line in another order, their signs with them, and the last one of the line in its place."""
    lines = [line.split(" ") for line in text.split("\n")]
    return "\n".join(" ".join([*chance.sample(line[:-1], len(line) - 1), line[-1]]) for line in lines)


def _cut(text: str, chance: random.Random) -> str:
    return " ".join(text.split()[: chance.randint(FEWEST_SHORT, MOST_SHORT)])


def _foreign(text: str, words: Sequence[str], chance: random.Random) -> str:
    """Frequent words of another language, in sentences as long as the lines of a text."""
    sentences = ([chance.choice(words) for _ in line.split()] for line in text.split("\n") if line.strip())
    return "\n".join(" ".join(sentence).capitalize() + "." for sentence in sentences)


def _words(language: str) -> list[str]:
    """Frequent words of a language, as justext carries them, without those that are English too."""
    import justext

    english: Iterable[str] = justext.get_stoplist("English")
    return sorted(word for word in justext.get_stoplist(language) - english if word.isalpha() and len(word) > 1)

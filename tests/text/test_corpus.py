"""The corpus: cleaned, without duplicates, split by module, the same at every call; and how bad text is refused."""

from __future__ import annotations

import ast
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib.text import corpus, hub, sources, tasks, tokenizers


def test_nothing_is_twice_and_nothing_leaks(built):
    """Every text stands once, under its own hash, and a module's texts are on one side of the split."""
    seen, where = set(), {}
    for source in built.sources:
        for split in corpus.SPLITS:
            for document in built.documents(source, split):
                assert document["sha256"] not in seen and document["licence"] == "PSF-2.0"
                seen.add(document["sha256"])
                assert where.setdefault(document["module"], split) == split
    assert len(seen) == built.steps.documents.iloc[-1] == built.files.documents.sum()
    assert built.sources == ("code", "prose") and built.files.text_bytes.min() > 20_000
    assert (built.steps.removed >= 0).all() and built.steps.removed.sum() > 100


def test_the_same_python_gives_the_same_bytes(built, tmp_path):
    """The manifest, which has the hash of every file, is equal after a second build over an older one."""
    older = [sources.Document(f"{n} is an older text, long enough.", "prose", "a", f"m{n}", "") for n in range(3)]
    corpus.build(older, tmp_path / "again")
    again = corpus.python_library(tmp_path / "again")
    assert again.manifest == built.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_code_stays_python_without_its_docstrings(built):
    """A docstring is prose: the code parses and has none; a text such as `x = 1; "y"` is left alone."""
    for text in list(built.texts("code", "validation")):
        assert ast.get_docstring(ast.parse(text)) is None
    assert sources.without_docstrings('"Doc."; x = 1') == '"Doc."; x = 1'
    assert sources.without_docstrings('class A:\n  """Ü\n  two"""') == "class A:\n  ..."


def test_the_manifest_names_every_file_and_a_wrong_name_is_refused(built):
    """The error lists what there is."""
    with pytest.raises(KeyError, match="prose.train.jsonl"):
        built.path("poems", "train")
    assert {path.name for path in built.directory.iterdir()} == {*built.manifest["files"], "manifest.json"}


GOOD = '{"text": "A text that is long enough to be kept by the cleaning."}\n'


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"good\nline\n\xff", r"a.txt, line 3: byte 0xff is not UTF-8"),
        ("a.txt", b"", r"a.txt, line 1: the file is empty"),
        ("a.md", b" \n", r"nothing but white space"),
        ("a.jsonl", GOOD.encode() + b'{"body": 1}\n', r"a.jsonl, line 2: has the fields body, needed 'text'"),
        ("a.jsonl", GOOD.encode() + b"\xff\n", r"line 2: byte 0xff"),
        ("a.jsonl", GOOD.encode() + b"nonsense\n", r"line 2: not JSON"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\\ud800"}\n', r"line 2: '.*ud800' is half a character"),
        ("a.jsonl", b"1\n", r"line 1: has no fields"),
        ("a.jsonl", b'[{"text": "one"}]\n', r"line 1: a JSON array"),
        (
            "a.jsonl",
            b'[\n{"text": "one"},\n',
            r"line 1: a JSON array, or JSON over several lines: JSONL has one object",
        ),
        ("a.jsonl", b'[{"text": "one"},\n', r"line 1: a JSON array, or JSON over several lines"),
        ("a.jsonl", b'{\n "text": "one"\n}\n', r"line 1: a JSON array, or JSON over several lines"),
        ("a.jsonl", b"\n \n", r"a.jsonl: the file has nothing but blank lines"),
        ("a.jsonl", GOOD.encode() + b'{"text": "a \\u0000 b"}\n', r"line 2: a NUL byte"),
        ("a.txt", b"one\ntwo\n\x00\n", r"a.txt, line 3: a NUL byte: the file is binary, or UTF-16"),
        ("a.txt", "words".encode("utf-16"), r"a.txt, line 1: byte 0xff is not UTF-8"),
        ("a.txt", "words".encode("utf-16-le"), r"a.txt, line 1: a NUL byte"),
        ("a.jsonl", b'{"text": ""}\n', r"line 1: 'text' is empty"),
        ("a.jsonl", GOOD.encode() + b"x" * 3000, r"line 2: longer than"),
        ("a.txt", b"one line\n" + b"x" * 3000, r"a.txt, line 2: more than .* in one document"),
        ("a.pdf", b"x", r"a.pdf in .*/mine cannot be read: .* leave_out=\['\*.pdf'\]"),
    ],
)
def test_bad_text_is_refused_by_file_and_line(tmp_path, monkeypatch, name, data, words):
    """Nothing half written is left, and a corpus that was there stays."""
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2048)
    folder, target = tmp_path / "mine", tmp_path / "corpus"
    folder.mkdir()
    (folder / name).write_bytes(data)
    with pytest.raises(sources.BadText, match=words):
        corpus.from_folder(folder, target, licence="CC0-1.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_json_without_a_bottom_is_refused_by_line(tmp_path):
    """Python's reader of JSON gives up at some depth, with an error of its own kind."""
    (tmp_path / "a.jsonl").write_text(GOOD + '{"text": ' + 200_000 * "[" + "\n")
    with pytest.raises(sources.BadText, match=r"a.jsonl, line 2: not JSON \(maximum recursion depth"):
        list(sources.folder_documents(tmp_path, licence="CC0-1.0", source="mine"))


def test_a_file_beside_the_good_ones_is_read_or_named(tmp_path):
    """Capital endings are read; what is packed or of another kind is refused by name, unless it is left out by name."""
    folder, target = tmp_path / "mine", tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.TXT", "b.Md", "deep/c.txt"]):
        (folder / name).write_text(f"Text {number} is long enough to be kept by the cleaning.")
    (folder / "d.JSONL").write_text(GOOD)
    built = corpus.from_folder(folder, target, licence="CC0-1.0", held_out_percent=20)
    assert built.steps.documents.tolist() == [4, 4, 4]
    for name in ("e.jsonl.gz", "f.json", "deep/g.parquet", "README"):
        (folder / name).write_bytes(b"x")
    words = (
        r"README, deep/g.parquet, e.jsonl.gz, f.json in .* cannot be read: .*'\*.gz', '\*.json', '\*.parquet', 'README'"
    )
    with pytest.raises(sources.BadText, match=words):
        corpus.from_folder(folder, target, licence="CC0-1.0")
    for left_out in (["*.gz", "*.json", "README", "g.*"], ["*.gz", "*.json", "README", "deep"]):
        again = corpus.from_folder(folder, target, licence="CC0-1.0", held_out_percent=20, leave_out=left_out)
        assert again.steps.documents[0] == (3 if "deep" in left_out else 4)
    for wrong, words in ((folder / "a.TXT", "is a file"), (folder / "nowhere", "does not exist")):
        with pytest.raises(sources.BadText, match=words):
            corpus.from_folder(wrong, target, licence="CC0-1.0")


def test_hidden_folders_are_left_out_and_links_out_are_refused(tmp_path):
    """An old edition that JupyterLab keeps is not held out while the new one is trained on; a link leads nowhere else."""
    folder, target = tmp_path / "mine", tmp_path / "corpus"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "0-checkpoint.txt").write_text("An old edition of note 0, which nobody wants.")
    (folder / ".DS_Store").write_bytes(b"\0")
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"Note {number} is long enough to be kept by the cleaning.")
    (folder / "same.txt").symlink_to("0.txt")
    with pytest.warns(UserWarning, match=r"because hidden: \.DS_Store, \.ipynb_checkpoints"):
        built = corpus.from_folder(folder, target, licence="CC0-1.0", held_out_percent=20)
    assert not [t for split in corpus.SPLITS for t in built.texts("mine", split) if "old edition" in t]
    assert built.steps.documents.tolist() == [5, 5, 4]
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("A file that is nobody's business, and long enough.")
    for name, place in (("out.txt", "outside/secret.txt"), ("out", "outside")):
        (folder / name).symlink_to(tmp_path / place)
        with pytest.raises(sources.BadText, match=rf"{name} in .* lead out of it: .*leave_out=\['{name}'\]"):
            corpus.from_folder(folder, target, licence="CC0-1.0")
        (folder / name).unlink()


def test_a_byte_order_mark_and_blank_lines_are_no_text(tmp_path):
    """Windows editors write the mark, everybody the blank last line; line numbers stay those of the file."""
    (tmp_path / "mine").mkdir()
    lines = [json.dumps({"text": f"Document {i}, with a sentence that is long enough."}) for i in range(6)]
    (tmp_path / "mine" / "a.jsonl").write_text("\ufeff" + "\n".join([*lines[:3], "", *lines[3:], "", " ", ""]))
    built = corpus.from_folder(tmp_path / "mine", tmp_path / "out", licence="CC0-1.0", held_out_percent=20)
    found = {d["name"]: d["text"] for split in corpus.SPLITS for d in built.documents("mine", split)}
    assert found == {f"a.jsonl line {i + 1 + (i > 2)}": json.loads(line)["text"] for i, line in enumerate(lines)}


def test_one_large_file_is_one_document(tmp_path):
    """It cannot be split; the message says how to make documents of it, also where one file is most of the text."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "book.txt").write_text("A book of many sentences in one file. " * 30_000)
    with pytest.raises(ValueError, match=r"1 modules or documents: at least 3 .* one document: cut it into several"):
        corpus.from_folder(folder, tmp_path / "out", licence="CC0-1.0")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"A small text {name} beside a very large one.")
    with pytest.raises(ValueError, match="leave none for test: cut the large"):
        corpus.from_folder(folder, tmp_path / "out", licence="CC0-1.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_one_line_of_two_gigabytes_is_not_read(tmp_path, name):
    """It is refused after the 64 MiB that a document may have; the file is sparse, so the test needs no disk either."""
    folder = tmp_path / "mine"
    folder.mkdir()
    with (folder / name).open("wb") as file:
        file.truncate(2 * 10**9)
    tracemalloc.start()
    try:
        with pytest.raises(sources.BadText, match=rf"{name}, line 1: .*64 MiB"):
            corpus.from_folder(folder, tmp_path / "corpus", licence="CC0-1.0")
        assert tracemalloc.get_traced_memory()[1] < 3 * sources.MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_the_courses_tokenizer_is_reproducible(built, tmp_path):
    """8,192 merges learned twice from the same text give the same file, byte for byte."""
    files = [
        tokenizers.train_bpe(built.texts("prose", "train"), tmp_path / name, vocab_size=8192) / "tokenizer.json"
        for name in ("one", "two")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_of_yours_becomes_a_corpus(tmp_path):
    """Files and lines become documents with your licence; a text that is there twice stays once."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [json.dumps({"text": f"Document {i % 30}, with a sentence that is long enough."}) for i in range(40)]
    (folder / "notes.jsonl").write_text("\n".join(lines))
    (folder / "essay.txt").write_text("An essay of one sentence, and no more than that.\r\n")
    built = corpus.from_folder(folder, tmp_path / "out", licence="CC0-1.0", held_out_percent=10)
    assert built.steps.documents.tolist() == [41, 41, 31]
    assert set(built.files.file) == {"mine.train.jsonl", "mine.validation.jsonl", "mine.test.jsonl"}
    assert {document["licence"] for document in built.documents("mine", "train")} == {"CC0-1.0"}


def test_a_split_that_has_its_share_takes_no_more():
    """A tenth of forty equal documents is four for each held-out split: one that is exactly full is full."""
    found = Counter(corpus._split({f"module{n}": 100 for n in range(40)}, 10.0).values())
    assert found == {"train": 32, "validation": 4, "test": 4}


def test_what_is_no_corpus_is_not_overwritten(tmp_path):
    """A directory with other files, an impossible share, a name that is no name, or no text at all."""
    documents = [sources.Document("A text that is long enough for a corpus.", "mine", "a", "a", "CC0-1.0")]
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="no corpus"):
        corpus.build(documents, tmp_path)
    with pytest.raises(ValueError, match="held_out_percent=50"):
        corpus.build(documents, tmp_path / "new", held_out_percent=50)
    with pytest.raises(ValueError, match="no text is left"):
        corpus.build([], tmp_path / "new")
    with pytest.raises(ValueError, match="at least 3"):
        corpus.build(documents, tmp_path / "new")
    with pytest.raises(ValueError, match="letters, digits"):
        corpus.build([sources.Document("x" * 40, "a/b", "a", "a", "")], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_a_folder_with_a_manifest_of_another_program_is_not_deleted(tmp_path):
    """Browsers and package managers call a file manifest.json, too."""
    for content in ('{"name": "an app"}', "no json", "[]"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="no corpus"):
            corpus.build([], tmp_path)
        assert (tmp_path / "manifest.json").read_text() == content


def test_pairs_follow_the_split_and_share_no_answer(built, tmp_path):
    """Train, validation and test have other modules and other texts."""
    found = tasks.docstring_pairs(built)
    modules = [{pair.module for pair in found[split]} for split in corpus.SPLITS]
    answers = [{pair.output for pair in found[split]} for split in corpus.SPLITS]
    assert len(found["train"]) > 2000 and min(map(len, found.values())) > 50
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not modules[one] & modules[other] and not answers[one] & answers[other]
    path = tasks.write(found["test"], tmp_path / "pairs" / "test.jsonl")
    assert set(json.loads(path.read_text().splitlines()[0])) == {"input", "output", "module"}


def test_choices_are_fair(built):
    """Four different options, the answer among them, no favoured place, distractors from the module if it has them."""
    questions = tasks.docstring_pairs(built)["train"]
    choices = tasks.multiple_choice(questions)
    right = {pair.input: pair for pair in questions}
    of_module = {pair.output: pair.module for pair in questions}
    for choice in choices:
        assert len(set(choice.options)) == 4 and choice.options[choice.answer] == right[choice.question].output
    share = [sum(choice.answer == place for choice in choices) / len(choices) for place in range(4)]
    assert all(abs(each - tasks.CHANCE) < 0.03 for each in share)
    near = [of_module[option] == choice.module for choice in choices for option in choice.options]
    assert sum(near) / len(near) > 0.9
    assert tasks.multiple_choice(questions) == choices
    with pytest.raises(ValueError, match="4 are needed"):
        tasks.multiple_choice(questions[:3])
    with pytest.raises(ValueError, match="9 pairs with 1 different outputs"):
        tasks.multiple_choice(questions[:1] * 9)


def test_a_corpus_from_the_hub_is_described_first(tmp_path, monkeypatch):
    """Name, size and licence come before the download; the texts between the separators become documents."""
    import huggingface_hub

    siblings = [SimpleNamespace(rfilename="stories.txt", size=3000)]
    about = SimpleNamespace(siblings=siblings, card_data={"license": "cdla-sharing-1.0"}, sha="abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, files_metadata: about)
    stories = [f"Story {n} of a cat that sat on a mat for a long time." for n in range(12)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, file, repo_type, revision: str(tmp_path / file)
    )
    offer = hub.describe("somebody/stories", "stories.txt")
    assert str(offer) == "somebody/stories/stories.txt: 2.9 KiB, licence cdla-sharing-1.0"
    built = hub.build(offer, tmp_path / "out")
    assert sorted(text for split in corpus.SPLITS for text in built.texts("hub", split)) == sorted(stories)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.txt"]
    with pytest.raises(ValueError, match="has no poems.txt: it has stories.txt"):
        hub.describe("somebody/stories", "poems.txt")


def test_an_interrupt_at_the_last_rename_keeps_the_old_corpus(tmp_path, monkeypatch):
    """The old corpus is moved aside for the new one, and comes back if the new one cannot take its place."""
    folder, target = tmp_path / "mine", tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        text = f"Document {number} is long enough to be kept, and unlike the others. " * 3
        (folder / f"{number}.txt").write_text(text)
    corpus.from_folder(folder, target, licence="CC0-1.0")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    rename = os.replace

    def interrupted(source: object, destination: object) -> None:
        if Path(destination) == target and not Path(source).name.endswith(".before"):
            raise KeyboardInterrupt
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            corpus.from_folder(folder, target, licence="CC0-1.0")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "mine"]

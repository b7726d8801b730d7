"""Indexed data: written in a stream, read back byte by byte, refused with an offset, and its blend counted from ids."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest

from course_lib import launch
from course_lib.text import indexed, microscope, tokenizers
from support import small

TEXTS = {
    "prose": [f"A sentence number {n} about the weather, and another one about the sea." for n in range(60)],
    "code": [f"def function_{n}(argument):\n    return argument * {n}\n" for n in range(90)],
}


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory):
    """A small tokenizer."""
    texts = [text for source in TEXTS.values() for text in source]
    return tokenizers.train_bpe(texts, tmp_path_factory.mktemp("encoder"), vocab_size=320)


@pytest.fixture
def written(bridge, encoder_directory, tmp_path):
    """Both sources on disk."""
    encoder = tokenizers.load(encoder_directory)
    return {name: indexed.write_texts(texts, tmp_path / name, tokenizer=encoder) for name, texts in TEXTS.items()}


def test_what_goes_in_comes_out(written, encoder_directory, monkeypatch):
    """Every text decodes to itself, whatever the size of a batch; the sizes are as predicted; progress is told."""
    encoder = tokenizers.load(encoder_directory)
    told: list[tuple[int, float, int | None]] = []

    def words(done_bytes: int, seconds: float, *, of_bytes: int | None = None) -> str:
        told.append((done_bytes, seconds, of_bytes))
        return ""

    for name, done in written.items():
        index = microscope.read(done.prefix)
        ids = [microscope.document(index, number).tolist() for number in range(len(index.lengths))]
        assert [encoder.decode(each[:-1], skip_special_tokens=False) for each in ids] == TEXTS[name]
        assert {each[-1] for each in ids} == {0} and sum(map(len, ids)) == done.tokens
        assert done.prefix.with_name(f"{name}.idx").stat().st_size == 34 + 20 * done.documents + 8
        assert done.prefix.with_name(f"{name}.bin").stat().st_size == 2 * done.tokens
        assert done.text_bytes == sum(len(text.encode()) for text in TEXTS[name]) and done.megabytes_per_second > 0
        told.clear()
        with monkeypatch.context() as patch:
            patch.setattr(indexed, "BATCH_BYTES", 100)
            other = done.prefix.with_name(f"{name}-in-small-batches")
            patch.setattr(indexed.time, "perf_counter", itertools.count(step=0.25).__next__)
            patch.setattr(indexed, "_words", words)
            again = indexed.write_texts(TEXTS[name], other, tokenizer=encoder, progress=True)
        assert len(told) > 10 and told[-2][0] == done.text_bytes
        assert [seconds for _, seconds, _ in told] == [0.25 * number for number in range(1, len(told) + 1)]
        assert {whole for *_, whole in told[:-1]} == {done.text_bytes}
        assert told[-1] == (done.text_bytes, again.seconds, None)
        assert again.megabytes_per_second == pytest.approx(done.text_bytes / 1e6 / again.seconds, rel=1e-12)
        for suffix in (".bin", ".idx"):
            assert (
                other.with_name(other.name + suffix).read_bytes() == done.prefix.with_name(name + suffix).read_bytes()
            )


def test_the_name_of_a_special_token_is_text(bridge, encoder_directory, tmp_path):
    """A document that spells the end of a document does not end there."""
    encoder = tokenizers.load(encoder_directory)
    text = f"before {tokenizers.END_OF_DOCUMENT} after"
    done = indexed.write_texts([text], tmp_path / "text", tokenizer=encoder)
    ids = microscope.document(microscope.read(done.prefix), 0).tolist()
    assert ids.count(0) == 1 and encoder.decode(ids[:-1]) == text
    assert encoder.encode(text).ids.count(0) == 1, "the tokenizer itself is left as it was"


def test_a_wrong_end_of_document_is_refused(bridge, encoder_directory, tmp_path):
    """So is a text without tokens; nothing is left on disk."""
    encoder = tokenizers.load(encoder_directory)
    with pytest.raises(ValueError, match="ends a chat turn"):
        indexed.write_texts(["text"], tmp_path / "text", tokenizer=encoder, end_of_document=11)
    with pytest.raises(ValueError, match="document 1 is empty"):
        indexed.write_texts(["text", ""], tmp_path / "text", tokenizer=encoder)
    assert list(tmp_path.iterdir()) == []


def test_indices_of_older_files_go(bridge, tmp_path):
    """Megatron keeps its indices beside the files and does not notice that these changed."""
    for ids in ([[1, 2]], [[3]]):
        indexed.write(ids, tmp_path / "text", vocab_size=10, end_of_document=0)
        assert not (tmp_path / "text" / "cache").exists()
        (tmp_path / "text" / "cache" / "GPTDataset_indices").mkdir(parents=True)
    indexed.write([[1]], tmp_path / "text", vocab_size=10, end_of_document=0)
    assert not (tmp_path / "text" / "cache").exists()


def test_an_id_that_would_wrap_is_refused(bridge, tmp_path):
    """70,000 in two bytes would silently become 4,464."""
    for ids, end in (([5, 70_000], 0), ([5], 1000), ([-1], 0)):
        with pytest.raises(ValueError, match="outside a vocabulary of 1000"):
            indexed.write([ids], tmp_path / "text", vocab_size=1000, end_of_document=end)


def cut(size: int):
    """A change that keeps only the first bytes."""
    return lambda data: data[:size] if size >= 0 else data[: len(data) + size]


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        (".idx", lambda data: b"PK\x03\x04" + data[4:], "offset 0: begins with"),
        (".idx", cut(20), "offset 20: the file ends inside the header"),
        (".idx", lambda data: data[:9] + b"\x02" + data[10:], "offset 9: version 2"),
        (".idx", lambda data: data[:17] + b"\x63" + data[18:], "offset 17: type code 99"),
        (".idx", cut(100), "offset 100: the file ends inside the lengths"),
        (".idx", cut(-8), "the file ends inside the ends"),
        (".idx", lambda data: data + b"x", "1 bytes follow the last boundary"),
        (".idx", lambda data: data[:-1] + b"\x01", "boundaries do not run from 0 to 60"),
        (".idx", lambda data: data[:34] + data[38:42] + data[34:38] + data[42:], "pointers do not follow"),
        (".bin", cut(-2), "was cut off"),
        (".bin", lambda data: data + b"xx", "belongs to another index"),
    ],
)
def test_a_broken_file_is_refused_with_its_offset(written, suffix, change, words):
    """Truncated and foreign files are named before Megatron reads them as nonsense."""
    path = written["prose"].prefix.with_name(f"prose{suffix}")
    data = bytearray(path.read_bytes())
    if words.startswith("pointers"):
        data[34:38] = (int.from_bytes(data[34:38], "little") + 1).to_bytes(4, "little")
        data[38:42] = (int.from_bytes(data[38:42], "little") - 1).to_bytes(4, "little")
        path.write_bytes(bytes(data))
    else:
        path.write_bytes(change(bytes(data)))
    with pytest.raises(microscope.ForeignFile, match=words):
        microscope.read(written["prose"].prefix)


def test_a_missing_file_and_a_missing_document_are_named(written):
    """The error says what there is."""
    index = microscope.read(written["prose"].prefix)
    with pytest.raises(IndexError, match="0 to 59"):
        microscope.document(index, 60)
    written["prose"].prefix.with_name("prose.bin").unlink()
    with pytest.raises(microscope.ForeignFile, match="belong together"):
        microscope.read(written["prose"].prefix)


def config(written, encoder_directory, weights):
    """A run's configuration on a blend of both sources."""
    from megatron.bridge.training.config import GPTDatasetConfig
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    cfg = small.config(train_iters=20)
    cfg.tokenizer = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(encoder_directory))
    cfg.dataset = GPTDatasetConfig(
        seq_length=64, random_seed=1, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False
    )
    prefixes = [str(written[name].prefix) for name in TEXTS]
    cfg.dataset.blend_per_split = [(prefixes, weights), None, None]
    return cfg


def test_the_blend_is_counted_from_ids(written, encoder_directory, tmp_path):
    """Shares follow the weights; swapped weights are seen; ids that are off by one stand in no source."""
    prefixes = {name: done.prefix for name, done in written.items()}
    for weights in ([0.7, 0.3], [0.3, 0.7]):
        train = microscope.datasets(config(written, encoder_directory, weights), cache=tmp_path / "cache")[0]
        samples = [train[number]["tokens"].numpy() for number in range(160)]
        blend = microscope.realised_blend(samples, prefixes)
        assert blend.share.tolist() == pytest.approx(weights, abs=0.01)
        assert blend.samples.tolist() == np.bincount(train.dataset_index[:160]).tolist()
    with pytest.raises(ValueError, match="another tokenizer"):
        microscope.realised_blend([samples[0] + 1], prefixes)


def test_the_pieces_of_a_sample_are_its_text(written, encoder_directory, tmp_path):
    """Cut from the documents as the three indices say, they are the tokens and the last label."""
    train = microscope.datasets(config(written, encoder_directory, [0.5, 0.5]), cache=tmp_path / "cache")[0]
    prose = train.datasets[0]
    index = microscope.read(written["prose"].prefix)
    for number in range(5):
        rows = microscope.sample_pieces(prose, number).itertuples(index=False)
        ids = [microscope.document(index, row[0])[row[1] : row[1] + row[2]] for row in rows]
        sample = prose[number]
        assert np.concatenate(ids).tolist() == [*sample["tokens"].tolist(), sample["labels"][-1].item()]


def asking_for(prefix, **fields):
    """A configuration that reads this data; the model of the tests has 1,024 ids."""
    cfg = small.config(tp=1, **fields)
    cfg.dataset.blend = cfg.dataset.split = None
    cfg.dataset.blend_per_split = [([str(prefix)], None), None, None]
    return cfg


def test_ids_beyond_the_model_start_no_rank(bridge, tmp_path, runs_directory):
    """Data of another tokenizer is named with its largest id and the model's rows, in every form of a blend; else it passes."""
    ids = [[number * 37 % 1000 for number in range(90)] for _ in range(40)]
    indexed.write(ids, tmp_path / "fits", vocab_size=1000, end_of_document=0)
    indexed.write([*ids, [1, 59_999]], tmp_path / "big", vocab_size=65_000, end_of_document=0)
    launch.prepare(asking_for(tmp_path / "fits"), ranks=2)
    both = asking_for(tmp_path / "fits")
    both.dataset.blend, both.dataset.blend_per_split = (
        ([str(tmp_path / name) for name in ("fits", "big")], [0.5, 0.5]),
        None,
    )
    listed = asking_for(tmp_path / "fits")
    listed.dataset.data_path, listed.dataset.blend_per_split = f"0.5 {tmp_path / 'fits'} 0.5 {tmp_path / 'big'}", None
    for cfg in (asking_for(tmp_path / "big"), both, listed):
        with pytest.raises(microscope.ForeignFile, match=r"big.bin has token id 59,999, .* has 1,024 rows"):
            launch.prepare(cfg, ranks=2)
    wide = asking_for(tmp_path / "big")
    wide.tokenizer.vocab_size = 60_000
    launch.prepare(wide, ranks=2)
    indexed.write(
        [*ids, [1, 60_999]], tmp_path / "big", vocab_size=65_000, end_of_document=0
    )  # the kept id is forgotten
    with pytest.raises(microscope.ForeignFile, match="token id 60,999"):
        launch.prepare(wide, ranks=2)


def test_the_largest_id_is_searched_once(bridge, tmp_path, runs_directory, monkeypatch):
    """It is kept beside the data, so that the next launch does not read a corpus of gigabytes again."""
    indexed.write([[1, 2, 999] * 20] * 9, tmp_path / "data", vocab_size=1000, end_of_document=0)
    launch.prepare(asking_for(tmp_path / "data"), ranks=2)
    kept = tmp_path / "data" / "cache" / "largest_id.json"
    size_bytes = (tmp_path / "data.bin").stat().st_size
    assert json.loads(kept.read_text()).items() >= {"largest_id": 999, "size_bytes": size_bytes}.items()
    monkeypatch.setattr(np, "memmap", lambda *_: pytest.fail("the ids are read again"))
    launch.prepare(asking_for(tmp_path / "data"), ranks=2)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("bytes_left", [0, 20, None])
def test_cut_or_empty_data_starts_no_rank(bridge, tmp_path, runs_directory, suffix, bytes_left):
    """A file that is empty, cut or not there is named before ranks start."""
    indexed.write([[1, 2, 3] * 20] * 9, tmp_path / "data", vocab_size=1000, end_of_document=0)
    file = tmp_path / f"data.{suffix}"
    if bytes_left is None:
        file.unlink()
    else:
        os.truncate(file, bytes_left)
    with pytest.raises(microscope.ForeignFile, match=str(file)):
        launch.prepare(asking_for(tmp_path / "data"), ranks=2)
    assert not runs_directory.exists()


def test_an_index_of_older_data_is_refused(bridge, tmp_path, runs_directory):
    """Megatron would read rewritten data by the index in your own path_to_cache; gone, it makes a new one."""
    prefix, cache = tmp_path / "data", tmp_path / "cache"

    def write(documents):
        indexed.write([[1, 2, 3] * 200] * documents, prefix, vocab_size=1000, end_of_document=0)

    cfg = asking_for(prefix, dataset__path_to_cache=str(cache))
    write(60)
    microscope.datasets(cfg, cache=cache)
    launch.prepare(cfg, ranks=2)
    write(20)
    with pytest.raises(
        microscope.ForeignFile, match=rf"{cache}/\w+-GPTDataset-train-description.txt .* older than {prefix}"
    ):
        launch.prepare(cfg, ranks=2)
    for file in cache.iterdir():
        file.unlink()
    launch.prepare(cfg, ranks=2)


def test_the_line_has_share_rate_and_time_left():
    """Of texts that come one by one the whole is not known: what is done and how fast is said then."""
    assert indexed._words(1_000_000, 0.5, of_bytes=4_000_000) == "25% of 4.0 MB tokenised, 2.0 MB/s, about 2 s left"
    assert indexed._words(4_000_000, 2.0) == "4.0 MB tokenised, 2.0 MB/s"


def test_lines_for_fine_tuning_are_never_cut_by_the_index_of_another_file(bridge, tmp_path):
    """Bridge makes the index once; a file that was written again has other lines, and the old index cuts through them."""
    from megatron.bridge.data.datasets.utils import build_index_files

    def written(*lines: str) -> None:
        (tmp_path / "training.jsonl").write_text("".join(f"{line}\n" for line in lines))

    cfg = {"dataset": {"dataset_root": str(tmp_path)}, "model": {}}
    written('{"input": "a"}', '{"input": "b"}')
    microscope.require(cfg)  # nobody has made an index yet
    build_index_files([str(tmp_path / "training.jsonl")], 10, workers=1)
    microscope.require(cfg)
    index = tmp_path / "training.jsonl.idx.npy"
    for lines in (['{"input": "longer"}', '{"input": "b"}'], ['{"input": "a"}'], ['{"input": "a"}'] * 3):
        written(*lines)
        with pytest.raises(microscope.ForeignFile, match=f"{index} is the index of another training.jsonl"):
            microscope.require(cfg)
    written('{"input": "c"}', '{"input": "d"}')
    microscope.require(cfg)  # the same lengths, so the same index
    whole = index.read_bytes()
    index.write_bytes(whole[:-4])
    with pytest.raises(microscope.ForeignFile, match="Delete"):
        microscope.require(cfg)
    (tmp_path / "training.jsonl.idx.info").unlink()
    microscope.require(cfg)  # Bridge makes both anew

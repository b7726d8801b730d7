"""Planted faults are what they say, copies are found, and Curator's stages step in this process."""

from __future__ import annotations

import pandas as pd
import pytest

from course_lib.text import curation, planted

TEXTS = [
    f"It's the story of number {n}, which has words a{n} b{n} c{n} of its own.\nAnd the end of {n} is here, too."
    for n in range(20)
]


@pytest.fixture(scope="module")
def crawl():
    """Twenty texts, four of them misread, and four faults of each other kind."""
    return planted.faults(TEXTS, each=4)


def test_each_kind_is_planted_as_often_as_asked(crawl):
    """Ids count up from 0, and a fault keeps the text that it was made from."""
    assert crawl.groupby("kind").size().to_dict() == {"clean": 16} | dict.fromkeys(planted.FAULTS, 4)
    assert crawl.id.tolist() == list(range(len(crawl)))
    made = crawl[crawl.good != ""]
    assert set(made.good) <= set(TEXTS)
    pd.testing.assert_frame_equal(planted.faults(TEXTS, each=4), crawl)


def test_faults_are_what_they_say(crawl):
    """A duplicate is equal, shuffled lines have their words, a misread text comes back, a cut one is its beginning."""
    by_kind = dict(list(crawl.groupby("kind")))
    assert (by_kind["exact duplicate"].text == by_kind["exact duplicate"].good).all()
    for row in by_kind["shuffled words"].itertuples():
        assert row.text != row.good
        for line, was in zip(row.text.split("\n"), row.good.split("\n"), strict=True):
            assert sorted(line.split()) == sorted(was.split())
            assert line.split()[-1] == was.split()[-1]
    for row in by_kind["mojibake"].itertuples():
        assert row.text.encode("cp1252").decode().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") == row.good
    assert not set(by_kind["mojibake"].good) & set(by_kind["clean"].text)
    assert all(
        row.good.startswith(row.text[:5]) and len(row.text.split()) <= 6 for row in by_kind["too short"].itertuples()
    )


@pytest.mark.parametrize(("options", "words"), [({"each": 21}, "only 20"), ({"each": 1, "kinds": ["spam"]}, "spam")])
def test_what_cannot_be_planted_is_refused(options, words):
    """A kind that does not exist, and more misread texts than there are."""
    with pytest.raises(ValueError, match=words):
        planted.faults(TEXTS, **options)


def test_near_duplicates_are_found_in_groups_and_all_but_one_go(crawl, tmp_path):
    """A chain of similar texts is one group; different texts are in none."""
    words = " ".join(f"word{n}" for n in range(60))
    rows = [words, f"{words} end", f"{words} end of it", " ".join(f"other{n}" for n in range(60))]
    frame = pd.DataFrame({"id": [7, 3, 5, 9], "text": rows})
    assert curation.near_duplicates(frame) == [[7, 3, 5]]
    assert curation.near_duplicates(frame.iloc[2:]) == []
    assert curation.identify([[7, 3, 5]], tmp_path / "ids.parquet") == 2
    assert pd.read_parquet(tmp_path / "ids.parquet").id.tolist() == [5, 7]


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        (0, "above 0 and below 1"),
        (-0.5, "above 0 and below 1"),
        (1.2, "above 0 and below 1"),
        (float("nan"), "above 0 and below 1"),
        (0.99, "Give at most 0.98; copies that are equal"),
        (1.0, "Give at most 0.98"),
    ],
)
def test_a_threshold_that_cannot_be_indexed_is_refused_with_the_fix(threshold, words):
    """In words of shares and numbers, not of bands that nobody gave; the refusal has no chain of datasketch's own."""
    with pytest.raises(ValueError, match=words) as refused:
        curation.near_duplicates(pd.DataFrame({"id": [1], "text": ["a b c"]}), threshold=threshold)
    assert refused.value.__cause__ is None and str(threshold) in str(refused.value)


def test_the_largest_threshold_is_indexed():
    """What the refusal advises works: equal texts are found by it."""
    words = " ".join(f"word{n}" for n in range(60))
    frame = pd.DataFrame({"id": [7, 3], "text": [words, words]})
    assert curation.near_duplicates(frame, threshold=curation.LARGEST_THRESHOLD) == [[7, 3]]


def test_stages_of_curator_step_here_and_say_what_is_left(crawl, tmp_path):
    """Rows and ids after each stage; the writer's files hold the same documents."""
    curation.quiet()
    from nemo_curator.stages.text.deduplication.removal import TextDuplicatesRemovalStage
    from nemo_curator.stages.text.io.reader import JsonlReader
    from nemo_curator.stages.text.io.writer import JsonlWriter

    copies = crawl[crawl.kind == "exact duplicate"]
    pairs = [crawl[crawl.text == text].id.tolist() for text in copies.text]
    curation.identify(pairs, tmp_path / "ids.parquet")
    stepped = curation.step([
        JsonlReader(file_paths=curation.write(crawl, tmp_path / "in", partitions=3), files_per_partition=1),
        TextDuplicatesRemovalStage(ids_to_remove_path=str(tmp_path / "ids.parquet"), id_field="id"),
        JsonlWriter(path=str(tmp_path / "out")),
    ])  # fmt: skip
    assert stepped.table.rows.tolist() == [3, len(crawl), len(crawl) - 4, 3]
    assert stepped.left[2] == set(crawl.id) - set(copies.id)
    pd.testing.assert_frame_equal(
        curation.kept(tmp_path / "out"), crawl.drop(copies.index).reset_index(drop=True), check_dtype=False
    )


def test_what_filters_take_is_counted_by_kind(crawl):
    """One row a filter, the kinds in the order of the crawl."""
    table = curation.taken(crawl, {"all": crawl.id, "none": []})
    assert table.loc["all"].tolist() == [16] + [4] * 7
    assert table.loc["none"].sum() == 0
    assert list(table) == ["clean", *planted.FAULTS]

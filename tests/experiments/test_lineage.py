"""Artifacts with digests: what is published is what is verified, and a stage is run again only if something changed."""

import json
from pathlib import Path

import pytest

from course_lib.experiments import lineage
from course_lib.experiments.lineage import Changed, NoArtifact, Store


@pytest.fixture
def chain(tmp_path: Path) -> Store:
    """Text, the model made of it, and an evaluation of the model."""
    store = Store(tmp_path / "artifacts")
    for name in ("text", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one").write_text(name)
        (tmp_path / name / "two").write_text(name)
    (tmp_path / "scores.json").write_text("{}")
    store.publish("text", tmp_path / "text", kind="dataset")
    store.publish("model", tmp_path / "model", kind="model", inputs=["text"], producer="run-7", steps=3)
    store.publish("scores", tmp_path / "scores.json", kind="evaluation", inputs=["model:v1"])
    return store


def test_the_manifest_has_nemotrons_keys_and_three_more(chain: Store) -> None:
    """The keys are those of `ManifestTracker` @ e27b371, in its order; whoever reads those finds them here."""
    theirs = ["name", "version", "type", "path", "created_at", "producer", "metadata", "inputs", "used_artifacts"]
    manifest = json.loads((chain.root / "model/v1/manifest.json").read_text())
    assert [key for key in manifest if key not in lineage.ADDED] == theirs
    assert set(lineage.ADDED) < set(manifest)
    assert manifest["used_artifacts"] == ["text:v1"] and manifest["metadata"] == {"steps": 3}
    assert json.loads((chain.root / "model/v1/metadata.json").read_text()) == {"steps": 3}
    assert (chain.root / "model/latest").read_text() == "v1"


def test_the_walk_goes_from_the_evaluation_to_the_text(chain: Store) -> None:
    rows = chain.back("scores")
    assert list(zip(rows.depth, rows.ref, strict=True)) == [(0, "scores:v1"), (1, "model:v1"), (2, "text:v1")]
    assert list(rows.producer) == ["", "run-7", ""] and list(rows.files) == [1, 2, 2]


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_changed_file_is_named_wherever_one_begins(chain: Store, how: str) -> None:
    place = chain.read("text").path / "two"
    place.write_text("other") if how == "changed" else place.unlink()
    for ask in (chain.verify, chain.back):
        with pytest.raises(Changed, match=r"text:v1: two is (not the file|gone)"):
            ask("text" if ask == chain.verify else "scores")
    with pytest.raises(Changed):
        chain.publish("model", chain.read("model").path, kind="model", inputs=["text"])
    assert chain.read("model").ref == "model:v1"


def test_a_file_beside_the_published_ones_is_no_change(chain: Store) -> None:
    """Megatron writes its indices into the folder of the data."""
    (chain.read("text").path / "cache").mkdir()
    (chain.read("text").path / "cache" / "index.npy").write_text("x")
    assert chain.verify("text").ref == "text:v1"


def test_a_version_that_was_overwritten_is_not_the_one_that_was_used(chain: Store) -> None:
    place = chain.root / "text/v1/manifest.json"
    manifest = json.loads(place.read_text())
    (chain.read("text").path / "two").write_text("other")
    again = chain.publish("text", chain.read("text").path, kind="dataset")
    place.write_text(json.dumps(manifest | {"files": again.manifest["files"], "digest": again.digest}))
    assert chain.verify("text:v1").digest == again.digest
    with pytest.raises(Changed, match="model:v1 was made of another text:v1"):
        chain.back("scores")


def test_what_is_not_there_is_refused_with_what_there_is(chain: Store, tmp_path: Path) -> None:
    with pytest.raises(NoArtifact, match="there is text:v1"):
        chain.read("text:v9")
    with pytest.raises(NoArtifact, match="there is model, scores, text"):
        chain.read("txet")
    with pytest.raises(NoArtifact, match="there is nothing"):
        Store(tmp_path / "empty").read("text")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        chain.publish("hollow", tmp_path / "hollow", kind="dataset")


def test_a_publisher_that_dies_leaves_the_version_before(chain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lineage.files, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        chain.publish("text", chain.read("text").path, kind="dataset")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        chain.publish("text", chain.read("text").path, kind="dataset")
    assert chain.read("text").ref == "text:v1"
    assert [p.name for p in (chain.root / "text").iterdir() if p.name.startswith(".")] == []


class Stages:
    """Two stages that count how often they are run."""

    def __init__(self, store: Store) -> None:
        self.store, self.ran = store, []

    def __call__(self, *, first: int = 1, second: int = 1) -> lineage.Artifact:
        def make(name: str, number: int):
            def made(folder: Path) -> Path:
                self.ran.append(name)
                (folder / "it").write_text(f"{name} {min(number, 5)}")
                return folder

            return made

        text = self.store.stage("text", make("text", first), kind="dataset", settings={"n": first})
        settings = {"n": second}
        return self.store.stage("model", make("model", second), kind="model", inputs=[text], settings=settings)


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    stages = Stages(Store(tmp_path))
    one = stages()
    assert stages() == one and stages.ran == ["text", "model"]
    assert stages(second=2).ref == "model:v2" and stages.ran[2:] == ["model"]
    assert stages(first=2).ref == "model:v3" and stages.ran[3:] == ["text", "model"]
    assert stages() == one and len(stages.ran) == 5


def test_an_input_that_comes_out_the_same_changes_nothing(tmp_path: Path) -> None:
    """Settings 6 and 7 give the same text, so the model is not made again."""
    stages = Stages(Store(tmp_path))
    stages(first=6)
    stages(first=7)
    assert stages.ran == ["text", "model", "text"]


def test_an_artifact_that_was_changed_is_made_again(tmp_path: Path) -> None:
    stages = Stages(Store(tmp_path))
    (stages().path / "it").write_text("other")
    assert stages().ref == "model:v2" and stages.ran == ["text", "model", "model"]
    assert stages.store.verify("model").ref == "model:v2"


def test_a_killed_stage_finds_what_it_left(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def doomed(folder: Path) -> Path:
        (folder / "half").write_text("step 6")
        raise KeyboardInterrupt

    def goes_on(folder: Path) -> Path:
        assert (folder / "half").read_text() == "step 6"
        return folder

    with pytest.raises(KeyboardInterrupt):
        store.stage("model", doomed, kind="model", settings={})
    with pytest.raises(NoArtifact):
        store.read("model")
    assert store.stage("model", goes_on, kind="model", settings={}).ref == "model:v1"


def test_the_producer_is_the_run_that_the_files_lie_in(tmp_path: Path) -> None:
    run = tmp_path / "runs/sft-3"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/weights").write_text("w")
    (run / "launch.json").write_text("{}")
    made = Store(tmp_path).stage("model", lambda _: run / "checkpoints", kind="model", settings={})
    assert made.manifest["producer"] == "sft-3"

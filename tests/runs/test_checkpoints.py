"""Checkpoints: what is in one, whether it is whole, that a resume repeats the run, and which resumes go wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest

from course_lib import launch, runs, stack
from course_lib.common.config import changed
from course_lib.experiments import generate
from course_lib.ranks import train
from course_lib.runs import checkpoints, failures
from support import small

STEPS, EVERY = 6, 2


def config(**fields):
    """Two ranks, four sequences a step, the recipe's distributed optimizer, a save every second step."""
    distributed = {"ddp__use_distributed_optimizer": True, "optimizer__use_distributed_optimizer": True}
    reshardable = {"checkpoint__dist_ckpt_optim_fully_reshardable": True, "checkpoint__save_interval": EVERY}
    shape = {"tp": 1, "train_iters": STEPS, "train__global_batch_size": 4}
    return small.config(**shape | distributed | reshardable | fields)


def test_a_plain_script_may_read_a_checkpoint(bridge, tmp_path, monkeypatch):
    """Without it, Bridge's first import in a process stops at Transformer Engine."""
    prepared = []
    monkeypatch.setattr(stack, "prepare_imports", lambda: prepared.append("before"))
    assert checkpoints.run_config(checkpoints.Checkpoint(tmp_path, 0, True)) == {} and prepared == ["before"]


@pytest.fixture(scope="module")
def whole(bridge, tmp_path_factory):
    """A run that saved three times and was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield launch.run(config(), ranks=2, name="whole", save=True, show=None)


def copied(saved, place):
    """A copy of a checkpoint that a test may damage."""
    shutil.copytree(saved.path, place / saved.path.name)
    return checkpoints.at(place, saved.step)


def test_the_listing_says_what_is_there(whole):
    """Every save is listed, whole, and the tracker names the last one."""
    table = checkpoints.listing(whole)
    assert table.index.tolist() == [2, 4, 6] and table.latest.tolist() == [False, False, True]
    assert set(table.missing) == {""} and checkpoints.latest(whole).step == 6
    with pytest.raises(checkpoints.NoCheckpoint, match="saved are: 2, 4, 6"):
        checkpoints.at(whole, 3)


def test_tensors_have_the_bytes_that_the_optimizer_implies(whole):
    """Weights, fp32 weights and two moments: four times the parameters, each of 4 bytes, and `files` has them all."""
    saved = checkpoints.latest(whole)
    sizes = checkpoints.tensors(saved).groupby("part").size_bytes.sum()
    assert len(sizes) == 4 and sizes.nunique() == 1
    files = checkpoints.files_of(saved)
    assert saved.size_bytes == files.size_bytes.sum() > sizes.sum()
    assert files.holds["__1_0.distcp"].endswith("rank 1 wrote") and "run_config.yaml" in files.index


def test_a_tensor_is_read_whole(whole):
    """One tensor comes back with its global shape, and a wrong name says where to look."""
    name = "decoder.layers.mlp.linear_fc2.weight"
    weight = checkpoints.read(checkpoints.latest(whole), name)
    assert tuple(weight.shape) == checkpoints.tensors(checkpoints.latest(whole)).loc[name, "shape"] == (4, 128, 256)
    assert 0 < float(weight.std()) < 1
    with pytest.raises(KeyError, match="checkpoints.tensors"):
        checkpoints.read(checkpoints.latest(whole), "decoder.nothing")


def test_a_torn_checkpoint_is_not_taken_as_whole(whole, tmp_path):
    """A missing index, a missing shard, a cut shard, a cut index and a missing state are each named."""

    def damage(action):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        saved = copied(checkpoints.latest(whole), place)
        action(saved.path)
        return " ".join(saved.missing)

    def cut(file):
        os.truncate(file, file.stat().st_size // 2)

    assert damage(lambda path: None) == ""
    assert ".metadata: not written" in damage(lambda path: (path / ".metadata").unlink())
    assert "__0_0.distcp: not there" in damage(lambda path: (path / "__0_0.distcp").unlink())
    assert "__1_0.distcp" in (found := damage(lambda path: cut(path / "__1_0.distcp"))) and "bytes of" in found
    assert ".metadata: cannot be read" in damage(lambda path: cut(path / ".metadata"))
    assert "train_state.pt: not written" in damage(lambda path: (path / "train_state.pt").unlink())
    assert "run_config.yaml: not written" in damage(lambda path: (path / "run_config.yaml").unlink())


def test_a_torn_checkpoint_starts_no_rank(whole, tmp_path, runs_directory):
    """Whether it is loaded by its own directory, by the tracker, or as pretrained weights: the file and its bytes are named."""
    saved = copied(checkpoints.latest(whole), tmp_path)
    (tmp_path / checkpoints.TRACKERS[1]).write_text(str(saved.step))
    os.truncate(saved.path / "__0_0.distcp", 1000)
    for place in (saved.path, tmp_path):
        with pytest.raises(checkpoints.WrongCheckpoint, match="is torn, .*: __0_0.distcp: 1,000 bytes of .*listing"):
            launch.run(config(), ranks=2, name="torn", load=place, show=None)
    with pytest.raises(checkpoints.WrongCheckpoint, match="__0_0.distcp: 1,000 bytes"):
        launch.run(config(checkpoint__pretrained_checkpoint=str(tmp_path)), ranks=2, name="torn", show=None)
    assert not runs_directory.exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def saved_by_torch(**options):
    """What torch.save makes of it, in torch's own form or in the one before."""
    import torch

    stream = io.BytesIO()
    torch.save(Evil(), stream, **options)
    return stream.getvalue()


def in_a_shard(path, data):
    """Put an object at the end of a shard, and let the index take the state of the run from there."""
    shard, index = path / "__0_0.distcp", checkpoints._index(path)
    key = next(key for key in index.storage_data if key.fqn.startswith("common_state"))
    place = dataclasses.replace(index.storage_data[key], offset=shard.stat().st_size, length=len(data))
    index.storage_data[key] = place
    with shard.open("ab") as stream:
        stream.write(data)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def outside(path):
    """Let the index take an object from another directory."""
    index = checkpoints._index(path)
    key = next(iter(index.storage_data))
    index.storage_data[key] = dataclasses.replace(index.storage_data[key], relative_path="../evil")
    (path / ".metadata").write_bytes(pickle.dumps(index))


def nested(path):
    """An index of its own, as quantised models have it."""
    (path / "modelopt_state").mkdir()
    (path / "modelopt_state" / ".metadata").write_bytes(pickle.dumps(Evil()))


FOREIGN = {
    "index": (".metadata", lambda path: (path / ".metadata").write_bytes(pickle.dumps(Evil()))),
    "index by another name": (
        ".metadata",
        lambda path: (path / ".metadata").write_bytes(b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c\x0b"
                                                       b"touch PWNED\x85R."),
    ),
    "no index": (".metadata", lambda path: (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))),
    "index that points outside": (".metadata", outside),
    "nested index": (".metadata", nested),
    "shard": ("__0_0.distcp", lambda path: in_a_shard(path, saved_by_torch())),
    "shard of old": (
        "__0_0.distcp",
        lambda path: in_a_shard(path, saved_by_torch(_use_new_zipfile_serialization=False)),
    ),
    "shard with a bare pickle": ("__0_0.distcp", lambda path: in_a_shard(path, pickle.dumps(Evil()))),
    "state of the run": ("train_state.pt", lambda path: (path / "train_state.pt").write_bytes(saved_by_torch())),
    "state of Megatron": ("common.pt", lambda path: (path / "common.pt").write_bytes(saved_by_torch())),
    "configuration": (
        "run_config.yaml",
        lambda path: (path / "run_config.yaml").write_text("model: {_target_: torch.os.system, command: touch PWNED}\n"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_code_in_a_checkpoint_is_named_and_never_runs(whole, kind, tmp_path, monkeypatch, runs_directory):
    """Looking, resuming, taking pretrained weights, generating, and a rank's own look: the file is named and nothing runs."""
    monkeypatch.chdir(tmp_path)
    file, plant = FOREIGN[kind]
    run = runs.Run(tmp_path / "passed-on")
    saved = copied(checkpoints.latest(whole), run.path / "checkpoints")
    tracker = saved.path.parent / checkpoints.TRACKERS[1]
    tracker.write_text(str(saved.step))
    plant(saved.path)
    roads = (
        lambda: launch.run(config(), ranks=2, load=run, show=None),
        lambda: launch.run(config(), ranks=2, load=saved.path, show=None),
        lambda: launch.run(config(checkpoint__pretrained_checkpoint=str(saved.path)), ranks=2, show=None),
        lambda: generate.texts(run, ["a"]),
        lambda: train._read(written_by_hand, 2),
    )
    written_by_hand = tmp_path / "by-hand"
    written_by_hand.mkdir()
    config(checkpoint__load=str(saved.path)).to_yaml(str(written_by_hand / "config.yaml"))
    for road in roads:
        with pytest.raises((checkpoints.WrongCheckpoint, launch.ConfigError), match=file):
            road()
    assert len(checkpoints.listing(run)) == 1
    with contextlib.suppress(checkpoints.WrongCheckpoint, pickle.UnpicklingError, KeyError):
        checkpoints.tensors(saved)
    assert not (tmp_path / "PWNED").exists() and not runs_directory.exists()


def test_foreign_code_in_a_tracker_never_runs(whole, tmp_path, monkeypatch):
    """Bridge's tracker is a file of torch's; what is no plain data there names no step."""
    monkeypatch.chdir(tmp_path)
    copied(checkpoints.latest(whole), tmp_path)
    (tmp_path / checkpoints.TRACKERS[0]).write_bytes(saved_by_torch())
    with pytest.raises(checkpoints.NoCheckpoint, match=checkpoints.TRACKERS[0]):
        checkpoints.require(tmp_path)
    assert not checkpoints.listing(tmp_path).latest.any() and not (tmp_path / "PWNED").exists()


def test_what_the_trackers_say(whole, tmp_path, bridge):
    """Either tracker is enough; each sentence about a missing checkpoint is true."""
    saved = copied(checkpoints.latest(whole), tmp_path / "one")
    place, (state, number) = saved.path.parent, checkpoints.TRACKERS

    def refused():
        with pytest.raises(checkpoints.NoCheckpoint) as caught:
            checkpoints.require(place)
        return str(caught.value)

    assert f"saved is iter_{saved.step:07d}" in refused() and "no save was completed" in refused()
    shutil.copy(whole.path / "checkpoints" / state, place / state)
    assert checkpoints.require(place).step == saved.step
    (place / number).write_text("2")  # Bridge asks its own tracker first
    assert checkpoints.require(place).step == saved.step
    (place / state).unlink()
    assert "names iter_0000002, which is not there" in refused()
    (place / number).write_text("soon")
    assert "names no step but 'soon'" in refused()
    (place / number).write_text("release")
    assert "names release, which is not there" in refused()
    saved.path.rename(place / "release")
    assert checkpoints.require(place).path.name == "release"
    with pytest.raises(checkpoints.NoCheckpoint, match="there is no directory"):
        checkpoints.require(tmp_path / "typo")


def test_a_checkpoint_of_another_model_is_refused(whole, runs_directory):
    """Layers, width and vocabulary are compared before ranks start; both values are named."""
    for field, value, words in (
        ("model__num_layers", 3, "num_layers is 4 there and 3 in cfg.model"),
        ("model__ffn_hidden_size", 512, "ffn_hidden_size is 256 there and 512"),
        ("model__num_query_groups", 2, "num_query_groups is 8 there and 2"),
        ("tokenizer__vocab_size", 3000, "its embedding has 1,024 rows and that of cfg has 3,072"),
    ):
        with pytest.raises(checkpoints.WrongCheckpoint, match=words):
            launch.run(config(**{field: value}), ranks=2, load=whole, show=None)
    assert not runs_directory.exists()


def test_experts_are_resharded_above_one_and_refused_across_it(bridge, runs_directory):
    """EP=2 to EP=4 goes on with equal losses and gradient norms; EP=1 has another optimizer, and the fix is named."""
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64, "moe_grouped_gemm": False}
    fields = {f"model__{name}": value for name, value in experts.items()} | {"model__num_layers": 2}
    fields |= {"model__moe_token_dispatcher_type": "alltoall", "scheduler__lr_decay_iters": STEPS}

    def run(ep, ranks=4, **more):
        cfg = config(model__expert_model_parallel_size=ep, **fields | {"train_iters": 2} | more)
        return launch.run(cfg, ranks=ranks, name=f"ep{ep}", show=None, **({"load": start} if start else {"save": True}))

    start = None
    whole = run(2, checkpoint__save_interval=1)
    start, last = checkpoints.at(whole, 1).path, whole.metrics.iloc[-1]
    for resumed in (run(4), run(1, checkpoint__load_optim=False, checkpoint__load_rng=False)):
        for column in ("loss", "grad_norm"):
            assert resumed.metrics[column].tolist() == pytest.approx([last[column]], abs=1e-5)
    with pytest.raises(checkpoints.WrongCheckpoint, match="saved at EP=2, and its optimizer does not fit EP=1"):
        run(1)
    with pytest.raises(checkpoints.WrongCheckpoint, match="load_rng = False"):
        run(2, ranks=2)


def test_compare_finds_a_difference(whole):
    """Equal checkpoints differ by nothing; those of two steps differ in weights and moments."""
    last = checkpoints.latest(whole)
    assert checkpoints.compare(last, last).largest_difference.max() == 0
    moved = checkpoints.compare(checkpoints.at(whole, 2), last)
    assert moved.largest_difference.min() > 0 and len(moved) == len(checkpoints.tensors(last))


@pytest.mark.parametrize(("tp", "pp", "ranks"), [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_a_resume_repeats_the_run(whole, runs_directory, tp, pp, ranks):
    """The distributed optimizer goes on where it was: every digit in the same layout, 1e-5 in another."""
    run = launch.run(config(tp=tp, pp=pp), ranks=ranks, name="resumed", load=checkpoints.at(whole, 2).path, show=None)
    assert run.metrics.step.tolist() == [3, 4, 5, 6]
    if (tp, pp, ranks) == (1, 1, 2):
        assert runs.difference(run, whole) == 0
    assert runs.difference(run, whole) < 1e-5


def test_the_recipes_format_refuses_another_layout_with_a_hint(bridge, runs_directory):
    """Bridge's own message names a field that is set already; the hint names the right one."""
    fields = {"checkpoint__dist_ckpt_optim_fully_reshardable": False, "train_iters": 2}
    start = launch.run(config(**fields), ranks=2, name="start", save=True, show=None)
    with pytest.raises(launch.RunFailed, match="dist_ckpt_optim_fully_reshardable = True"):
        launch.run(config(tp=2), ranks=2, name="other", load=start, show=None)


def test_a_changed_learning_rate_is_refused_with_a_hint(whole, runs_directory):
    """Megatron Core finds parameter groups by their peak rate; without the optimizer the run starts its schedule anew."""
    with pytest.raises(launch.RunFailed, match="has another lr, min_lr or weight decay"):
        launch.run(config(optimizer__lr=5e-4), ranks=2, name="rate", load=whole, show=None)
    assert "parameter groups" in failures.hint_for("ValueError: Could not find parameter group with key (None, 0.0005)")
    fields = {"optimizer__lr": 5e-4, "checkpoint__load_optim": False}
    anew = launch.run(config(**fields), ranks=2, name="anew", load=checkpoints.at(whole, 4).path, show=None)
    assert anew.metrics.step.tolist() == [5, 6] and anew.metrics.learning_rate.iloc[0] == pytest.approx(5e-4)


def test_nothing_to_load_is_refused_before_a_process_starts(bridge, runs_directory, tmp_path):
    """Bridge would start from random weights where a path is wrong; launch.run does not."""
    with pytest.raises(checkpoints.NoCheckpoint, match="there is no directory"):
        launch.run(config(), ranks=2, name="typo", load=tmp_path / "nothing", show=None)
    assert not runs_directory.exists()


def test_another_batch_is_told_before_it_runs(whole, runs_directory):
    """The checkpoint's own batch stands in launch.json, whether the run or one save of it is loaded."""
    batch = config().train.global_batch_size
    assert launch.prepare(config(), ranks=2, load=whole).warnings == ()
    for place in (whole, checkpoints.at(whole, 2).path):
        (told,) = launch.prepare(config(train__global_batch_size=2 * batch), ranks=2, load=place).warnings
        assert f"a global batch of {batch} and this run goes on with {2 * batch}" in told


@pytest.mark.parametrize("when", ["mid_save", "mid_step"])
def test_a_killed_rank_costs_at_most_the_steps_since_the_last_save(whole, runs_directory, when):
    """Killed in a step or while it saves, the run goes on from the last whole checkpoint and ends with equal tensors."""
    with pytest.raises(launch.RunFailed, match="rank 1 was killed by SIGKILL") as caught:
        launch.run(config(), ranks=2, name=when, save=True, show=None, target=f"support.drills:is_killed_{when}")
    doomed = caught.value.run
    table = checkpoints.listing(doomed)
    assert checkpoints.latest(doomed).step == 2 and table.missing[2] == ""
    if when == "mid_save":
        assert table.missing[4].startswith(".metadata"), "the directory of step 4 is torn"
    again = launch.run(config(), ranks=2, name="again", save=True, load=doomed, show=None)
    assert doomed.metrics.step.max() - (again.metrics.step.min() - 1) <= EVERY
    assert runs.difference(again, whole) == 0
    assert checkpoints.compare(checkpoints.latest(whole), checkpoints.latest(again)).largest_difference.max() == 0


def test_a_full_disk_during_a_save_costs_no_checkpoint(whole, runs_directory):
    """Rank 1 finds no space for its shard: told as such, the save before is whole and tracked, and resumes equally."""

    def fill(run):
        shard = run.path / "checkpoints" / "iter_0000004" / "__1_0.distcp"
        if not shard.is_symlink():
            shard.parent.mkdir(parents=True, exist_ok=True)
            shard.symlink_to("/dev/full")

    with pytest.raises(launch.RunFailed, match="rank 1 could not write .*No space left on device") as caught:
        launch.run(config(), ranks=2, name="full", save=True, show=None, watch=fill)
    full = caught.value.run
    assert caught.value.outcome.hint.startswith("The disk is full")
    assert all("No space" not in rank["message"] for rank in full.ranks().values()), "upstream now says why: simplify"
    assert checkpoints.latest(full).step == 2 and checkpoints.listing(full).missing[2] == ""
    assert checkpoints.listing(full).missing[4].startswith(".metadata")
    again = launch.run(config(), ranks=2, name="again", load=full, show=None)
    assert runs.difference(again, whole) == 0


def test_a_changed_schedule_is_taken_refused_or_ignored_as_asked(whole, runs_directory):
    """The recipe overrides the checkpoint's schedule; without that Megatron Core stops, or keeps the old one if told so."""
    start = {"ranks": 2, "load": checkpoints.at(whole, 4).path, "show": None}
    longer = {"scheduler__lr_decay_iters": 60}
    assert config().scheduler.override_opt_param_scheduler
    taken = launch.run(config(**longer), name="taken", **start).metrics.learning_rate
    strict = longer | {"scheduler__override_opt_param_scheduler": False}
    with pytest.raises(launch.RunFailed, match="override_opt_param_scheduler = True takes the new"):
        launch.run(config(**strict), name="refused", **start)
    kept = strict | {"scheduler__use_checkpoint_opt_param_scheduler": True}
    ignored = launch.run(config(**kept), name="ignored", **start).metrics.learning_rate
    assert ignored.tolist() == whole.metrics.learning_rate[4:].tolist() and (taken > ignored).all()


def test_only_the_newest_checkpoints_are_kept_if_asked(bridge, runs_directory):
    """most_recent_k is Bridge's retention: older directories go after a save has ended."""
    run = launch.run(config(checkpoint__most_recent_k=1), ranks=2, name="kept", save=True, show=None)
    assert checkpoints.listing(run).index.tolist() == [STEPS]


def test_watch_is_called_while_the_run_goes_on(bridge, runs_directory):
    """`watch` sees the run before its outcome, and may kill one of its ranks."""
    seen = []

    def kill_at_first_sight(run):
        seen.append(run.outcome)
        if run.stage() == "training":
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.ranks()[1]["pid"], signal.SIGKILL)

    with pytest.raises(launch.RunFailed, match="rank 1 was killed"):
        launch.run(config(train_iters=2000), ranks=2, name="watched", show=None, watch=kill_at_first_sight)
    assert seen[0] is None and not Path(runs_directory / "watched" / "checkpoints").exists()


def test_a_model_whose_state_cannot_be_collected_is_refused_before_it_trains(bridge, runs_directory) -> None:
    """Tokens ahead, tied embeddings and two stages stop in Core at the first save, hours into a run; any two of them pass."""
    wrong = {"model.mtp_num_layers": 1, "model.pipeline_model_parallel_size": 2}
    wrong["model.share_embeddings_and_output_weights"] = True
    right = {"model.mtp_num_layers": None, "model.pipeline_model_parallel_size": 1}
    right["model.share_embeddings_and_output_weights"] = False
    cfg = changed(small.config(tp=1), wrong)
    with pytest.raises(launch.ConfigError, match=r"mtp_num_layers=1, tied embeddings and PP=2: set cfg\.model"):
        launch.prepare(cfg, ranks=2, save=True)
    assert not list(runs_directory.glob("*"))
    launch.prepare(cfg, ranks=2)
    for place in ("load", "pretrained_checkpoint"):
        with pytest.raises(launch.ConfigError, match="tied embeddings"):
            checkpoints.refuse_without_state(
                changed(cfg, {"checkpoint.save": None, f"checkpoint.{place}": "somewhere"})
            )
    for field, value in right.items():
        launch.prepare(changed(cfg, {field: value}), ranks=2, save=True)

"""Launching: the run directory, equal losses whatever the layout, and refusals at the door.

That a warm launch, torchrun, two agents and NeMo Run train the same in every digit is claimed, and run, by lesson 07.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib import launch, runs, stack
from course_lib.common.project import PROJECT
from course_lib.launch import forkserver, supervise, torchrun
from course_lib.planning import layout
from course_lib.ranks import train
from course_lib.runs import config_file
from course_lib.stack import devices
from support import families, small


def config(**fields):
    """The small model with four sequences a step: in most layouts each is a microbatch of every rank."""
    return small.config(**{"train__global_batch_size": 4} | fields)


@pytest.fixture(scope="module")
def first_run(bridge, tmp_path_factory):
    """Eight ranks, three steps, TP=2 DP=4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield launch.run(config(), ranks=8, name="first", show=None)


def test_a_run_leaves_the_promised_files(first_run):
    """Everything that a figure needs is in the run directory, and says what was asked for."""
    names = {path.name for path in first_run.path.iterdir()}
    assert {"config.yaml", "launch.json", "metrics.jsonl", "memory.jsonl", "outcome.json", "logs", "ranks"} <= names
    assert not {name for name in names if name.startswith(".")}, "nothing temporary is left"
    assert first_run.outcome.status == "succeeded" and first_run.outcome.rank is None
    assert first_run.launch["layout"]["data_parallel_size"] == 4 and first_run.launch["device"] == "cpu"
    assert first_run.launch["versions"]["megatron-bridge"] == "0.6.2"
    assert {f"rank_{rank}.log" for rank in range(8)} <= {path.name for path in (first_run.path / "logs").iterdir()}


def test_metrics_agree_with_what_bridge_prints(first_run):
    """The callback's loss and Bridge's own log line, which the last rank prints, are the same numbers."""
    import re

    printed = [float(x) for x in re.findall(r"lm loss: (\S+)", first_run.log(7))]
    assert len(printed) == 3
    assert first_run.metrics.loss.tolist() == pytest.approx(printed, rel=1e-6)
    rates = [float(x) for x in re.findall(r"learning rate: (\S+)", first_run.log(7))]
    assert first_run.metrics.learning_rate.tolist() == pytest.approx(rates, rel=1e-5)


def test_memory_is_recorded_by_every_rank(first_run):
    """All ranks report, and a rank holds at least its weights, gradients and Adam's two moments in fp32."""
    import re

    held = first_run.memory.groupby("rank").memory_bytes.max()
    assert sorted(held.index) == list(range(8))
    parameters = int(re.search(r"parallel rank \(0, [\d, ]+\): (\d+)", first_run.log(0)).group(1))
    assert held.min() > 4 * 4 * parameters
    peaks = first_run.memory.groupby("rank").peak_memory_bytes.max()
    assert (peaks >= held).all() and peaks.max() < 2**30


def test_processes_end_with_the_run(first_run):
    """No rank is left, checked by pid."""
    assert [entry["pid"] for entry in first_run.ranks().values() if alive(entry["pid"])] == []


def test_the_table_of_device_fields_is_complete(bridge, runs_directory):
    """What Bridge receives in a rank differs from config.yaml in exactly the fields of the table, each with a reason."""
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config

    from course_lib import recipes
    from course_lib.ranks import train

    with recipes.offline():
        cfg = llama32_1b_pretrain_config()
    target = "support.drills:writes_what_it_would_train_with"
    run = launch.run(cfg, ranks=1, name="used", show=None, target=target)
    asked, used = (train.read_config(run.path / name) for name in ("config.yaml", "used.yaml"))
    table = launch.differences(cfg)
    assert set(recipes.diff(asked, used).field) == set(table.index) and len(table) > 15
    assert table.why.str.len().min() > 0 and len({f.path for f in devices.FIELDS}) == len(devices.FIELDS)
    assert not devices.differences(used), "applied twice, nothing is left to change"


@pytest.mark.parametrize(
    "fields",
    [
        {"pp": 2, "model__gradient_accumulation_fusion": True, "model__defer_embedding_wgrad_compute": True},
        {
            "model__num_moe_experts": 4,
            "model__moe_ffn_hidden_size": 64,
            "model__moe_token_dispatcher_type": "alltoall",
            "model__expert_model_parallel_size": 2,
            "model__bf16": True,
            "model__overlap_moe_expert_parallel_comm": True,
            "model__delay_wgrad_compute": True,
            "model__ep_overlap_early_attn_memory_release": True,
        },
    ],
    ids=["deferred", "overlapped"],
)
def test_what_hangs_on_a_changed_field_is_changed_with_it(bridge, fields):
    """Megatron accepts the ranks' configuration, although it refuses what stands in it without what the ranks change."""
    cfg = small.config(**{"tp": 1} | fields)
    devices.applied(cfg).model.finalize()


def test_what_only_a_gpu_has_is_left_out_and_changes_no_result(bridge, runs_directory):
    """Transformer Engine's activation, its largest score, moving to the CPU, NCCL's buffers, and graphs by their older name."""
    model = {"use_te_activation_func": True, "log_max_attention_logit": True, "cpu_offloading": True}
    model |= {"cpu_offloading_num_layers": 1, "enable_cuda_graph": True, "fused_single_qkv_rope": True}
    rest = {"optimizer__optimizer_cpu_offload": True, "ddp__nccl_ub": True}
    rest |= {"optimizer__overlap_param_gather_with_optimizer_step": True}
    both = [
        launch.run(small.config(tp=1, train_iters=2, **fields), ranks=1, show=None)
        for fields in ({}, rest | {f"model__{name}": value for name, value in model.items()})
    ]
    assert runs.difference(*both) == 0


def test_what_stops_while_the_model_is_built_names_the_fields(bridge, runs_directory):
    """The rank's words are a division by zero deep in Megatron; the first failing rank and the fields stand beside it."""
    yarn = {"beta_fast": 0.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rotary_scaling_factor": 4.0}
    fields = {f"model__yarn_{name}": value for name, value in yarn.items()}
    cfg = small.config(model__position_embedding_type="yarn", model__yarn_original_max_position_embeddings=16, **fields)
    with pytest.raises(launch.RunFailed) as caught:
        launch.run(cfg, ranks=2, show=None)
    words = str(caught.value)
    assert re.search(r"rank [01] raised ZeroDivisionError: float division by zero", words)
    assert "Megatron was building the model, and read cfg.model.yarn_beta_fast=0.0, cfg.model.yarn_" in words


def test_a_run_never_changes_the_configuration_that_it_was_given(bridge, runs_directory):
    """The notebook's cfg stays as the learner wrote it, so that a cell can be run twice."""
    from course_lib import recipes

    cfg = small.config(train_iters=1)
    before = copy.deepcopy(cfg)
    one = launch.run(cfg, ranks=2, name="twice", show=None)
    two = launch.run(cfg, ranks=2, name="twice", show=None)
    assert len(recipes.diff(before, cfg)) == 0
    assert (one.name, two.name) == ("twice", "twice-2") and runs.difference(one, two) == 0
    assert "checkpoints" not in os.listdir(one.path), "nothing is saved unless asked"


def test_losses_do_not_depend_on_tensor_or_data_parallelism(bridge, first_run, runs_directory):
    """The same seed gives the same weights without a checkpoint, so the losses agree to fp32's rounding (1e-5)."""
    for tp, ranks in ((1, 1), (1, 4), (4, 8), (8, 8)):
        run = launch.run(config(tp=tp), ranks=ranks, name=f"tp{tp}-of-{ranks}", show=None)
        assert runs.difference(run, first_run) < 1e-5, run.name


def test_losses_do_not_depend_on_the_layout_after_a_checkpoint(bridge, runs_directory):
    """Weights and moments of one rank go on in four layouts of four and eight ranks: equal losses and gradient norms."""
    schedule = {"scheduler__lr_decay_iters": 10}
    start = launch.run(config(tp=1, train_iters=1, **schedule), ranks=1, name="start", save=True, show=None)
    alone = None
    for tp, pp, ranks in ((1, 1, 1), (4, 1, 4), (2, 2, 8), (1, 4, 4), (1, 1, 4)):
        cfg = config(tp=tp, pp=pp, train_iters=3, **schedule)
        run = launch.run(cfg, ranks=ranks, name=f"tp{tp}-pp{pp}", load=start, show=None)
        assert run.metrics.step.tolist() == [2, 3], "it goes on where the checkpoint ends"
        alone = alone or run
        assert runs.difference(run, alone) < 1e-5, run.name


def test_a_target_that_cannot_be_is_refused(bridge, runs_directory):
    """What is no name of a function stops at the door; a function that is not there is the ranks' error, by name."""
    with pytest.raises(ValueError, match="'course_lib.experiments.faults' names no function"):
        launch.prepare(small.config(), ranks=2, target="course_lib.experiments.faults")
    assert not runs_directory.exists()
    with pytest.raises(
        launch.RunFailed, match="target 'course_lib.experiments.faults:rank_mian' is no .module:function."
    ):
        launch.run(small.config(), ranks=2, show=None, target="course_lib.experiments.faults:rank_mian")


def test_a_configuration_file_is_enough(bridge, first_run, runs_directory):
    """config.yaml carries everything: launched again from the file, the run repeats itself."""
    again = launch.run(first_run.path / "config.yaml", ranks=8, name="again", show=None)
    assert runs.difference(again, first_run) == 0


@pytest.mark.parametrize("made", [small.config, families.hybrid])
def test_a_configuration_is_written_as_bridge_itself_writes_it(bridge, tmp_path, made):
    """Letter by letter: functions, data types, enumerations and layer specifications as well."""
    cfg = made()
    cfg.to_yaml(str(tmp_path / "theirs.yaml"))
    assert config_file._as_bridge_writes(cfg) == (tmp_path / "theirs.yaml").read_text()


def test_a_refusal_leaves_no_directory(bridge, runs_directory, tmp_path):
    """A directory without an outcome looks like a run that goes on, so nothing that was refused may leave one."""
    cfg = small.config()
    with pytest.raises(ValueError, match="show='none'"):
        launch.run(cfg, ranks=2, show="none")
    cfg.to_yaml(str(tmp_path / "config.yaml"))
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("train_iters:", "other_iters:"))
    with pytest.raises(launch.FieldError, match="cfg.train.train_iters is not set"):
        launch.prepare(tmp_path / "config.yaml", ranks=2)
    assert not runs_directory.exists() or not list(runs_directory.iterdir())


@pytest.mark.parametrize(("content", "words"), [(b"- 1\n", "no section"), (b"\xff\xfe", "not valid YAML")])
def test_a_file_of_another_kind_is_refused(bridge, tmp_path, content, words):
    """A list, a file that is no text, a directory: each is told as what it is."""
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(launch.ConfigError, match=words):
        launch.prepare(tmp_path / "config.yaml", ranks=2)
    with pytest.raises(launch.ConfigError, match="is a directory"):
        launch.prepare(tmp_path, ranks=2)


def test_runs_are_found_from_any_directory(monkeypatch, tmp_path):
    """Ranks start in another directory than the learner, so a relative COURSE_RUNS must not travel as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_RUNS", "mine")
    assert runs.directory() == tmp_path / "mine"
    monkeypatch.setenv("COURSE_RUNS", "~/mine")
    assert runs.directory().is_absolute() and "~" not in str(runs.directory())


def test_a_watch_that_fails_ends_the_run(bridge, runs_directory):
    """What stopped the launch is the run's outcome, and the ranks do not train on."""

    def watch(run: runs.Run) -> None:
        if run.stage() == "training":
            raise ZeroDivisionError("in the notebook")

    with pytest.raises(ZeroDivisionError):
        launch.run(small.config(train_iters=2000), ranks=2, name="watched", show=None, watch=watch)
    run = runs.Run(runs_directory / "watched")
    assert run.outcome.status == "failed" and "ZeroDivisionError: in the notebook" in run.outcome.cause
    assert not any(os.path.exists(f"/proc/{rank['pid']}") for rank in run.ranks().values())


@pytest.mark.parametrize(
    ("cores", "ranks", "running", "threads"),
    [(4, 1, 1, 4), (4, 1, 4, 4), (4, 1, 5, 1), (4, 2, 4, 2), (4, 2, 5, 1), (4, 8, 1, 1), (2, 1, 60, 1)],
)
def test_a_rank_takes_its_share_of_the_cores(monkeypatch, asked_anew, cores, ranks, running, threads):
    """All cores are shared among the ranks; where others keep them busy, a rank has one thread, and so has the next run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(launch, "_running", lambda: running)
    assert launch._threads(ranks) == threads
    for now in (1, 60):
        monkeypatch.setattr(launch, "_running", lambda now=now: now)
        assert launch._threads(ranks) == threads, "two runs of one notebook would differ in their last digits"


def test_every_launcher_gives_a_rank_the_same_threads(bridge, runs_directory, monkeypatch):
    """They stand in launch.json, so that a run has its digits whoever starts it."""
    monkeypatch.setenv("COURSE_THREADS", "3")
    prepared = launch.prepare(small.config(), ranks=2, name="threads")
    monkeypatch.delenv("COURSE_THREADS")
    assert prepared.launch["threads"] == 3 and launch.settings(prepared)["OMP_NUM_THREADS"] == "3"
    given = []
    monkeypatch.setattr(
        launch.forkserver, "lease", lambda imports: SimpleNamespace(launch=lambda *_, **how: given.append(how))
    )
    launch._start_warm(prepared, 2)
    assert given[0]["env"]["OMP_NUM_THREADS"] == "3"


@pytest.fixture
def asked_anew():
    """Whether the machine is busy is asked in this test, and again after it."""
    launch._has_room.cache_clear()
    yield
    launch._has_room.cache_clear()


def test_who_runs_is_counted():
    """Two busy threads are seen while they run."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.1)
        assert launch._running() >= 3
    finally:
        for process in busy:
            process.kill()
            process.wait()


def rank_waits(_: str) -> None:
    """What the OpenMP library of this process read when it was loaded."""
    assert b"\0OMP_WAIT_POLICY=passive\0" in Path("/proc/self/environ").read_bytes()


def test_waiting_threads_leave_their_core_to_others(in_ranks, tmp_path):
    """Threads that wait sleep: spinning ones took a step of 1.5 s to 166 s beside two busy processes."""
    in_ranks(rank_waits, tmp_path)


def rank_has_no_folder(_: str) -> None:
    assert os.environ["TORCHELASTIC_ERROR_FILE"] == ""


def test_a_launch_leaves_no_folder_in_the_temporary_directory(in_ranks, tmp_path):
    """torch's launcher makes one for each rank of each launch, and deletes none."""
    in_ranks(rank_has_no_folder, tmp_path)


def test_a_file_neither_saves_nor_resumes_unless_asked(bridge, runs_directory, tmp_path):
    """Bridge's default checkpoint directory, which every recipe shares, is not used; with `save` it is the run's own."""
    cfg = small.config(train_iters=1)
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "shared")
    cfg.to_yaml(str(tmp_path / "config.yaml"))
    first = launch.run(tmp_path / "config.yaml", ranks=2, name="file", show=None, save=True)
    again = launch.run(tmp_path / "config.yaml", ranks=2, name="file", show=None)
    assert not (tmp_path / "shared").exists() and (first.path / "checkpoints").is_dir()
    assert len(again.metrics) == 1 and not (again.path / "checkpoints").exists()


def test_the_distributed_optimizer_trains_like_the_plain_one(bridge, first_run, runs_directory):
    """Optimizer states in DP pieces, as NVIDIA's recipes have them, give the losses of whole ones."""
    cfg = config(ddp__use_distributed_optimizer=True, optimizer__use_distributed_optimizer=True)
    run = launch.run(cfg, ranks=8, name="distributed-optimizer", show=None)
    assert runs.difference(run, first_run) < 1e-5


def test_a_layout_that_cannot_be_is_refused_before_a_process_starts(bridge, runs_directory):
    """TP=3 does not divide 8 heads, and the message says what does."""
    with pytest.raises(layout.LayoutError, match="TP=3.*8") as caught:
        launch.run(small.config(tp=3), ranks=8, name="impossible", show=None)
    assert "query heads" in str(caught.value)
    assert not runs_directory.exists() or not list(runs_directory.iterdir()), "no run directory was made"


def test_a_field_in_the_wrong_section_is_refused(bridge, runs_directory):
    """A dataclass accepts any attribute; `cfg.train.save_interval` would be ignored silently."""
    cfg = small.config()
    cfg.train.save_interval = 500
    with pytest.raises(launch.FieldError, match=r"cfg\.checkpoint\.save_interval"):
        launch.run(cfg, ranks=8, show=None)
    cfg = small.config()
    cfg.train.train_iter = 7
    with pytest.raises(launch.FieldError, match=r"cfg\.train\.train_iters"):
        launch.run(cfg, ranks=8, show=None)


def test_the_command_can_be_typed_by_hand():
    """The command shows torchrun's module, the number of ranks, and the file."""
    from pathlib import Path

    words = launch.command(Path("runs/smoke"), ranks=8)
    assert words[1:] == ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
                         "--nproc-per-node", "8", "-m", "course_lib.ranks.train", "runs/smoke/config.yaml"]  # fmt: skip


def test_all_clients_of_a_session_share_one_server(warm_engine):
    """Another process gets the same socket, and its launches are forks of the same fork server."""
    import subprocess
    import sys

    script = (
        "from course_lib.experiments import hello; from course_lib.launch import forkserver\n"
        "forkserver.lease(); print(forkserver.address()); print(hello.ranks(1).pid[0] > 0)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True).stdout
    assert out.split() == [str(warm_engine.path), "True"]
    assert forkserver.lease() is forkserver.lease()


def test_gpus_would_be_used(monkeypatch, bridge, runs_directory):
    """With eight GPUs the launcher is torchrun, the device is cuda, and the configuration stays NVIDIA's."""
    seen = {}

    class Finished:
        def wait(self, seconds):
            return {"dead": {}}

        def close(self):
            return None

    def start(run, ranks):
        seen.update(run=run, ranks=ranks)
        for rank in range(ranks):
            runs.write_json(run.path / "ranks" / f"{rank}.json", {"rank": rank, "pid": 1, "stage": "done", "time": 0.0})
        return Finished()

    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    monkeypatch.setattr(torchrun, "start", start)
    monkeypatch.setattr(stack, "missing_modules", lambda: [])
    run = launch.run(small.config(), ranks=8, name="gpu", show=None)
    about = json.loads((run.path / "launch.json").read_text())
    assert (about["device"], about["launcher"], seen["ranks"]) == ("cuda", "torchrun", 8)
    assert run.config["mixed_precision"] == "bf16_mixed" and run.config["dist"]["distributed_backend"] == "nccl"


def alive(pid: int) -> bool:
    """True if a process of that pid exists and is not a zombie."""
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_second_interrupt_leaves_an_outcome(bridge, runs_directory):
    """Whoever presses stop twice gets a run that says so, and its launch is closed."""
    closed = []

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    fake = SimpleNamespace(wait=interrupted, stop=lambda: None, close=lambda: closed.append(True))
    run = launch.prepare(small.config(), ranks=2, name="twice")
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    runs.write_json(
        run.path / "ranks" / "0.json", {"rank": 0, "pid": rank.pid, "stage": "training", "time": time.time()}
    )
    with pytest.raises(KeyboardInterrupt):
        supervise.watch(run, ranks=2, start=lambda *_: fake, view=lambda: None, watch=None)
    assert run.reload().outcome.status == "interrupted" and closed
    assert rank.wait(10) == -signal.SIGKILL, "the rank is gone as well"


def test_a_launcher_that_dies_leaves_no_rank(bridge, runs_directory):
    """Whoever kills torchrun itself, as a full memory does, gets a run that says so and no rank that trains on."""
    run = launch.prepare(small.config(), ranks=2, name="orphan")
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    rank = subprocess.Popen(sleeper, start_new_session=True)
    runs.write_json(
        run.path / "ranks" / "0.json", {"rank": 0, "pid": rank.pid, "stage": "training", "time": time.time()}
    )
    launcher = subprocess.Popen(sleeper)
    launcher.kill()
    with pytest.raises(launch.RunFailed, match="the launcher was killed: torchrun ended by SIGKILL"):
        supervise.watch(run, ranks=2, start=lambda *_: torchrun.Started(launcher), view=lambda: None, watch=None)
    assert rank.wait(10) == -signal.SIGKILL


def test_a_view_that_fails_leaves_an_outcome(bridge, runs_directory):
    """What happens between the run's directory and its ranks is told in the directory, too."""

    def no_view() -> None:
        raise RuntimeError("no widgets")

    run = launch.prepare(small.config(), ranks=2, name="blind")
    with pytest.raises(RuntimeError, match="no widgets"):
        supervise.watch(run, ranks=2, start=lambda *_: None, view=no_view, watch=None)
    assert run.reload().outcome.status == "failed" and "no widgets" in run.reload().outcome.cause


def test_an_interrupt_at_the_very_end_keeps_the_success(bridge, runs_directory):
    """All ranks were done: pressing stop while the launch is put away does not undo that."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    run = launch.prepare(small.config(), ranks=2, name="late")
    for rank in range(2):
        runs.write_json(run.path / "ranks" / f"{rank}.json", {"rank": rank, "pid": 1, "stage": "done", "time": 0.0})
    fake = SimpleNamespace(wait=lambda _: {"dead": {}}, stop=lambda: None, close=interrupted)
    with pytest.raises(KeyboardInterrupt):
        supervise.watch(run, ranks=2, start=lambda *_: fake, view=lambda: None, watch=None)
    assert run.reload().outcome.status == "succeeded"


def test_a_run_that_ended_is_not_started_again(bridge, runs_directory, monkeypatch):
    """A second start in the same directory would mix two runs, and keep the first one's verdict."""
    run = launch.prepare(small.config(), ranks=2, name="ended")
    runs.write_outcome(run.path, runs.Outcome("succeeded"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="ended already .succeeded.*copy its config.yaml"):
        train.main([str(run.path / "config.yaml")])


def test_a_laptops_run_does_not_train_on_a_nodes_processors(bridge, runs_directory, monkeypatch):
    """A run that was prepared without GPUs and copied to a node is refused, unless somebody asks for the CPU there."""
    run = launch.prepare(small.config(), ranks=2, name="copied")
    assert run.launch["device"] == "cpu"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.stack, "gpu_count", lambda: 8)
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    monkeypatch.setattr(train, "start", lambda path: pytest.fail("it started"))
    with pytest.raises(SystemExit, match="had no GPUs.*launch.prepare on this node"):
        train.main([str(run.path / "config.yaml")])
    started = []
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setattr(train, "start", started.append)
    monkeypatch.setattr(train, "_wait_until_done", lambda *_: None)
    train.main([str(run.path / "config.yaml")])
    assert started == [str(run.path)]


def test_a_changed_rank_means_a_new_server():
    """Every file of the course that a warm rank has loaded is one whose change starts a new server."""
    (modules,) = launch.call("support.loaded:modules", ranks=1)
    files = (file for name, file in modules.items() if name.startswith("course_lib."))
    loaded = {Path(file) for file in files} - {PROJECT / "course_lib/__init__.py"}
    named = {path for path in loaded if path.read_text().count("\n") > 1}  # the faces of rooms are one line of text
    assert len(named) > 10 and named <= set(forkserver.rank_code())


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = "import time; print('here', flush=True); time.sleep(600)"
with subprocess.Popen([sys.executable, "-c", rank], start_new_session=True) as child:
    print(child.pid, flush=True)
"""


def test_a_closed_torchrun_leaves_no_rank():
    """Torchrun gives every rank a session of its own; closing a launch that will not stop ends these as well."""
    launcher = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    said = {launcher.stdout.readline().strip() for _ in range(2)}
    rank = int(max(said - {"here"}))
    started = torchrun.Started(launcher)
    assert started.wait(0.1) is None and alive(rank)
    started.close()
    assert launcher.returncode == -signal.SIGKILL
    for _ in range(50):
        if not alive(rank):
            break
        time.sleep(0.1)
    assert not alive(rank)

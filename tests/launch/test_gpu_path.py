"""Where the ranks have GPUs: every entry of the lessons takes that path, and nothing of `course_lib.ranks.cpu` is in sight."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from course_lib import launch, runs, stack
from course_lib.common.project import LIBRARY, PROJECT
from course_lib.experiments import generate
from course_lib.launch import forkserver, torchrun
from course_lib.ranks import recording, train
from course_lib.runs import writer
from course_lib.stack import devices
from support import small

TESTS, PACKAGE = PROJECT / "tests", LIBRARY


def python(code: list[str], **environment: str) -> str:
    """The last line that a fresh process printed."""
    places = os.pathsep.join(map(str, (TESTS, PACKAGE.parent)))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", *code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> dict:
    """What the entries met on a GPU node that is played in one process; see `gpu_node`."""
    return json.loads(python([str(TESTS / "support/gpu_node.py"), str(tmp_path_factory.mktemp("node"))]))


def test_no_entry_fakes_cuda_on_a_gpu_node(node):
    """Thirteen launches by torchrun, 39 ranks: none of them, nor the kernel, has imported course_lib.ranks.cpu."""
    assert node["directories"] == [13, 39]
    assert node["faked"] == {} and node["faked in the kernel"] == []


def test_calls_work_on_a_gpu_node(node):
    """hello, the layers by hand and the optimizers' bytes meet over NCCL and answer as on the CPU; generate, too."""
    assert node["hello"] == [[28] * 8, True]
    assert 0 < node["tensor parallel"] < 1e-5 and node["data parallel"] < 1e-6
    assert node["optimizer"] == [12.0, 6.0]
    assert node["generate"] == ["onefgh"]


def test_runs_work_on_a_gpu_node(node):
    """Plain, with a target, recorded, leaking, and in a sweep: each trains its steps with the recipe's own fields."""
    assert (node["run"], node["leak"], node["record"], node["sweep"]) == (3, 3, True, [3, 3])
    assert node["tensors"] == [4 * (8 * 8 + 8)] * 2, "weights and biases, fp32"


def test_a_gpu_node_changes_what_it_lacks_and_says_so(node):
    """Without Apex the fused accumulation of gradients is off in every rank, and a row of the table gives the reason."""
    assert node["differences"] == ["model.gradient_accumulation_fusion"]


def test_random_states_do_not_cross_devices(node):
    """A checkpoint of CPU ranks goes on on GPUs without its random states, and the learner is told."""
    (told,), load_rng = node["resumed"]
    assert load_rng is False and "saved by cpu ranks and goes on in cuda ranks" in told and "load_rng" in told


def test_only_the_launcher_asks_for_the_fork_server():
    """Its forks are CPU ranks, so whoever takes a lease decides a device: one place may."""
    users = set()
    for path in PACKAGE.rglob("*.py"):
        for node_ in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node_, ast.Attribute)
                and node_.attr == "lease"
                and getattr(node_.value, "id", "") == "forkserver"
            ):
                users.add(path.relative_to(PACKAGE).as_posix())
    assert users == {"launch/__init__.py"}


# ------------------------------------------------------------------------------------------------ a machine with one GPU


@pytest.fixture
def one_gpu(tmp_path, monkeypatch):
    """A machine on which nvidia-smi lists one GPU."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU-a, H100, 81559 MiB'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    for name in ("COURSE_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("bridge", "one_gpu", "runs_directory")
def test_one_gpu_is_for_one_rank(monkeypatch):
    """Eight ranks run on the CPU there, so the stack is imported ahead for them; one rank has the GPU."""
    monkeypatch.setattr(forkserver, "lease", lambda imports: "a lease")
    assert (stack.device(1), stack.device(8)) == ("cuda", "cpu")
    assert launch.warm_up() == "a lease" and launch.warm_up(ranks=1) is None
    prepared = {ranks: launch.prepare(small.config(tp=1), ranks=ranks).launch for ranks in (1, 8)}
    assert [(about["device"], about["launcher"]) for about in prepared.values()] == [
        ("cuda", "torchrun"),
        ("cpu", "warm"),
    ]


def test_cpu_ranks_see_no_gpu_and_no_kernels_for_one(tmp_path):
    """Where Transformer Engine is installed and a GPU is there, a CPU rank takes torch's optimizer and cannot see the GPU."""
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "flash_attn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a package of CUDA kernels was imported')\n")
    code = """
import os, sys
from course_lib.ranks import cpu
cpu.activate()
from megatron.core import optimizer
import transformer_engine
own = optimizer.USING_PYTORCH_OPTIMIZER, transformer_engine.__stand_in__
print(*own, repr(os.environ["CUDA_VISIBLE_DEVICES"]))
"""
    places = os.pathsep.join(map(str, (tmp_path, PACKAGE.parent)))
    assert python(["-c", code], PYTHONPATH=places, CUDA_VISIBLE_DEVICES="0") == "True True ''"


@pytest.mark.usefixtures("bridge", "runs_directory")
def test_a_run_is_prepared_for_a_node_and_carried_there(tmp_path):
    """On a machine without GPUs the node's ranks are written down; what lay below its project lies below that of the node."""
    cfg = small.config(tp=1)
    prepared = launch.prepare(cfg, ranks=8, save=True, device="cuda")
    assert (prepared.launch["device"], prepared.launch["launcher"]) == ("cuda", "torchrun")
    assert prepared.launch["project"] == str(PROJECT)
    with pytest.raises(ValueError, match="device='tpu': use 'cpu' or 'cuda'"):
        launch.prepare(cfg, device="tpu")
    record = prepared.launch | {"project": "/laptop/course"}
    (prepared.path / "launch.json").write_text(json.dumps(record))
    content = prepared.config
    content["checkpoint"]["save"] = "/laptop/course/runs/a/checkpoints"
    content["dataset"]["path_to_cache"] = "/laptop/course-2/cache"
    content["tokenizer"]["tokenizer_model"] = "/laptop/course/runs/tokenizer"
    (prepared.path / "config.yaml").write_text(yaml.safe_dump(content))
    there = train.read_config(prepared.path / "config.yaml")
    assert there.checkpoint.save == str(PROJECT / "runs/a/checkpoints")
    assert there.tokenizer.tokenizer_model == str(PROJECT / "runs/tokenizer")
    assert there.dataset.path_to_cache == "/laptop/course-2/cache", "beside the project, not in it"


# --------------------------------------------------------------------------------------------------- refused at the door


@pytest.mark.usefixtures("bridge", "runs_directory")
def test_gpu_ranks_are_not_forked(monkeypatch):
    """The fork server's ranks are CPU ranks, so a run for GPUs cannot ask for it."""
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    with pytest.raises(ValueError, match="launcher='warm' forks ranks that work on the CPU"):
        launch.prepare(small.config(), ranks=8, launcher="warm")


@pytest.mark.usefixtures("bridge", "runs_directory")
def test_a_gpu_run_without_transformer_engine_is_refused(monkeypatch, tmp_path):
    """The recipe's layers are not installed: said before a rank starts, with what to install, from a file as well."""
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    small.config().to_yaml(str(tmp_path / "config.yaml"))
    for cfg in (small.config(), tmp_path / "config.yaml"):
        with pytest.raises(
            launch.ConfigError, match="Transformer Engine is not installed here.*does not resume.*--extra gpu"
        ):
            launch.run(cfg, ranks=8, show=None)
    assert not runs.directory().exists()


# ------------------------------------------------------------------------------------------------------- what ranks get


def _environment_of(device: str, path: Path) -> dict[str, str]:
    """The environment that torchrun would start with."""
    (path / "logs").mkdir(parents=True)
    runs.write_json(path / "launch.json", {"device": device})
    words = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    assert torchrun.start_process(runs.Run(path), words).wait(60) == 0
    return json.loads((path / "logs" / "launcher.log").read_text())


def test_the_kernels_settings_do_not_reach_gpu_ranks(tmp_path, monkeypatch):
    """prepare_imports() switches the compiler off in a kernel; GPU ranks train with it."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE" not in _environment_of("cuda", tmp_path / "gpu")
    assert _environment_of("cpu", tmp_path / "cpu")["TORCHDYNAMO_DISABLE"] == "1"


def test_a_host_without_an_address_takes_the_loopback(tmp_path, monkeypatch):
    """gloo beside NCCL would look the host's name up and hang; what the learner set stays."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert "GLOO_SOCKET_IFNAME" not in _environment_of("cuda", tmp_path / "named")
    monkeypatch.setattr(torchrun.socket, "gethostname", lambda: "no-such-host.invalid")
    assert _environment_of("cuda", tmp_path / "nameless")["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert _environment_of("cuda", tmp_path / "set")["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_step_ends_when_the_gpu_is_done(bridge, tmp_path, monkeypatch):
    """Kernels run on after Python has launched them: the recorder waits for them before it looks at the clock."""
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.05))
    meter = SimpleNamespace(begin_step=lambda: None, read=lambda: (0, 0))
    train_state = SimpleNamespace(step=0)
    cfg = SimpleNamespace(train=SimpleNamespace(global_batch_size=1), model=SimpleNamespace(seq_length=1))
    context = SimpleNamespace(state=SimpleNamespace(train_state=train_state, cfg=cfg), grad_norm=1.0, skipped_iter=0)
    context.loss_dict, context.optimizer = {"lm loss": 1.0}, SimpleNamespace(param_groups=[])
    monkeypatch.setattr(writer, "meter", lambda device: meter)
    mine = writer.Writer(tmp_path, device="cuda")
    clock, numbers = recording.Clock(mine), recording.Metrics(mine, recording.Tokens())
    clock.on_train_step_start(context)
    clock.on_train_step_end(context)
    numbers.on_train_step_end(context)
    assert runs.Run(tmp_path).metrics.elapsed_ms.item() >= 50


def test_older_names_of_torch_are_known(monkeypatch):
    """Torch 2.11, which NVIDIA's containers carry, has the old names only; a later one may have the new names only."""
    import torch

    from course_lib.ranks.cpu import mailbox

    gathers = ("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
    for older in ((), gathers[:1], gathers[1:], gathers):
        group = type("ProcessGroup", (), dict.fromkeys(older))
        monkeypatch.setattr(torch.distributed, "ProcessGroup", group)
        expected = (older or gathers)[0]
        assert mailbox.method_of_group(*gathers) == f"torch.distributed.ProcessGroup.{expected}"


# ------------------------------------------------------------------------------------- a GPU's checkpoint on CPU ranks


def test_a_checkpoint_of_gpu_ranks_writes_on_the_cpu(bridge, runs_directory, tmp_path):
    """Its run_config.yaml names Transformer Engine, bf16 and fused kernels: read on a CPU rank they become the CPU's."""
    from course_lib.text import tokenizers

    tokenizers.train_bpe(["one two three"] * 9, tmp_path / "tokenizer", vocab_size=260)
    cfg = small.config(tp=2, train_iters=1, checkpoint__save_interval=1)
    run = launch.run(cfg, ranks=2, name="saved", save=True, show=None)
    (run.path / "config.yaml").write_text(
        (run.path / "config.yaml")
        .read_text()
        .replace("tokenizer_model: null", f"tokenizer_model: {tmp_path / 'tokenizer'}")
    )
    texts = [generate.texts(run.reload(), ["one"], max_new_tokens=4, temperature=0)]
    saved = run.path / "checkpoints" / "iter_0000001" / "run_config.yaml"
    content = yaml.safe_load(saved.read_text())
    changed = [field.path.removeprefix("model.") for field in devices.FIELDS if field.path.startswith("model.")]
    content["model"] |= {field: run.config["model"][field] for field in changed if field in run.config["model"]}
    saved.write_text(yaml.safe_dump(content))
    runs.write_json(run.path / "launch.json", run.launch | {"device": "cuda"})
    assert content["model"]["transformer_impl"] == "transformer_engine" and content["model"]["masked_softmax_fusion"]
    texts.append(generate.texts(run.reload(), ["one"], max_new_tokens=4, temperature=0))
    assert texts[0] == texts[1] and len(texts[0][0]) > len("one")

"""Other launchers: failures that a launcher hides, Slurm scripts, and no secret on disk.

That two torchrun agents and NeMo Run train in every digit what a warm launch trains is claimed, and run, by lesson 07.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from course_lib import launch, runs, stack
from course_lib.common.project import PROJECT
from course_lib.launch import cluster
from support import small

ADDRESS = {"account": "me", "partition": "batch", "image": "nemo:26.06"}


def test_a_run_that_never_ran_did_not_succeed(bridge, runs_directory):
    """Whatever a launcher says, a run directory without the ranks' word is a failure."""
    prepared = launch.prepare(small.config(), ranks=8, name="silent")
    with pytest.raises(launch.RunFailed, match="without a word"):
        cluster.settled(prepared)


def test_a_rank_that_is_missing_at_the_end_is_no_success(bridge, runs_directory):
    """Seven of eight ranks that are done are not enough."""
    prepared = launch.prepare(small.config(), ranks=8, name="seven")
    for rank in range(7):
        entry = {"rank": rank, "pid": 1, "stage": "done", "time": 0.0}
        runs.write_json(prepared.path / "ranks" / f"{rank}.json", entry)
    assert (cluster.rank_errors(prepared).stage == "done").sum() == 7
    with pytest.raises(launch.RunFailed):
        cluster.settled(prepared)


def test_the_limit_ends_agents_that_hang(bridge, runs_directory, monkeypatch):
    """Agents that do not end are stopped, and the run is a failure."""
    prepared = launch.prepare(small.config(), ranks=2, name="hangs")
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(cluster, "agents", lambda *_, **__: [sleeper, sleeper])
    started, start = [], launch.start_process
    monkeypatch.setattr(launch, "start_process", lambda *given: started.append(start(*given)) or started[-1])
    with pytest.raises(launch.RunFailed):
        cluster.run_agents(prepared, limit_seconds=0.2)
    assert [agent.poll() for agent in started] == [-signal.SIGTERM] * 2


def test_an_agent_that_will_not_stop_is_killed_with_its_ranks(monkeypatch):
    """Torchrun gives its ranks sessions of their own, so killing the agent's own group would leave them."""
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 0.2)
    rank = "import time; print('up', flush=True); time.sleep(600)"
    words = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run([sys.executable, "-c", {rank!r}], start_new_session=True)
"""
    agent = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True)
    assert agent.stdout.readline() == "up\n"
    (child,) = psutil.Process(agent.pid).children()
    cluster._end(agent)
    assert agent.returncode == -signal.SIGKILL
    assert not psutil.wait_procs([child], timeout=10)[1]


def test_an_unknown_launcher_is_refused(bridge, runs_directory):
    """run() knows two launchers; for others a run is prepared."""
    with pytest.raises(ValueError, match="prepare"):
        launch.run(small.config(), ranks=2, launcher="slurm", show=None)
    assert not runs_directory.exists()


def executor(nodes, home):
    """NeMo Run's Slurm executor for so many nodes."""
    import nemo_run

    cluster.prepare_nemo_run(home)
    return nemo_run.SlurmExecutor(
        account="me", partition="batch", nodes=nodes, ntasks_per_node=8, gpus_per_node=8, time="01:00:00",
        container_image="nemo:26.06", launcher="torchrun", packager=nemo_run.Packager(),
        tunnel=nemo_run.LocalTunnel(job_dir=str(home / "jobs")), env_vars={"NCCL_DEBUG": "WARN"},
    )  # fmt: skip


def test_nemo_runs_slurm_script_says_what_the_executor_says(tmp_path):
    """Nodes, GPUs, container, environment and run file stand in the script, and nothing is left on disk."""
    import nemo_run

    task = nemo_run.Script(path="course_lib.ranks.train", m=True, entrypoint="python", args=["runs/a/config.yaml"])
    scripts = {nodes: cluster.slurm_script(task, executor(nodes, tmp_path)) for nodes in (1, 2)}
    for nodes, script in scripts.items():
        asked = cluster.directives(script)
        assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == (str(nodes), "8", "1")
        assert "--container-image nemo:26.06" in script and "export NCCL_DEBUG=WARN" in script
        assert (
            f"--nnodes {nodes} --nproc-per-node 8" in script
            and "-m course_lib.ranks.train runs/a/config.yaml" in script
        )
    assert not list(tmp_path.rglob("*_sbatch.sh"))


def test_the_plain_script_is_checked(tmp_path):
    """shellcheck finds nothing in the plain script, and finds an unquoted variable in a bad one."""
    for nodes in (1, 2):
        assert cluster.shellcheck(cluster.sbatch("runs/a/config.yaml", nodes=nodes, **ADDRESS)) == []
    assert any("SC2068" in line for line in cluster.shellcheck("#!/bin/bash\necho $@\n"))
    line = cluster.docker_run("runs/a b/config.yaml", image="nemo:26.06")
    assert cluster.shellcheck("#!/bin/bash\n" + line) == []
    script = cluster.sbatch("runs/a b/config.yaml", **ADDRESS)
    for text in (script, line):  # the doctor's own command, before anything of Megatron is imported
        assert text.index(stack.over_container()) < text.index("exec torchrun")
    from_nvidia = cluster.sbatch("runs/a/config.yaml", **ADDRESS | {"image": "nvcr.io/nvidia/nemo:26.06"})
    assert "--container-image='nvcr.io#nvidia/nemo:26.06' " in from_nvidia, "with a slash Pyxis asks Docker Hub"
    assert "'runs/a b/config.yaml'" in script and cluster.directives(script)["nodes"] == "1"


def test_secrets_are_found_and_not_shown(tmp_path, monkeypatch):
    """A token by its look, or by the variable that holds it, is found in a text or a file; its value is not printed."""
    token = "hf_" + "q" * 30
    (tmp_path / "run.log").write_text(f"first\nlogin with {token}\n")
    assert cluster.secrets(tmp_path) == ["run.log, line 2: hf_..."]
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    found = cluster.secrets("password: correct-horse-battery")
    assert len(found) == 1 and "horse" not in found[0]
    assert cluster.secrets("seed: 1234") == []


def test_a_run_writes_no_secret(bridge, runs_directory, monkeypatch):
    """Neither the configuration nor launch.json takes a token over from the environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 30)
    prepared = launch.prepare(small.config(), ranks=8, name="clean")
    assert cluster.secrets(prepared.path) == []
    assert not any("hf_" in value for value in launch.settings(prepared).values())


@pytest.mark.parametrize("secret", ["hf_" + "z" * 30, "correct-horse-battery"])
def test_a_token_in_a_configuration_is_refused(bridge, runs_directory, monkeypatch, secret):
    """By its look or by the environment: config.yaml is not written, no directory is left, the value is not shown."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("TOKENIZER_DIRECTORY", "somewhere-in-the-model")
    cfg = small.config()
    cfg.logger.wandb_exp_name = "somewhere-in-the-model"
    kept = launch.prepare(cfg, ranks=8, name="kept")
    cfg.logger.wandb_exp_name = secret
    path = kept.path / "config.yaml"
    path.write_text(path.read_text().replace("somewhere-in-the-model", secret))
    for source in (cfg, path):
        with pytest.raises(launch.ConfigError, match="would hold an access token") as caught:
            launch.prepare(source, ranks=8, name="leaky")
        assert secret not in str(caught.value)
    assert [place.name for place in runs_directory.iterdir()] == ["kept"]


def test_ports_are_free_when_asked_for():
    """A port that was given out can be bound."""
    import socket

    with socket.socket() as mine:
        mine.bind(("localhost", cluster.free_port()))


def test_a_command_of_a_node_names_the_meeting_point():
    """Agents differ in their node rank and agree on address, port and file."""
    commands = cluster.agents(Path("runs/a"), nodes=3, ranks_per_node=2, address="node-0", port=4242)
    assert [words[words.index("--node-rank") + 1] for words in commands] == ["0", "1", "2"]
    assert all("node-0" in words and "4242" in words and words[-1] == "runs/a/config.yaml" for words in commands)


def test_a_container_has_the_project_under_another_name():
    """What lies below the project is named from there; what lies elsewhere is not mounted, and keeps its name."""
    assert cluster.inside(PROJECT / "runs/a/config.yaml") == "runs/a/config.yaml"
    assert cluster.inside(Path("/data/text")) == "/data/text"

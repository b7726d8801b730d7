"""Start one run file by other launchers: torchrun on several nodes, NeMo Run, Slurm; and judge what they leave.

A launcher's word is not the outcome.  NeMo Run returns `None` after a failed task and writes a file `SUCCESS` all the
same; what counts is what the ranks wrote into the run directory.

Source: nemo-run `run/experiment.py`, `core/execution/slurm.py` @ 0.11.1; torch `distributed/run.py` @ 2.13.0.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib import launch, stack
from course_lib.common.project import PROJECT
from course_lib.launch import torchrun
from course_lib.runs import Run, failures
from course_lib.runs.credentials import secrets
from course_lib.stack.patches import Patches, applied

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "agents",
    "directives",
    "docker_run",
    "free_port",
    "inside",
    "prepare_nemo_run",
    "pyxis",
    "quiet",
    "rank_errors",
    "run_agents",
    "sbatch",
    "secrets",
    "settled",
    "shellcheck",
    "slurm_script",
]

PATIENCE_SECONDS = 30.0
"""How long an agent that was asked to stop may take to end its ranks."""


def settled(run: Run) -> Run:
    """The run, judged by what its ranks left behind and not by what a launcher returned.

    Raises:
        RunFailed: If not every rank said that it is done; names the first failing one.
    """
    outcome = failures.settle(run.path)
    if outcome.status != "succeeded":
        raise launch.RunFailed(run.reload(), outcome)
    return run.reload()


def rank_errors(run: Run) -> pd.DataFrame:
    """What every rank said at its end: `rank, stage, exception, lost a peer, message`."""
    import pandas as pd

    rows = [
        (rank, r["stage"], r.get("exception", ""), r.get("lost_a_peer", False), r.get("message", "")[:60])
        for rank, r in sorted(run.ranks().items())
    ]
    return pd.DataFrame(rows, columns=["rank", "stage", "exception", "lost a peer", "message"]).set_index("rank")


# ------------------------------------------------------------------------------------------------------ several nodes


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def agents(
    run: Run | Path, *, nodes: int = 2, ranks_per_node: int = 4, address: str = "localhost", port: int = 29500
) -> list[list[str]]:
    """The torchrun commands of several nodes, one each; they differ in `--node-rank` only.

    Args:
        address: Where node 0 can be reached.
        port: A free port there, the same for all.

    Example:
        >>> one, two = agents(Path("runs/smoke"), nodes=2, ranks_per_node=4)
        >>> [(a, b) for a, b in zip(one, two) if a != b]
        [('0', '1')]
    """
    there = ["--master-addr", address, "--master-port", str(port)]
    meetings = [["--nnodes", str(nodes), "--node-rank", str(node), *there] for node in range(nodes)]
    return [torchrun.command(run, ranks=ranks_per_node, meet=meet) for meet in meetings]


def run_agents(run: Run, *, nodes: int = 2, ranks_per_node: int = 4, limit_seconds: float = 600.0) -> Run:
    """Play several nodes on this machine: one torchrun agent for each, and wait for their end.

    Raises:
        RunFailed: If a rank failed, or the agents did not end within the limit.
    """
    commands = agents(run, nodes=nodes, ranks_per_node=ranks_per_node, port=free_port())
    end = time.monotonic() + limit_seconds
    with contextlib.ExitStack() as agents_end:
        started = []
        for words in commands:
            started.append(launch.start_process(run, words))
            agents_end.callback(_end, started[-1])
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
    return settled(run)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """Let an agent end its ranks, and kill it with them if it does not."""
    try:
        if agent.poll() is None:
            agent.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(PATIENCE_SECONDS)
    finally:
        torchrun.kill(agent)


# ------------------------------------------------------------------------------------------------- NeMo Run and Slurm


def prepare_nemo_run(home: Path) -> None:
    """Let NeMo Run keep its files under `home` instead of the home directory, and find this environment's torchrun.

    Raises:
        ModuleNotFoundError: If NeMo Run is not installed.
    """
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(home))
    mine = str(Path(sys.executable).parent)
    if mine not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = mine + os.pathsep + os.environ["PATH"]


class Words:
    """What NeMo Run wrote: `text`, complete when the block has ended."""

    text = ""


@contextlib.contextmanager
def quiet() -> Iterator[Words]:
    """Keep what NeMo Run writes to the screen, which is coloured, and long, and knows this machine's paths."""
    import io

    words, written, mine = Words(), io.StringIO(), Patches()
    mine.sets(False, "nemo_run.core.frontend.console.api.CONSOLE.is_jupyter", why="there rich would display, not print")
    mine.sets(io.StringIO(), "sys.stdin", why="the tunnel reads standard input, which a test or a kernel may forbid")
    try:
        with applied(mine), contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            yield words
    finally:
        words.text = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())


def slurm_script(script: object, executor: object, *, name: str = "pretrain") -> str:
    """The sbatch script that NeMo Run would submit; nothing is submitted, and no cluster is asked.

    Args:
        script: A `nemo_run.Script`.
        executor: A `nemo_run.SlurmExecutor` whose tunnel is a `LocalTunnel`.
    """
    import shutil

    import nemo_run
    from nemo_run.config import get_nemorun_home

    with quiet(), nemo_run.Experiment(name) as experiment:
        experiment.add(script, executor=executor, name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
    written = max(Path(get_nemorun_home()).glob(f"experiments/{name}/*/*_sbatch.sh"), key=lambda p: p.stat().st_mtime)
    text = written.read_text()
    shutil.rmtree(written.parent)
    return text


def inside(path: Path) -> str:
    """A path as the containers of `sbatch` and `docker_run` have it: below the project that they mount, or unchanged."""
    return os.fspath(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def pyxis(image: str) -> str:
    """An image's name as Slurm's container plugin reads it: with `/` after the registry it would ask Docker Hub.

    Example:
        >>> pyxis("nvcr.io/nvidia/nemo:26.06"), pyxis("ubuntu:24.04"), pyxis("./nemo.sqsh")
        ('nvcr.io#nvidia/nemo:26.06', 'ubuntu:24.04', './nemo.sqsh')

    Source: NVIDIA/enroot src/docker.sh @ 067079e.
    """
    registry, _, rest = image.partition("/")
    return f"{registry}#{rest}" if rest and "." in registry.strip(".") else image


def sbatch(
    config: str, *, nodes: int = 1, gpus_per_node: int = 8, account: str, partition: str, image: str, minutes: int = 60
) -> str:
    """A plain sbatch script: one torchrun agent a node, in a container that gets the tested versions; planned, not run.

    The folder has the same path inside: `config.yaml` names data and checkpoints by whole paths, and a checkpoint that is
    saved elsewhere goes with the container.

    Args:
        config: Path of `config.yaml` below the current folder.
        minutes: Time limit.

    Example:
        >>> text = sbatch("runs/a/config.yaml", nodes=2, account="me", partition="batch", image="nemo:26.06")
        >>> directives(text)["nodes"], directives(text)["ntasks-per-node"]
        ('2', '1')
    """
    return f"""#!/bin/bash
#SBATCH --account={account}
#SBATCH --partition={partition}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --exclusive
#SBATCH --time={minutes}
#SBATCH --output=slurm-%j.out
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs on one node must not meet

# on each node: the tested versions over the container's, then one agent
srun --container-image={shlex.quote(pyxis(image))} --container-mounts="$PWD:$PWD" --container-workdir="$PWD" bash -c "
  {stack.over_container()} &&
  exec torchrun --nnodes={nodes} --nproc-per-node={gpus_per_node} \\
    --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$head_node:$port \\
    -m course_lib.ranks.train {shlex.quote(config)}"
"""


def docker_run(config: str, *, gpus: int = 8, image: str) -> str:
    """The command for one rented node that has Docker and no Slurm: the same container, the same run; planned, not run.

    As in `sbatch`, the folder has the same path inside.

    Args:
        config: Path of `config.yaml` below the current folder.

    Example:
        >>> print(docker_run("runs/a/config.yaml", image="nemo:26.06").splitlines()[0])
        docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \\
    """
    meet = " ".join(torchrun.ONE_NODE)
    return f"""docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \\
  -v "$PWD:$PWD" -w "$PWD" {shlex.quote(image)} bash -c "
  {stack.over_container()} &&
  python -m course_lib doctor --quick &&
  exec torchrun {meet} --nproc-per-node {gpus} \\
    -m course_lib.ranks.train {shlex.quote(config)}"
"""


def directives(script: str) -> dict[str, str]:
    """The `#SBATCH` lines of a script as a dictionary; a flag without a value has an empty one.

    Example:
        >>> directives("#SBATCH --nodes=2\\n#SBATCH --exclusive\\n")
        {'nodes': '2', 'exclusive': ''}
    """
    return {name: value or "" for name, value in re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE)}


def shellcheck(script: str) -> list[str]:
    """What shellcheck warns of in a script, one finding a line; empty if it has nothing to say.

    Raises:
        FileNotFoundError: If shellcheck is not installed.
    """
    tool = Path(sys.executable).parent / "shellcheck"
    words = [str(tool) if tool.exists() else "shellcheck", "--format=gcc", "--severity=warning", "-"]
    return subprocess.run(words, input=script, capture_output=True, text=True, check=False).stdout.splitlines()

"""`make lab`: JupyterLab opens on lesson 00, and holds the warm engine's lease for exactly as long as it lives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from course_lib.common.project import PROJECT
from course_lib.launch import forkserver
from course_lib.machine import desk

LESSON = "notebooks/00_check_your_setup.ipynb"


def test_the_workspace_opens_the_lesson_with_its_contents_and_is_written_once(tmp_path: Path) -> None:
    """The table of contents stands beside the notebook; what a learner arranged later is never overwritten."""
    written = desk.prepare_workspace(tmp_path, LESSON)
    layout = json.loads(written.read_text())["data"]["layout-restorer:data"]
    assert "toc" in layout["left"]["current"] and layout["main"]["current"] == f"notebook:{LESSON}"
    written.write_text("mine")
    assert desk.prepare_workspace(tmp_path, LESSON) is None and written.read_text() == "mine"


def test_jupyterlab_finds_the_courses_settings() -> None:
    """The folder that the command names holds them; JupyterLab says nothing of one that is not there, and asks for news."""
    option = next(word for word in desk.command(LESSON) if "app_settings_dir" in word)
    settings = json.loads((Path(option.partition("=")[2]) / "overrides.json").read_text())
    assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"


@pytest.mark.parametrize("variable", ["JUPYTER_DATA_DIR", "JUPYTER_PATH"])
def test_the_courses_kernel_wins_over_one_of_the_same_name(tmp_path: Path, variable: str) -> None:
    """A learner's own kernel of the name python3 would start without the course's packages."""
    other = tmp_path / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "Mine", "language": "python"}')
    environment = desk.environment({**os.environ, variable: str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"})
    assert "PYTHONDONTWRITEBYTECODE" not in environment
    code = "from jupyter_client.kernelspec import find_kernel_specs; print(find_kernel_specs()['python3'])"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip().startswith(sys.prefix)
    if variable == "JUPYTER_PATH":
        assert environment[variable].endswith(f"{os.pathsep}{tmp_path}"), "what else the learner has there stays"


def test_the_lab_holds_the_lease_and_lets_it_go(monkeypatch) -> None:
    """The lease is asked for before JupyterLab answers, lasts while it runs, and ends with its process."""
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as home:  # short: a socket's path has 107 bytes
        holds_and_lets_go(Path(home), monkeypatch)


def holds_and_lets_go(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(forkserver.tempfile, "tempdir", None)
    place = forkserver.address()
    monkeypatch.undo()
    with socket.socket(socket.AF_UNIX) as engine, socket.socket() as free:
        engine.bind(str(place))
        engine.listen()
        engine.settimeout(120)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password="]
        words = [sys.executable, "-m", "course_lib", "lab", *(f"--option={option}" for option in options)]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "COURSE_DEVICE": "cpu"}
        environment["JUPYTERLAB_WORKSPACES_DIR"] = str(tmp_path / "workspaces")
        with open(tmp_path / "log", "w") as log:
            lab = subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        try:
            lease = Connection(engine.accept()[0].detach())
            assert lease.poll(60) and lease.recv() is None, "no lease was asked for"
            answers(f"http://127.0.0.1:{port}/api/contents/{LESSON}?content=0")
            assert not lease.poll(0.5), "the lease ended although JupyterLab runs"
        finally:
            lab.terminate()
            lab.wait(60)
        assert lease.poll(30), "the lease outlives JupyterLab"
        with pytest.raises(EOFError):
            lease.recv()


def answers(address: str, *, tries: int = 240) -> None:
    """Wait until the server answers with the lesson."""
    import time

    for _ in range(tries):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert json.load(answer)["type"] == "notebook"
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")


def test_the_engine_starts_where_the_temporary_directory_has_a_long_name(tmp_path: Path, monkeypatch) -> None:
    """A socket's path has 107 bytes: the server, and the fork server below it, listen in a shorter place."""
    deep = tmp_path / ("x" * max(1, 116 - len(str(tmp_path)) - 1))
    deep.mkdir()
    assert len(str(deep)) >= 116
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(forkserver.tempfile, "tempdir", None)
    place = forkserver.address()
    assert len(str(place)) <= forkserver.SOCKET_PATH_BYTES and place.parent.stat().st_uid == os.getuid()
    code = "import sys, multiprocessing; from course_lib.ranks import server; server.LINGER_SECONDS = 0.0\n"
    code += "multiprocessing.set_forkserver_preload = lambda modules: None; server.serve(sys.argv[1], 'none')"
    words = [sys.executable, "-c", code, str(place.with_suffix(".test"))]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert list(deep.iterdir()) == []

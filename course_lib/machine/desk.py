"""JupyterLab as the course opens it: the right kernel, the table of contents, and the stack already on its way.

`make lab` takes the warm engine's lease first and then *becomes* JupyterLab, with the lease's connection still open.
So the import of the stack starts before the first page is drawn, every kernel finds the engine warm, and its memory
goes when JupyterLab ends, however that happens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from course_lib.common.project import PROJECT
from course_lib.lesson import notebooks

STATE = PROJECT / ".lab"
"""What JupyterLab remembers of this course; the learner's own settings and workspaces stay as they are."""

CONTENTS = "@jupyterlab/toc:plugin"
SIDEBAR = ("filebrowser", "running-sessions", CONTENTS, "extensionmanager.main-view")
"""JupyterLab's own names of what stands on the left."""


def command(notebook: str, *, options: Sequence[str] = (), root: Path = PROJECT) -> list[str]:
    """The command that opens JupyterLab on a notebook.

    Args:
        notebook: Its path below the root.
        root: The folder that JupyterLab shows: not `notebooks/`, for the lessons link to the book's pages.
    """
    settings = f"--LabApp.app_settings_dir={Path(__file__).with_name('lab_settings')}"
    places = [settings, f"--ServerApp.root_dir={root}", *(["--allow-root"] if os.getuid() == 0 else [])]
    return [sys.executable, "-m", "jupyterlab", *places, *options, notebook]


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of JupyterLab and of every kernel that it starts."""
    return {"JUPYTERLAB_WORKSPACES_DIR": str(STATE / "workspaces"), **notebooks.kernel_environment(given)}


def prepare_workspace(folder: Path, notebook: str) -> Path | None:
    """Open the table of contents beside the notebook, unless the learner has arranged the workspace before.

    Args:
        notebook: The notebook's path below the project.

    Returns:
        The file that was written; None if there was one.
    """
    from jupyterlab_server.workspaces_handler import WORKSPACE_EXTENSION, WorkspacesManager, slugify

    if (folder / (slugify("default") + WORKSPACE_EXTENSION)).exists():
        return None
    widget = f"notebook:{notebook}"
    layout = {
        "main": {"dock": {"type": "tab-area", "currentIndex": 0, "widgets": [widget]}, "current": widget},
        "left": {"collapsed": False, "visible": True, "current": CONTENTS, "widgets": list(SIDEBAR)},
    }
    data = {"layout-restorer:data": layout, widget: {"data": {"path": notebook, "factory": "Notebook"}}}
    content = {"data": data, "metadata": {"id": "default"}}
    return WorkspacesManager(str(folder)).save("default", json.dumps(content))


def start(notebook: str, *, options: Sequence[str] = ()) -> None:
    """Begin to import the stack in the background, and become JupyterLab; does not return.

    Args:
        notebook: The notebook to open, as a path below the project.
    """
    from course_lib import launch
    from course_lib.launch import forkserver

    settings = environment()
    prepare_workspace(Path(settings["JUPYTERLAB_WORKSPACES_DIR"]), notebook)
    try:
        if (lease := launch.warm_up()) is not None:
            lease.survive_exec()
    except forkserver.WarmError as error:  # the lessons start it themselves, and will say what is wrong
        print(f"The stack is not imported ahead: {error}", file=sys.stderr)
    sys.stdout.flush()
    os.chdir(PROJECT)
    os.execve(sys.executable, command(notebook, options=options), settings)

"""JupyterLab in a real browser, for tests: the server as `make lab` starts it, and a page that runs cells."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.machine import desk

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync", "--no-sandbox")
PATIENCE_MS = 180_000
"""How long a page may take to do one thing: two busy cores are slow, and a wait that ends early proves nothing."""


class NoBrowser(RuntimeError):
    """There is no Chromium, and it cannot be installed."""


def browser() -> str:
    """The path of a Chromium; on Debian, as root, it is installed if there is none.

    Raises:
        NoBrowser: If there is none and nobody may install it.
    """
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    if os.getuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *command], env=environment, check=True, capture_output=True, timeout=900)
        return browser()
    raise NoBrowser("The browser tests need Chromium. Install it: `sudo apt install chromium`, then run them again.")


@dataclass
class Lab:
    """One lesson in JupyterLab.

    Attributes:
        page: Playwright's page.
        base: Address of the server.
        root: The folder that JupyterLab shows.
        elsewhere: Every request that did not go to the server.
    """

    page: Any
    base: str
    root: Path
    elsewhere: list[str] = field(default_factory=list)

    def open(self, notebook: str, *, reset: bool = True) -> None:
        """Open a notebook and wait for its kernel; without a reset, in the workspace that was left."""
        end = time.monotonic() + PATIENCE_MS / 1000
        while True:
            try:
                self.page.goto(f"{self.base}/lab/tree/{notebook}{'?reset' if reset else ''}", timeout=30_000)
                break
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
        self.page.wait_for_selector(".jp-Notebook", timeout=PATIENCE_MS)
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=PATIENCE_MS)
        # JupyterLab says "idle" before it is connected, and asks which kernel is meant if somebody is quicker.
        self.page.wait_for_timeout(2000)

    def menu(self, name: str, entry: str) -> None:
        """Choose an entry of a menu."""
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=entry).first.click()

    def run_all(self) -> None:
        """Start all cells; a click before the kernel is connected is lost, so it is repeated until a cell has begun."""
        begun = "[...document.querySelectorAll('.jp-InputPrompt')].some(prompt => /\\[(\\*|\\d+)\\]/.test(prompt.textContent))"
        end = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(begun):
            assert time.monotonic() < end, "no cell began to run"
            self.menu("Run", "Run All Cells")
            for _ in range(20):
                self.page.wait_for_timeout(500)
                if self.page.locator(".jp-Dialog").count():
                    self.page.locator(".jp-Dialog button.jp-mod-accept").click()
                if self.page.evaluate(begun):
                    break

    def wait(self, *, seconds: float) -> None:
        """Wait until the kernel has been idle for a second."""
        end = time.monotonic() + seconds
        idle = 0
        while idle < 4:
            assert time.monotonic() < end, "the kernel was still busy"
            status = self.page.evaluate("document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status")
            idle = idle + 1 if status == "idle" else 0
            time.sleep(0.25)

    def save(self) -> None:
        """Save the notebook, and wait until it is saved."""
        self.menu("File", "Save Notebook")
        self.page.wait_for_selector(
            ".jp-mod-current .jp-DirtyIndicator, .lm-mod-current.jp-mod-dirty", state="detached"
        )

    def select(self, cell: int) -> None:
        """Make the cell of this index the active one."""
        place = self.page.locator(".jp-Notebook .jp-Cell").nth(cell)
        place.scroll_into_view_if_needed()
        place.locator(".jp-InputPrompt").click()

    def theme(self, name: str) -> None:
        """Choose JupyterLab's theme, `"Light"` or `"Dark"`."""
        self.menu("Settings", "Theme")
        self.page.locator(".lm-Menu-itemLabel", has_text=f"JupyterLab {name}").first.click()
        light = "true" if name == "Light" else "false"
        self.page.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state="attached")

    def shut_down(self) -> None:
        """End every kernel, so that the next lesson has one of its own."""
        self.menu("Kernel", "Shut Down All Kernels")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.page.wait_for_selector(".jp-Dialog", state="detached")

    def show(self, selector: str) -> None:
        """Scroll to the last thing of this kind; cells above it may still grow, so more than once."""
        for _ in range(3):
            self.page.locator(selector).last.evaluate("thing => thing.scrollIntoView({block: 'center'})")
            self.page.wait_for_timeout(700)

    def shot(self, path: Path) -> None:
        """Save a picture of the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))


@contextlib.contextmanager
def lab(root: Path, runs: Path) -> Iterator[Lab]:
    """JupyterLab on a folder that holds `notebooks/`, in a headless browser; both end with the context."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password="]
    command = desk.command(str(root), options=options, root=root)
    environment = {**desk.environment(), "COURSE_RUNS": str(runs), "JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
    environment |= {"JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"), "COURSE_LEDGER": str(root / "ledger.json")}
    with open(root / "lab.log", "w") as log, sync_playwright() as playwright:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            chromium = playwright.chromium.launch(executable_path=browser(), args=list(QUIET))
            page = chromium.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(PATIENCE_MS)
            here = Lab(page, f"http://127.0.0.1:{port}", root)
            own = (here.base, here.base.replace("http", "ws"), "data:", "blob:")
            page.on("request", lambda r: None if r.url.startswith(own) else here.elsewhere.append(r.url))
            yield here
            here.shot(root / "last.png")  # what was to be seen when a test failed
            chromium.close()
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)
                server.wait()

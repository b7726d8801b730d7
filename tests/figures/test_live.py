"""The live view: it shows what happens, costs little, and never gets in the way of the training."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from course_lib import runs
from course_lib.common import screen
from course_lib.figures import live


def run_of(steps: int, *, ranks: int = 8, status: str | None = None, stage: str = "training") -> SimpleNamespace:
    """A run in progress, as far as the view looks at it."""
    columns = ["step", "loss", "elapsed_ms", "tokens_per_second"]
    metrics = [(s, 7 - 0.1 * s, 900.0 if s == 1 else 300.0, 1000.0 if s == 1 else 3000.0) for s in range(1, steps + 1)]
    memory = [
        (rank, s, (300 + rank) * 2**20, (310 + rank) * 2**20) for s in range(1, steps + 1) for rank in range(ranks)
    ]
    ended = (
        runs.Outcome(status, rank=3, cause="rank 3 raised ValueError: heads", finished=time.time()) if status else None
    )
    return SimpleNamespace(
        path=Path("runs") / "smoke",
        launch={"ranks": ranks, "started": time.time() - 5},
        outcome=ended,
        warnings=(),
        metrics=pd.DataFrame(metrics, columns=columns),
        validation=pd.DataFrame([], columns=["step", "loss"]),
        memory=pd.DataFrame(memory, columns=["rank", "step", "memory_bytes", "peak_memory_bytes"]),
        stage=lambda: stage,
    )


@pytest.fixture(autouse=True)
def nobodys_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lesson may have left a real run `runs/smoke` where the tests stand."""
    monkeypatch.chdir(tmp_path)


class Notebook:
    """A stand-in for the notebook's display: it keeps what would be on the page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import IPython.display

        self.pictures: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.widgets: list[Any] = []
        monkeypatch.setattr(screen, "where", lambda: "notebook")
        monkeypatch.setattr(IPython.display, "display", self.display)

    def display(self, shown: Any, *, display_id: bool = False, metadata: Any = None, raw: bool = False) -> Any:
        if not raw:
            self.widgets.append(shown)
            return None
        self.update(shown, metadata=metadata)
        return SimpleNamespace(update=self.update)

    def update(self, shown: dict[str, str], *, metadata: dict[str, Any] | None = None, raw: bool = True) -> None:
        metadata = metadata or {}
        alt = metadata.get("image/png", {}).get("alt")
        data = base64.b64decode(shown["image/png"])
        self.pictures.append(SimpleNamespace(data=data, alt=alt, html=shown.get("text/html", "")))
        self.metadata.append(metadata)

    @property
    def text(self) -> str:
        return self.widgets[0].children[1].value


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    """A notebook whose view draws as often as it is asked to."""
    monkeypatch.setattr(live, "SECONDS_BETWEEN_FRAMES", 0.0)
    monkeypatch.setattr(live, "SECONDS_BETWEEN_LINES", 0.0)
    return Notebook(monkeypatch)


def test_frames_and_progress_follow_the_run(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new step gives a PNG behind the same display id, and a line with step, loss, rate and time left."""
    monkeypatch.setattr(live, "DUTY_CYCLE", 1e9)
    view = live.view(10, name="smoke")
    for steps in range(1, 5):
        view.update(run_of(steps))
    assert not view.problem
    assert len(notebook.pictures) == 4 and all(picture.data[:4] == b"\x89PNG" for picture in notebook.pictures)
    assert notebook.text.startswith("smoke: step 4 of 10, loss 6.600 nats/token, 3,000 tokens/s")
    assert "about 2 s left" in notebook.text
    assert notebook.widgets[0].children[0].value == 4


def test_nothing_new_draws_nothing(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame is drawn only when the run has written something since the last one."""
    monkeypatch.setattr(live, "DUTY_CYCLE", 1e9)
    view = live.view(10)
    for _ in range(5):
        view.update(run_of(2))
    assert len(notebook.pictures) == 1


def test_the_rhythm_slows_down_with_the_cost_of_a_frame(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes at most its share of the cores: the pause follows from the measured cost."""
    cost = 0.4
    clock = iter(cost * tick for tick in range(100))
    monkeypatch.setattr(live, "time", SimpleNamespace(
        time=time.time, monotonic=time.monotonic, thread_time=lambda: next(clock)))  # fmt: skip
    monkeypatch.setattr(live.os, "sched_getaffinity", lambda pid: {0, 1})
    view = live.view(10)
    for steps in range(1, 6):
        view.update(run_of(steps))
    assert view.frame_cost_seconds == pytest.approx(cost)
    assert view.interval_seconds == pytest.approx(cost / (0.02 * 2))
    assert len(notebook.pictures) == 2, "the frame that builds the figure, and one whose cost stops the others"


def test_a_costly_frame_is_paid_off_without_standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one costly frame the pauses stay at two seconds or less, and in the long run the share is kept."""
    now, spent = 0.0, 0.0
    monkeypatch.setattr(screen, "where", lambda: "notebook")
    monkeypatch.setattr(live, "time", SimpleNamespace(time=time.time, monotonic=lambda: now))
    monkeypatch.setattr(live.os, "sched_getaffinity", lambda pid: {0, 1})
    view = live.view(10)
    for cost in [0.08, 0.07, *[0.015] * 40]:
        view._pay(cost)
        assert 0.5 <= view.interval_seconds <= 2.0
        now, spent = now + view.interval_seconds, spent + cost
    assert spent <= 0.02 * 2 * now


def test_most_frames_redraw_only_the_curves(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """The axes are drawn again only when they change: with 40 falling losses, in fewer than a quarter of the frames."""
    panels = live.Panels(40)
    full: list[int] = []
    draw = panels.canvas.draw
    monkeypatch.setattr(panels.canvas, "draw", lambda: (full.append(1), draw())[1])
    for steps in range(1, 41):
        panels.draw(run_of(steps))
    assert len(full) < 10


@pytest.mark.parametrize("steps", [8, 40, 240])
def test_marks_at_the_ends_are_whole(steps: int) -> None:
    """First and last step, and the held-out diamond of the end, lie inside the axes; one rank is rank 0, and no half."""
    run, panels = run_of(steps, ranks=1), live.Panels(steps)
    run.validation = pd.DataFrame([(steps, 5.0)], columns=["step", "loss"])
    panels.draw(run)
    for ax in (panels.axes[0], panels.axes[2]):
        left, right = ax.get_window_extent().intervalx
        first, last = (ax.transData.transform((step, 0))[0] for step in (1, steps))
        radius = panels.figure.dpi / 72 * 5 * 2**0.5 / 2  # a diamond of 5 points stands on its corner
        assert left <= first - radius and last + radius <= right
    assert [tick for tick in panels.axes[1].get_xticks() if -0.5 < tick < 0.5] == [0]
    assert all(tick == int(tick) for tick in panels.axes[1].get_xticks())


def test_the_last_frame_survives_in_a_static_page(notebook: Notebook) -> None:
    """Closing leaves a sharp picture with alternative text from the data, and the run's directory for the executor."""
    view = live.view(3)
    view.update(run_of(2))
    view.close(run_of(3, status="succeeded"))
    from PIL import Image

    first, last = notebook.pictures[0], notebook.pictures[-1]
    assert "6.9 at step 1 to 6.7 nats per token at step 3" in last.alt and "8 ranks" in last.alt
    assert Image.open(io.BytesIO(last.data)).width == 2 * Image.open(io.BytesIO(first.data)).width
    assert notebook.metadata[-1]["course"] == {"run": "runs/smoke"}
    assert first.html == "" and last.html.startswith('<details class="live"><summary>') and last.alt in last.html
    assert "done, 3 of 3 steps in 5" in notebook.text and notebook.widgets[0].children[0].bar_style == "success"


def test_the_picture_of_a_failed_run_stays_open(notebook: Notebook) -> None:
    """Whoever looks for what went wrong need not unfold it."""
    live.view(3).close(run_of(2, status="failed"))
    assert notebook.pictures[-1].html.startswith('<details class="live" open>')


def test_a_failed_run_says_why(notebook: Notebook) -> None:
    """The closing line of a failed run names the rank and its cause; a run without a step has no empty picture."""
    view = live.view(3)
    view.close(run_of(0, status="failed"))
    assert "failed, 0 of 3 steps" in notebook.text and "Rank 3 raised ValueError: heads" in notebook.text
    assert notebook.pictures == []


def test_text_from_outside_is_escaped(notebook: Notebook) -> None:
    """A cause with angle brackets is shown, not interpreted."""
    run = run_of(1)
    run.outcome = runs.Outcome("failed", cause="<script>alert(1)</script>")
    live.view(3).close(run)
    assert "&lt;script&gt;" in notebook.text


@pytest.mark.parametrize("stage", runs.STAGES[:5])
def test_before_the_first_step_the_stage_is_named(notebook: Notebook, stage: str) -> None:
    """Until there is a loss, the view says what the ranks do, in the words of the run."""
    live.view(3, name="smoke").update(run_of(0, stage=stage))
    words = "computing the first step" if stage == "training" else stage
    assert notebook.text.startswith(f"smoke: {words}, 0.0 s so far")


def test_the_view_reads_a_real_run_directory(notebook: Notebook, tmp_path: Path) -> None:
    """What the view reads is what a run directory holds: here one written by hand, as ranks write it."""
    lines = {
        "metrics": [{"step": 1, "loss": 6.9, "elapsed_ms": 10.0, "tokens_per_second": 99.0}],
        "memory": [{"rank": rank, "step": 1, "memory_bytes": 2**28, "peak_memory_bytes": 2**29} for rank in range(2)],
        "validation": [{"step": 1, "loss": 6.8}],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = live.view(1)
    view.update(runs.Run(tmp_path))
    view.close(runs.Run(tmp_path))
    assert not view.problem and "6.9" in notebook.text and "2 ranks" in notebook.pictures[-1].alt


def test_time_left_is_not_invented() -> None:
    """There is no estimate before two steps beyond the first; the slow first step does not count."""
    assert [live.remaining(run_of(steps), total_steps=10) for steps in (0, 1, 2)] == [None] * 3
    assert live.remaining(run_of(4), total_steps=10) == pytest.approx(6 * 0.3)
    assert live.remaining(run_of(10), total_steps=10) == 0


class Broken:
    """A run on which every look fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


def test_an_error_of_the_view_stays_in_the_view(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever breaks in the view, the training cell goes on; it is said once."""
    view = live.view(3)
    view.update(Broken())
    view.update(Broken())
    view.close(Broken())
    assert view.problem == "RuntimeError: no metrics"
    assert capsys.readouterr().err.count("not affected") == 1


def test_an_interrupt_goes_through(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's Interrupt is no error of the view: it reaches the cell."""

    def interrupt(self: live.View, run: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(live.View, "_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        live.view(3).update(run_of(1))


def test_without_notebook_and_terminal_there_is_silence() -> None:
    """In a plain process whose stderr is no terminal nothing is printed, and nothing heavy is loaded."""
    code = (
        "import sys; from course_lib.figures import live; view = live.view(3); view.update(None); view.close(None)\n"
        "assert not view.problem and not {'IPython', 'matplotlib', 'ipywidgets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_gets_one_line_a_second(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal sees at most one line of text a second, rewritten in place, and no picture."""
    monkeypatch.setattr(screen, "where", lambda: "terminal")
    view = live.view(10)
    for steps in range(1, 6):
        view.update(run_of(steps))
    assert capsys.readouterr().err.count("\r") == 1
    view.close(run_of(10, status="succeeded"))
    assert "done, 10 of 10 steps" in capsys.readouterr().err and not view.problem


def test_a_warning_stands_before_everything_else(tmp_path: Path) -> None:
    """Ranks that disagree are told while the run goes on, and at its end."""
    rows = [{"rank": rank, "step": 1, "loss": 6.9, "grad_norm": 1.0 + rank, "skipped": False} for rank in range(2)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view, run = live.view(3), run_of(1, ranks=2)
    run.path, run.warnings = tmp_path, runs.Agreement(runs.Run(tmp_path)).look(last=True)
    words = "WARNING: ranks that must agree do not: the gradient norm of step 1 is 1 on rank 0, 2 on rank 1"
    assert view._progress(run).startswith(words) and "step 1 of 3" in view._progress(run)
    assert view._ending(run).startswith(words)

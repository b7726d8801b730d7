"""Watch the ranks of a run until they end, and turn their end into a value or an exception; none is left behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from course_lib import runs
from course_lib.runs import failures

if TYPE_CHECKING:
    from course_lib.figures import live

PATIENCE_SECONDS = 6.0
"""How long a rank may be gone before a launch that says nothing about it is stopped."""

RESERVE_BYTES = 16 * 1024
"""Space kept free in a run directory, so that a full disk cannot keep `outcome.json` from being written."""


class RunFailed(RuntimeError):
    """A run failed; the message names the first failing rank and its cause, `outcome` and `run` have the rest."""

    def __init__(self, run: runs.Run, outcome: runs.Outcome) -> None:
        super().__init__(failures.describe(run, outcome))
        self.run, self.outcome = run, outcome


class RunInterrupted(KeyboardInterrupt):
    """The learner stopped the cell; all ranks are gone."""


def watch(
    run: runs.Run, *, ranks: int, start: Callable, view: Callable[[], live.View | None], watch: Callable | None
) -> runs.Run:
    """Start the ranks, show what they do, and turn their end into a value or an exception.

    Args:
        start: Starts them, given the run and their number; returns a launch with `wait`, `stop` and `close`.
        view: Makes the live view, or returns `None` for silence.
        watch: Called with the run some ten times a second, if there is one.

    Raises:
        RunFailed: If a rank failed; names the first one and its cause.
        RunInterrupted: If the learner interrupted; no rank is left.
    """
    report, shown = None, None
    oom_kills = failures.oom_kills()
    try:
        try:
            (run.path / ".reserve").write_bytes(b"\0" * RESERVE_BYTES)
            shown = view()
            launched = start(run, ranks)
        except BaseException as error:
            runs.write_outcome(run.path, _stopped_by(error))
            raise
        try:
            patience = _Patience()
            while (report := launched.wait(0.1)) is None:
                if shown is not None:
                    shown.update(run.reload())
                if watch is not None:
                    watch(run.reload())
                if patience.ends(run):
                    left = failures.left(run)
                    launched.stop()
                    late = _wait_for_the_end(launched, run) or {}  # the launcher may have been the slow one
                    report = {"dead": left | (_by_rank(late.get("dead")) or {})}
                    break
            if report.get("error"):  # the ranks are ours to end, before one of them has the last word
                _kill_ranks(run)
            outcome = failures.settle(
                run.path,
                dead=_by_rank(report.get("dead")),
                launcher=report.get("error", ""),
                oom_killed=failures.oom_kills() > oom_kills,
            )
        except BaseException as error:  # the learner's interrupt, or what `watch` raised
            launched.stop()
            try:
                _wait_for_the_end(launched, run)
            finally:  # a second interrupt ends the waiting, and the run still has its last word
                runs.write_outcome(run.path, _stopped_by(error))
            if isinstance(error, KeyboardInterrupt):
                raise RunInterrupted(f"run {run.name!r} was stopped; all {ranks} ranks are gone") from None
            raise
        finally:
            launched.close()
        if outcome.status != "succeeded":  # a launcher that was killed leaves its ranks to us
            _kill_ranks(run)
    finally:
        (run.path / ".reserve").unlink(missing_ok=True)
        if shown is not None:
            shown.close(run.reload())
    if outcome.status != "succeeded":
        raise RunFailed(run.reload(), outcome)
    return run.reload()


def _stopped_by(error: BaseException) -> runs.Outcome:
    """The outcome of a launch that was ended from outside: without one a run looks as if it went on."""
    if isinstance(error, KeyboardInterrupt):
        return runs.Outcome("interrupted", cause="stopped by the learner")
    return runs.Outcome("failed", cause=f"{type(error).__name__}: {error}"[:500])


class _Patience:
    """Ends when a rank has been gone for some seconds and the launcher, who should know first, has said nothing."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._gone_since: float | None = None

    def ends(self, run: runs.Run) -> bool:
        now = time.monotonic()
        if now - self._looked >= 1.0:
            self._looked = now
            self._gone_since = (self._gone_since or now) if failures.left(run) else None
        return self._gone_since is not None and now - self._gone_since > PATIENCE_SECONDS


def _by_rank(dead: dict | None) -> dict[int, int | None] | None:
    """Exit codes as a report has them, whose keys are text if it came through a pipe."""
    return None if dead is None else {int(rank): code for rank, code in dead.items()}


def _wait_for_the_end(launched: object, run: runs.Run, *, limit_seconds: float = 10.0) -> dict | None:
    """Wait for the report of a stopped launch; ranks that are still there at the limit are killed by their pids."""
    end = time.monotonic() + limit_seconds
    try:
        while (report := launched.wait(0.1)) is None and time.monotonic() < end:
            pass
        return report
    finally:  # a second interrupt ends the waiting, not the duty to leave no rank behind
        _kill_ranks(run)


def _kill_ranks(run: runs.Run) -> None:
    import psutil

    for entry in run.ranks().values():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(entry["pid"])
            if process.create_time() < entry["time"] + 1.0:  # who got the number later began after the rank's last word
                process.kill()

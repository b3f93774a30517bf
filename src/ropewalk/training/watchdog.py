"""A thread on every rank that speaks up when a step takes far too long: which rank is stuck, and where."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import TracebackType

from ropewalk.config import GuardConfig
from ropewalk.training.distributed import log
from ropewalk.training.heartbeat import BEAT, Heartbeat, Heartbeats
from ropewalk.training.hooks import Hook, Step

WINDOW = 50  # steps whose median is the measure
MARGIN = 2.0  # seconds that a heartbeat may come late


@dataclass(frozen=True)
class Now:
    """What the watched thread does: a step, since when, and since when its micro batch; infinite: nothing is timed."""

    step: int
    since: float = math.inf
    batch_since: float = math.inf


class Watchdog(Hook):
    """Reports a step, once, that takes longer than ``stuck_multiple`` times the median of those before and than
    ``stuck_seconds``, or of which one micro batch takes longer than ``stuck_batch_seconds``.

    Every rank's thread writes a heartbeat with the watched thread's stack to heartbeats/rank_R.txt. A rank that is late
    watches the others' for one beat. One whose heartbeat stands still is stopped or dead, holds the interpreter,
    or cannot write, so the lowest of those that are late and alive reports, and keeps all stacks in stuck/step-N. A
    living rank that is not in a collective is what the others wait for. On a GPU one whose kernels hang shows as
    waiting.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, guards: GuardConfig) -> None:
        """Be idle until the context is entered, in the thread that is to be watched."""
        self.run_dir, self.rank, self.world_size, self.guards = run_dir, rank, world_size, guards
        shortest = min(guards.stuck_seconds, guards.stuck_batch_seconds)
        self._every, self._beat_every = min(1.0, shortest / 4), min(BEAT, shortest / 4)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._now = Now(0)
        self._next_beat = 0.0
        self._reported = -1  # step
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        self._heartbeats = Heartbeats(self.run_dir, self.rank, self.world_size)
        self._say(late=False)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(MARGIN)  # a file system may hold it
        self._heartbeats.end()

    def before_step(self, number: int) -> None:
        """Start the clocks of the step and of its first micro batch."""
        self._now = Now(number, time.monotonic(), time.monotonic())

    def before_micro_batch(self) -> None:
        """Start the clock of the next micro batch."""
        self._now = replace(self._now, batch_since=time.monotonic())

    def after_step(self, step: Step) -> None:
        """Stop the clocks; nothing is watched until the next step, so a save may take its time."""
        self._seconds.append(time.monotonic() - self._now.since)
        self._now = Now(self._now.step)

    def before_exit(self, steps: int, reason: str) -> None:
        """Stop the clocks: the last save may take its time, too."""
        self._now = Now(self._now.step)

    @property
    def limit(self) -> float | None:
        """Seconds that a step may take; None before there is a median."""
        if len(self._seconds) < 3:
            return None
        return max(self.guards.stuck_seconds, self.guards.stuck_multiple * median(self._seconds))

    def lateness(self, now: Now, at: float) -> str | None:
        """What takes too long at the time ``at``, in words; None where nothing does."""
        if self.limit is not None and at - now.since > self.limit:
            return f"step {now.step} has taken {at - now.since:.1f} s, the median is {median(self._seconds):.2f} s"
        if at - now.batch_since > self.guards.stuck_batch_seconds:
            return (
                f"step {now.step} has taken {at - now.since:.1f} s, one micro batch {at - now.batch_since:.1f} s of it"
            )
        return None

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            now = self._now
            late = self.lateness(now, time.monotonic())
            if late is not None and now.step != self._reported:
                self._reported = now.step
                self._report(now, late)
            elif time.monotonic() >= self._next_beat:
                self._say(late is not None)

    def _report(self, now: Now, late: str) -> None:
        """Watch the others for one heartbeat, then report where no lower rank will."""
        self._say(late=True)
        before, until = self._heartbeats.heard(), time.monotonic() + self._beat_every + MARGIN
        while time.monotonic() < until:
            if self._over.wait(self._every):
                return
            self._say(late=True)
        after = self._heartbeats.heard()
        silent = [rank for rank in range(self.world_size) if before[rank] == after[rank] and rank != self.rank]
        lower = [heard for rank, heard in enumerate(after[: self.rank]) if rank not in silent]
        if any(heard is not None and heard.late for heard in lower):
            return
        told = self._told(after if self._now == now else before, silent)
        directory = self.run_dir / "stuck" / f"step-{now.step:08d}"
        try:
            self._heartbeats.keep(directory)
            told += f"; stacks in {directory}"
        except OSError as error:
            told += f"; stacks could not be kept ({error})"
        log(f"watchdog: {self.lateness(self._now, time.monotonic()) or late}: {told}")

    def _say(self, late: bool) -> None:
        self._next_beat = time.monotonic() + self._beat_every
        self._heartbeats.say(self._now.step, late)

    def _told(self, heard: Sequence[Heartbeat | None], silent: Sequence[int]) -> str:
        """Who is stuck, the fewest first, then who waits for them."""
        found: dict[str, list[int]] = {}
        waiting = 0
        for rank, last in enumerate(heard):
            if rank in silent or last is None:
                found.setdefault(_silence(last), []).append(rank)
            elif last.place.startswith("waits"):
                waiting += 1
            else:
                found.setdefault(last.place, []).append(rank)
        told = [
            f"rank {_listed(ranks)} {place}"
            for place, ranks in sorted(found.items(), key=lambda item: (len(item[1]), item[1]))
        ]
        if waiting:
            told.append(f"{waiting} of {self.world_size} ranks wait in collectives")
        return "; ".join(told)


def _listed(ranks: Sequence[int]) -> str:
    """The first eight, and how many there are where there are more."""
    listed = ", ".join(map(str, ranks[:8]))
    return listed if len(ranks) <= 8 else f"{listed} ... ({len(ranks)} of them)"


def _silence(last: Heartbeat | None) -> str:
    said = "says nothing: stopped or dead"
    if last is None:
        return said
    return f"{said} (process {last.pid} on {last.host}; when last heard it {last.place}, step {last.step})"

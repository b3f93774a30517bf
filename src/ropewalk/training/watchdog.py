"""Watchdog: a heartbeat of every rank, and the report of a step that takes too long, with the stuck rank and its place.

Every rank's thread writes a heartbeat with the watched thread's stack to heartbeats/rank_R.txt.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import CodeType, FrameType, TracebackType

from ropewalk.config.train import GuardConfig
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.distributed import log
from ropewalk.training.hooks import Hook, Step

BEAT = 10.0  # seconds between two heartbeats of a rank that is in time
WINDOW = 50  # steps whose median is the measure
MARGIN = 2.0  # seconds that a heartbeat may come late


@dataclass(frozen=True)
class Clocks:
    """A step with the times at which it and its present micro batch began; infinite: nothing is timed."""

    step: int
    since: float = math.inf
    batch_since: float = math.inf


class Watchdog(Hook):
    """Reports a step, once, that takes longer than ``stuck_multiple`` times the median of those before and than
    ``stuck_seconds``, or of which one micro batch takes longer than ``stuck_batch_seconds``.

    A rank that is late watches the others' heartbeats for one beat. One whose heartbeat stands still is stopped or
    dead, holds the interpreter, or cannot write, so the lowest of those that are late and alive reports, and keeps all
    stacks in stuck/step-N. A living rank that is not in a collective is what the others wait for. On a GPU, a rank
    whose kernels hang shows as waiting.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, guards: GuardConfig) -> None:
        """Be idle until the context is entered, in the thread that is to be watched."""
        self.run, self.rank, self.world_size, self.guards = RunDirectory(run_dir), rank, world_size, guards
        shortest = min(guards.stuck_seconds, guards.stuck_batch_seconds)
        self._every, self._beat_every = min(1.0, shortest / 4), min(BEAT, shortest / 4)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._clocks = Clocks(0)
        self._next_beat = 0.0
        self._reported = -1  # step
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        self._heartbeats = Heartbeats(self.run, self.rank, self.world_size)
        self._beat(is_late=False)
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
        self._clocks = Clocks(number, time.monotonic(), time.monotonic())

    def before_micro_batch(self) -> None:
        """Start the clock of the next micro batch."""
        self._clocks = replace(self._clocks, batch_since=time.monotonic())

    def after_step(self, step: Step) -> None:
        """Stop the clocks; nothing is watched until the next step, so a save may take its time."""
        self._seconds.append(time.monotonic() - self._clocks.since)
        self._clocks = Clocks(self._clocks.step)

    def before_exit(self, steps: int, reason: str) -> None:
        """Stop the clocks: the last save may take its time, too."""
        self._clocks = Clocks(self._clocks.step)

    @property
    def limit(self) -> float | None:
        """Seconds that a step may take; None before there is a median."""
        if len(self._seconds) < 3:
            return None
        return max(self.guards.stuck_seconds, self.guards.stuck_multiple * median(self._seconds))

    def lateness(self, clocks: Clocks, at: float) -> str | None:
        """In words, what takes too long at the time ``at``; None if nothing does."""
        taken = f"step {clocks.step} has taken {at - clocks.since:.1f} s"
        if self.limit is not None and at - clocks.since > self.limit:
            return f"{taken}, the median is {median(self._seconds):.2f} s"
        if at - clocks.batch_since > self.guards.stuck_batch_seconds:
            return f"{taken}, one micro batch {at - clocks.batch_since:.1f} s of it"
        return None

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            clocks = self._clocks
            late = self.lateness(clocks, time.monotonic())
            if late is not None and clocks.step != self._reported:
                self._reported = clocks.step
                self._report(clocks, late)
            elif time.monotonic() >= self._next_beat:
                self._beat(late is not None)

    def _report(self, clocks: Clocks, late: str) -> None:
        """Watch the others for one heartbeat, then report unless a lower rank will."""
        self._beat(is_late=True)
        earlier, until = self._heartbeats.read(), time.monotonic() + self._beat_every + MARGIN
        while time.monotonic() < until:
            if self._over.wait(self._every):
                return
            self._beat(is_late=True)
        latest = self._heartbeats.read()
        silent = [rank for rank in range(self.world_size) if earlier[rank] == latest[rank] and rank != self.rank]
        lower = [heartbeat for rank, heartbeat in enumerate(latest[: self.rank]) if rank not in silent]
        if any(heartbeat is not None and heartbeat.late for heartbeat in lower):
            return
        places = self._describe(latest if self._clocks == clocks else earlier, silent)
        directory = self.run.stuck_at(clocks.step)
        try:
            self._heartbeats.copy_to(directory)
            places += f"; stacks in {directory}"
        except OSError as error:
            places += f"; stacks could not be kept ({error})"
        log(f"watchdog: {self.lateness(self._clocks, time.monotonic()) or late}: {places}")

    def _beat(self, is_late: bool) -> None:
        self._next_beat = time.monotonic() + self._beat_every
        self._heartbeats.write(self._clocks.step, is_late)

    def _describe(self, heartbeats: Sequence[Heartbeat | None], silent: Sequence[int]) -> str:
        """The ranks that are stuck, the fewest first, then the number of those that wait for them."""
        by_place: dict[str, list[int]] = {}
        waiting = 0
        for rank, heartbeat in enumerate(heartbeats):
            if rank in silent or heartbeat is None:
                by_place.setdefault(_silence(heartbeat), []).append(rank)
            elif heartbeat.place.startswith("waits"):
                waiting += 1
            else:
                by_place.setdefault(heartbeat.place, []).append(rank)
        parts = [
            f"rank {_listed(ranks)} {place}"
            for place, ranks in sorted(by_place.items(), key=lambda item: (len(item[1]), item[1]))
        ]
        if waiting:
            parts.append(f"{waiting} of {self.world_size} ranks wait in collectives")
        return "; ".join(parts)


def _listed(ranks: Sequence[int]) -> str:
    """The first eight, and how many there are if there are more."""
    listed = ", ".join(map(str, ranks[:8]))
    return listed if len(ranks) <= 8 else f"{listed} ... ({len(ranks)} of them)"


def _silence(last: Heartbeat | None) -> str:
    words = "says nothing: stopped or dead"
    if last is None:
        return words
    return f"{words} (process {last.pid} on {last.host}; when last heard it {last.place}, step {last.step})"


@dataclass(frozen=True)
class Heartbeat:
    """The latest sign of life of a rank.

    Attributes:
        beat: number, from 1 in each session.
        step: that it is in, or was in last.
        late: it finds that step too long itself.
        place: of the watched thread: "waits in FUNCTION" for a collective, else "is in FUNCTION (FILE:LINE)".
        host: where it runs.
        pid: of the process there.
    """

    beat: int
    step: int
    late: bool
    place: str
    host: str
    pid: int


class Heartbeats:
    """The files heartbeats/rank_R.txt: a heartbeat in JSON, the watched thread's stack, and if late all threads'."""

    def __init__(self, run: RunDirectory, rank: int, world_size: int) -> None:
        """Args: of the run and of this rank; the calling thread is the watched one."""
        self.run, self.rank, self.world_size = run, rank, world_size
        self._watched = threading.get_ident()
        self._number, self._warned = 0, False

    def write(self, step: int, late: bool) -> None:
        """Write this rank's. If it cannot, the others take it for dead, and it warns here, once."""
        self._number += 1
        path, calls = self.run.heartbeat(self.rank), self._calls()
        heartbeat = Heartbeat(self._number, step, late, _place(calls), socket.gethostname(), os.getpid())
        try:
            path.parent.mkdir(exist_ok=True)
            with path.with_suffix(".partial").open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(heartbeat)) + "\n\nThe watched thread (most recent call first):\n")
                file.writelines(f'  File "{code.co_filename}", line {line} in {code.co_name}\n' for code, line in calls)
                if late:
                    file.write("\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            path.with_suffix(".partial").replace(path)
        except OSError as error:
            if not self._warned:
                log(f"watchdog: rank {self.rank} could not write its heartbeat ({error})")
            self._warned = True

    def read(self) -> list[Heartbeat | None]:
        """The latest heartbeat of every rank; None if it has left none."""
        return [_read(self.run.heartbeat(rank)) for rank in range(self.world_size)]

    def copy_to(self, directory: Path) -> None:
        """Copy the files of all ranks.

        Raises:
            OSError: a copy could not be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for rank in range(self.world_size):
            path = self.run.heartbeat(rank)
            if path.is_file():
                shutil.copyfile(path, directory / path.name)

    def end(self) -> None:
        """Delete this rank's file, and the directory once it is empty."""
        with suppress(OSError):
            self.run.heartbeat(self.rank).unlink()
            self.run.heartbeats.rmdir()

    def _calls(self) -> list[tuple[CodeType, int]]:
        """The watched thread's stack, innermost call first, as code and line: frames would keep its tensors alive."""
        frame: FrameType | None = sys._current_frames().get(self._watched)
        calls = []
        while frame is not None:
            calls.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return calls


def _read(path: Path) -> Heartbeat | None:
    try:
        return Heartbeat(**json.loads(path.read_text(encoding="utf-8").partition("\n")[0]))
    except (OSError, ValueError, TypeError):
        return None


def _place(calls: Sequence[tuple[CodeType, int]]) -> str:
    """See Heartbeat."""
    if not calls:
        return "has ended"
    collective = next((code for code, _ in calls if _is_collective(code)), None)
    if collective is not None:
        return f"waits in {collective.co_name}"
    innermost, line = calls[0]
    return f"is in {innermost.co_name} ({innermost.co_filename}:{line})"


def _is_collective(code: CodeType) -> bool:
    """True for what waits for other ranks: torch's functions, DeepSpeed's, and the handles that ZeRO-3 waits on."""
    file = code.co_filename
    return (
        "torch/distributed/" in file or "deepspeed/comm/" in file or ("deepspeed/" in file and code.co_name == "wait")
    )

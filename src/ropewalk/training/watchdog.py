"""A thread on every rank that speaks up when a step takes far too long: which rank is stuck, and where."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType

WINDOW = 50  # steps whose median is the measure
GRACE = 2.0  # seconds in which all ranks must have written


class Watchdog:
    """Reports once for each step that exceeds ``multiple`` times the median, and at least ``at_least`` seconds.

    Every rank writes its own place and the stacks of all its threads to stuck/step-N/rank_R.txt; rank 0 then reads
    what is there. A rank that is not in a collective is what the others wait for, and one that has written nothing is
    stopped, dead, or holds the interpreter. On a GPU a rank whose kernels hang also shows as waiting.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, multiple: float, at_least: float) -> None:
        """Be idle until the context is entered, in the thread that is to be watched."""
        self.run_dir, self.rank, self.world_size = run_dir, rank, world_size
        self.multiple, self.at_least = multiple, at_least
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._step, self._since = 0, float("inf")
        self._reported = -1
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def step_begins(self, step: int) -> None:
        """Start the clock of ``step``."""
        self._step, self._since = step, time.monotonic()

    def step_ends(self) -> None:
        """Stop it; nothing is watched until the next one, so a save may take its time."""
        self._seconds.append(time.monotonic() - self._since)
        self._since = float("inf")

    @property
    def limit(self) -> float | None:
        """Seconds that a step may take; None before there is a median."""
        return max(self.at_least, self.multiple * median(self._seconds)) if len(self._seconds) >= 3 else None

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.at_least / 4)):
            step, since = self._step, self._since
            taken = time.monotonic() - since
            limit = self.limit
            if limit is not None and taken > limit and step != self._reported:
                self._reported = step
                self._report(step, taken)

    def _report(self, step: int, taken: float) -> None:
        try:
            directory = self.run_dir / "stuck" / f"step-{step:08d}"
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"rank_{self.rank:05d}.txt").open("w") as file:
                file.write(self._place() + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if self.rank == 0:
                self._over.wait(GRACE)
                measure = f"step {step} has taken {taken:.1f} s, the median is {median(self._seconds):.2f} s"
                print(f"watchdog: {measure}: {self._told(directory)}; stacks in {directory}", flush=True)
        except OSError as error:
            print(f"watchdog: rank {self.rank} is late in step {step} and could not write: {error}", flush=True)

    def _place(self) -> str:
        """Where the watched thread is: "waits in FUNCTION" for a collective, else "is in FUNCTION (FILE:LINE)"."""
        frame: FrameType | None = sys._current_frames().get(self._watched)
        if frame is None:
            return "has ended"
        innermost = frame
        while frame is not None:
            if "torch/distributed/" in frame.f_code.co_filename:
                return f"waits in {frame.f_code.co_name}"
            frame = frame.f_back
        return f"is in {innermost.f_code.co_name} ({innermost.f_code.co_filename}:{innermost.f_lineno})"

    def _told(self, directory: Path) -> str:
        """Who is stuck, then who waits for them."""
        stuck: list[tuple[int, str]] = []
        waiting: list[tuple[int, str]] = []
        for rank in range(self.world_size):
            path = directory / f"rank_{rank:05d}.txt"
            place = path.read_text().partition("\n")[0] if path.is_file() else "says nothing: stopped or dead"
            (waiting if place.startswith("waits") else stuck).append((rank, place))
        told = [f"rank {rank} {place}" for rank, place in stuck]
        if waiting:
            told.append(f"{len(waiting)} of {self.world_size} ranks wait in collectives")
        return "; ".join(told)

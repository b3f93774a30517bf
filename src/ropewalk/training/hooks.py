"""Hooks: the moments of the training loop at which logging, saving, guards and the others act.

StopFlag is the hook that ends the loop: signals and the time limit, as one flag on which all ranks agree.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from ropewalk.runs.launch import release_warnings

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = 1 << 10  # beyond every signal number
BURST = 1.0  # seconds; SLURM ends a job with two SIGTERMs (13 ms apart in 22.05), which are one wish


@dataclass(frozen=True)
class Step:
    """One step of the optimizer, as it went; equal on all ranks.

    Attributes:
        number: from 1.
        order_step: step of the data order whose global batch it took, from 0.
        trained_tokens: of the global batch.
        learning_rate: of the step.
        loss: of the global batch, nats per trained token.
        grad_norm: of the whole gradient before clipping; not finite if the step was refused for that.
        refused: why the weights were left as they were; None: they were updated.
        is_spike: refused for a loss that is finite, and too high.
        refused_steps: refused so far, this one included.
    """

    number: int
    order_step: int
    trained_tokens: int
    learning_rate: float
    loss: float
    grad_norm: float
    refused: str | None = None
    is_spike: bool = False
    refused_steps: int = 0


class Hook:
    """Base class of what acts at moments of the loop; each method does nothing unless a subclass says otherwise.

    A hook is entered before the first step and left after the last one, whatever ended the run. All ranks call the
    same hooks in the same order, so a method may be collective.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def before_step(self, number: int) -> None:
        """Act before the batch of step ``number`` (from 1) is taken."""

    def before_micro_batch(self) -> None:
        """Act before each micro batch; StopRequested, raised on all ranks, gives the step up and leaves the run."""

    def after_step(self, step: Step) -> None:
        """Act on a finished step."""

    def before_exit(self, steps: int, reason: str) -> None:
        """Act before the run is left on request, after ``steps`` finished steps."""


class StopRequested(Exception):
    """All ranks have agreed to save and leave; the unfinished step is given up, and the order replays it."""


class StopFlag(Hook):
    """Ctrl-C (SIGINT), SIGTERM, SIGUSR1, SIGUSR2 and ``trainer.stop_before``, as one flag that all ranks share.

    The same signal a second time ends the process at once with 128 + its number; SIGTERM after a warning (SIGUSR1) is
    the end that was announced, and what is being saved may still be in time. Python runs a handler only between two
    bytecodes of the main thread, which may sit in a collective that never ends, so a thread of its own reads the
    signals from the wakeup descriptor. Use as a context manager, in the main thread: the handlers from before come
    back on leaving.
    """

    def __init__(self, stop_before: float | None, group: dist.ProcessGroup | None = None) -> None:
        """Start with the flag down.

        Args:
            stop_before: seconds since 1970; the run stops at the last boundary from which it expects to reach the next
                one in time. None: no limit.
            group: for the agreement; gloo, so that no boundary waits for a GPU. None: the default one.
        """
        self.stop_before, self.group = stop_before, group
        self.received = 0
        self._last_boundary: float | None = None
        self._longest_gap = 0.0

    def __enter__(self) -> StopFlag:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, _noted_elsewhere) for number in HANDLED}
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        release_warnings()  # those that came while the model was built
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # ends the thread

    def _watch(self, reader: int) -> None:
        first: dict[int, float] = {}
        while numbers := os.read(reader, 1):
            number, now = numbers[0], time.monotonic()
            if number not in HANDLED:
                continue
            if now - first.setdefault(number, now) > BURST:
                os._exit(128 + number)
            self.received = self.received or number
        os.close(reader)

    def before_micro_batch(self) -> None:
        """Leave if any rank has been signalled, or its time is over. Collective.

        Raises:
            StopRequested: on all ranks alike.
        """
        number = self._agreed(self.received or self._out_of_time())
        if number:
            raise StopRequested("trainer.stop_before" if number == TIME_LIMIT else signal.Signals(number).name)

    def before_exit(self, steps: int, reason: str) -> None:
        """After the run is left, only the process ends: no signal changes its exit code any more."""
        self._handlers_before = dict.fromkeys(HANDLED, signal.SIG_IGN)

    def is_up(self) -> bool:
        """True if the next micro batch would not begin: a rank has been signalled, or its time is over. Collective."""
        past = self.stop_before is not None and time.time() + self._longest_gap >= self.stop_before
        return bool(self._agreed(self.received or (TIME_LIMIT if past else 0)))

    def _agreed(self, number: int) -> int:
        largest = torch.tensor([number])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def _out_of_time(self) -> int:
        """TIME_LIMIT if the next boundary, as far away as the farthest so far (saves included), would be too late."""
        now = time.time()
        if self._last_boundary is not None:
            self._longest_gap = max(self._longest_gap, now - self._last_boundary)
        self._last_boundary = now
        return TIME_LIMIT if self.stop_before is not None and now + self._longest_gap >= self.stop_before else 0


def _noted_elsewhere(number: int, frame: FrameType | None) -> None:
    """Keep the default action from being taken; the thread has the signal already."""

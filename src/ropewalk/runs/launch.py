"""The start of a rank: its place among the others, from SLURM, and warnings held until it can answer them.

Standard library alone: this runs before anything that takes seconds to import.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ropewalk.errors import UserError

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: saved, not finished; the same command goes on
EXIT_NOT_FINITE = 4  # an evaluation is finished and written, and some of its numbers are NaN or infinite
HELD = (signal.SIGUSR1, signal.SIGUSR2)  # warnings; SIGTERM ends a rank that has not begun
RANK_OF = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


def hold_warnings() -> None:
    """Keep SIGUSR1 and SIGUSR2 pending. SLURM may send them while a rank imports, and they would end it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_warnings() -> None:
    """Deliver the warnings that were held."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: what cleans up after Ctrl-C cleans up after it."""


@contextmanager
def terminating() -> Iterator[None]:
    """Have SIGTERM raise :class:`Terminated`, so that half files, claims and worker processes are cleared away.

    Not in a rank of several, which may wait in a collective where no exception reaches it: its launcher ends it.
    """
    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:  # a finished training ignores it from here on
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


_left_with: list[int] = []


def leave(code: int) -> NoReturn:
    """Exit with ``code`` because of an error, which the other ranks may not have; see :func:`left_with`."""
    _left_with.append(code)
    sys.exit(code)


def left_with() -> int | None:
    """The exit code of a process that an error ends, for what runs at exit; None where it ends in order."""
    return _left_with[-1] if _left_with else None


def leave_place(environment: MutableMapping[str, str] = os.environ) -> None:
    """Unset what another launcher has left: in a process that works alone it would only hide its lines."""
    for name in PLACE:
        environment.pop(name, None)


def take_place(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE in a task that srun started; MASTER_ADDR is the job script's to set.

    Raises:
        UserError: several tasks were started without MASTER_ADDR, so each would be a run of its own in one directory.
    """
    # In the shell of an interactive allocation SLURM_NTASKS is the allocation's, and the step is one task.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks == 1:
        return
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"SLURM_NTASKS={tasks} but MASTER_ADDR is not set, so every task would be rank 0; start through "
            "slurm/train_64k.sh or hydra/launcher=slurm, which set it"
        )
    environment.update({name: environment[slurm_name] for name, slurm_name in RANK_OF.items()})

"""The verdict on a job whose ranks have ended: back into the queue, or the end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ropewalk.runs.launch import EXIT_NOT_FINITE, EXIT_REQUEUE

EXIT_OWN_ERROR = 2  # a configuration error, in one line
EXIT_UNFIT = 3  # scripts/doctor.py found the machine unfit: the code of slurm/common.sh for it
OWN_ERRORS = ("TrainingStopped",)  # exceptions by which a run ends itself: the guards have had enough
# Exceptions of a GPU or a link that has failed, and torch's words where it has no exception of its own for it. Too
# little memory has one, and an assertion on the device is the program's.
OF_THE_MACHINE = re.compile(
    r"(AcceleratorError|DistBackendError|DistNetworkError|DistStoreError)\b(?!.*device-side assert)"
    r"|RuntimeError: .*(NCCL|CUDA error|CUBLAS|CUDNN)(?!.*device-side assert)"
)
# What may come of a disk or of a peer that is gone; every other exception is the program's own.
PERHAPS = re.compile(r"(RuntimeError|OSError|\w*ConnectionError|\w*TimeoutError|BrokenPipeError|KeyboardInterrupt)\b")
FRUITLESS_SESSIONS = 2  # sessions in a row without progress; after one more a person must look


class Ending(Enum):
    """SLURM's own words on a job whose batch script still runs."""

    NONE = "nothing"
    LIMIT = "ending it at its time limit, for good"
    PREEMPTION = "taking its nodes, for good"
    REQUEUE = "ending it, to start it again itself"
    CANCEL = "ending it for somebody who wants it ended"


@dataclass(frozen=True)
class Verdict:
    """The decision on a job.

    Attributes:
        requeue: whether it has to put itself back into the queue.
        state: COMPLETED, REQUEUED (by itself or by SLURM), CANCELLED or FAILED, for the end record.
        reason: one line.
    """

    requeue: bool
    state: str
    reason: str


def ending_of(shown: str, restart: int, *, terminated: bool) -> Ending:
    """Read what SLURM is doing to a job.

    While SLURM ends a job whose script still runs, it shows COMPLETING whatever the cause; its other words show which
    (seen in SLURM 22.05).

    Args:
        shown: what ``scontrol --oneliner show job`` says of it now; "" where slurmctld does not answer.
        restart: SLURM_RESTART_COUNT of this session.
        terminated: the script itself got SIGTERM.
    """
    words = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    if int(words.get("Restarts", "0")) > restart:
        return Ending.REQUEUE
    if "TIMEOUT" in words.get("JobState", "") or words.get("Reason") == "TimeLimit":
        return Ending.LIMIT
    if words.get("PreemptTime", "None") != "None":
        return Ending.PREEMPTION
    if terminated or words.get("JobState") in ("COMPLETING", "CANCELLED", "DEADLINE"):
        return Ending.CANCEL
    return Ending.NONE


def judge(
    code: int,
    ranks: Sequence[Mapping[str, Any]],
    tasks: int,
    *,
    warned: bool,
    ending: Ending,
    progress: bool,
    fruitless: int,
) -> Verdict:
    """Decide from how the ranks ended.

    srun's own code is the highest of all tasks', and a task that was killed because another one failed counts in it, so
    the ranks' notes come first.

    Args:
        code: srun's exit code.
        ranks: the notes that ranks left; a rank without "code" was killed.
        tasks: how many ranks there should have been.
        warned: SLURM has announced the end (SIGUSR1).
        ending: what SLURM is doing to the job.
        progress: whether this session made any; see :func:`ropewalk.cluster.slurm.job.has_advanced`.
        fruitless: sessions before this one that ended early without progress, in a row.
    """
    codes = [int(rank["code"]) for rank in ranks if "code" in rank]
    if code in (0, EXIT_NOT_FINITE):
        note = "; some of its numbers are NaN or infinite, see the end of its log" if code else ""
        return Verdict(False, "COMPLETED", f"done{note}")
    own = _own_reason(code, codes, ranks, tasks)
    if own is not None:
        return Verdict(False, "FAILED", own)
    if ending is Ending.CANCEL:
        return Verdict(False, "CANCELLED", "cancelled; the same command again goes on from what was saved last")
    if ending is Ending.REQUEUE:
        return Verdict(False, "REQUEUED", "SLURM has put the job back into the queue itself")
    saved = EXIT_REQUEUE in (code, *codes)
    was_signalled = saved or warned or ending is not Ending.NONE
    why = "asked to leave" if was_signalled else f"{tasks - len(codes)} of {tasks} ranks were killed"
    if len(codes) == tasks and not was_signalled:
        why = f"a GPU or a link has failed ({_first(ranks)})"
    if not progress and fruitless >= FRUITLESS_SESSIONS:
        return Verdict(False, "FAILED", f"{why}; it and {fruitless} sessions before it made no progress")
    return Verdict(True, "REQUEUED", "saved, to go on" if saved else f"{why}; goes on from what was saved last")


def _own_reason(code: int, codes: Sequence[int], ranks: Sequence[Mapping[str, Any]], tasks: int) -> str | None:
    """Why the run failed by itself, so that the same would happen again; None where it did not."""
    for rank in ranks:
        if str(rank.get("error")).partition(":")[0] in OWN_ERRORS:
            return f"rank {rank['rank']} ended the run: {rank['error']}"
    if EXIT_OWN_ERROR in codes or (code == EXIT_OWN_ERROR and not codes):
        return "an error of configuration or data, named in the log; fix it and submit again"
    if code == EXIT_UNFIT and not ranks:
        return "the doctor found the machine unfit; see its lines in the log"
    for rank in ranks:
        error = str(rank.get("error") or "")
        if error and not OF_THE_MACHINE.match(error) and not PERHAPS.match(error):
            return f"an error of the program's own: rank {rank['rank']}: {error}"
    broken = any(OF_THE_MACHINE.match(str(rank.get("error"))) for rank in ranks)
    if len(codes) == tasks and EXIT_REQUEUE not in codes and not broken:
        first = _first(ranks)
        return "every rank ended by itself" + (f"; first {first}" if first else "")
    return None


def _first(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The first error of all, with its rank; "" where no rank noted one."""
    first = min((rank for rank in ranks if rank.get("error")), key=lambda rank: rank["ended"], default=None)
    return f"rank {first['rank']}: {first['error']}" if first else ""

"""Whether a job whose ranks have ended goes back into the queue."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_REQUEUE = 75  # as in training.signals: saved, not finished
EXIT_OWN_ERROR = 2  # a configuration error, in one line
EXIT_UNFIT = 3  # scripts/doctor.py found the machine unfit; slurm/common.sh says so with this code
OWN_ERRORS = ("TrainingStopped",)  # exceptions by which a run ends itself: the guards have had enough
# Exceptions of a GPU or a link that has failed, and what torch says where it has no exception of its own for it. Too
# little memory has one, and an assertion on the device is the program's.
OF_THE_MACHINE = re.compile(
    r"(AcceleratorError|DistBackendError|DistNetworkError|DistStoreError)\b(?!.*device-side assert)"
    r"|RuntimeError: .*(NCCL|CUDA error|CUBLAS|CUDNN)(?!.*device-side assert)"
)
# What may come of a disk or of a peer that is gone; every other exception is the program's own.
PERHAPS = re.compile(r"(RuntimeError|OSError|\w*ConnectionError|\w*TimeoutError|BrokenPipeError|KeyboardInterrupt)\b")
FRUITLESS_SESSIONS = 2  # sessions in a row that got nothing on; after one more a person must look


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job.

    Attributes:
        requeue: whether it goes back into the queue.
        state: COMPLETED, REQUEUED, FAILED or ENDED (by SLURM: cancelled, pre-empted), for the end record.
        reason: one line.
    """

    requeue: bool
    state: str
    reason: str


def judge(
    code: int,
    ranks: Sequence[Mapping[str, Any]],
    tasks: int,
    *,
    warned: bool,
    terminated: bool,
    cancelled: bool,
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
        terminated: SLURM is ending the job itself.
        cancelled: somebody has told it to; that job must stay ended.
        progress: whether this session got something on; see progress.got_on.
        fruitless: sessions before this one that ended early without progress, in a row.
    """
    codes = [int(rank["code"]) for rank in ranks if "code" in rank]
    if code == 0:
        return Verdict(False, "COMPLETED", "done")
    own = _own_reason(code, codes, ranks, tasks)
    if own is not None:
        return Verdict(False, "FAILED", own)
    if cancelled or (terminated and not warned):
        return Verdict(False, "ENDED", "SLURM ended the job; what it pre-empts it puts back into the queue itself")
    saved = EXIT_REQUEUE in (code, *codes)
    why = "told to leave" if saved or warned else f"{tasks - len(codes)} of {tasks} ranks were killed"
    if len(codes) == tasks and not (saved or warned):
        why = f"a GPU or a link has failed ({_first(ranks)})"
    if not progress and fruitless >= FRUITLESS_SESSIONS:
        return Verdict(False, "FAILED", f"{why}; it and {fruitless} sessions before it have got nothing on")
    return Verdict(True, "REQUEUED", "saved, to go on" if saved else f"{why}; goes on from what was saved last")


def _own_reason(code: int, codes: Sequence[int], ranks: Sequence[Mapping[str, Any]], tasks: int) -> str | None:
    """Why the run failed by itself, so that the same would happen again; None where it did not."""
    for rank in ranks:
        if str(rank.get("error")).partition(":")[0] in OWN_ERRORS:
            return f"rank {rank['rank']} ended the run: {rank['error']}"
    if EXIT_OWN_ERROR in codes or (code == EXIT_OWN_ERROR and not codes):
        return "an error of configuration or data, named in the log; mend it and submit again"
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
    """The first error of all, with its rank; "" where no rank has told one."""
    first = min((rank for rank in ranks if rank.get("error")), key=lambda rank: rank["ended"], default=None)
    return f"rank {first['rank']}: {first['error']}" if first else ""

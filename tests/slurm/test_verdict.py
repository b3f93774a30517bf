"""Which ends of a job put it back into the queue: each case as SLURM and the ranks leave it."""

import pytest

from ropewalk.cluster.slurm.verdict import FRUITLESS_SESSIONS, Ending, ending_of, judge
from ropewalk.training.guards import TrainingStopped


def rank(number, code=None, error=None, ended=1.0):
    note = {"rank": number, "node": "n1", "pid": 1}
    return note if code is None else {**note, "code": code, "error": error, "ended": ended}


SAVED, DONE, KILLED = rank(0, 75), rank(0, 0), rank(1)
GLOO = rank(0, 1, "RuntimeError: Connection closed by peer")
GUARD = rank(0, 1, f"{TrainingStopped.__name__}: step 9: the loss is nan")
CASES = {
    "done": (0, [DONE, rank(1, 0)], {}, "COMPLETED"),
    "an evaluation with NaN": (4, [rank(0, 4), rank(1, 4)], {}, "COMPLETED"),
    "saved": (75, [SAVED, rank(1, 75)], {"warned": True}, "REQUEUED"),
    "saved at trainer.stop_before": (75, [SAVED, rank(1, 75)], {}, "REQUEUED"),
    "warned before the ranks began": (75, [], {"warned": True}, "REQUEUED"),
    "a rank was killed while it left": (137, [SAVED, KILLED], {"warned": True}, "REQUEUED"),
    "one rank killed, the other lost its peer": (137, [GLOO, KILLED], {}, "REQUEUED"),
    "all ranks killed": (137, [rank(0), KILLED], {}, "REQUEUED"),
    "killed again and again": (137, [GLOO, KILLED], {"fruitless": FRUITLESS_SESSIONS}, "FAILED"),
    "killed again, but it gets on": (137, [GLOO, KILLED], {"fruitless": 9, "progress": True}, "REQUEUED"),
    "warned again and again": (75, [], {"warned": True, "fruitless": FRUITLESS_SESSIONS}, "FAILED"),
    "killed while it left, again and again": (
        137, [rank(0), KILLED], {"warned": True, "fruitless": FRUITLESS_SESSIONS}, "FAILED"
    ),
    "left again and again, but it gets on": (
        75, [SAVED, rank(1, 75)], {"warned": True, "fruitless": 9, "progress": True}, "REQUEUED"
    ),
    "wrong configuration on every rank": (2, [rank(0, 2), rank(1, 2)], {}, "FAILED"),
    "wrong on one, the other killed by srun": (143, [rank(0, 2), KILLED], {}, "FAILED"),
    "the guard": (1, [GUARD, rank(1, 1, GUARD["error"])], {}, "FAILED"),
    "the guard, the other killed by srun": (143, [GUARD, KILLED], {}, "FAILED"),
    "a fault of the program on every rank": (1, [rank(0, 1, "TypeError: x"), rank(1, 1, "TypeError: x")], {}, "FAILED"),
    "a GPU has failed, its peers lost it": (1, [
        rank(0, 1, "DistBackendError: NCCL error", 2.0), rank(1, 1, "AcceleratorError: CUDA error: ECC", 1.0)
    ], {}, "REQUEUED"),
    "a link fails again and again": (
        1, [rank(n, 1, "DistBackendError: NCCL error") for n in (0, 1)], {"fruitless": FRUITLESS_SESSIONS}, "FAILED"
    ),
    "a fault of the program on one, whose peer lost it": (1, [
        rank(0, 1, "DistBackendError: NCCL error", 2.0), rank(1, 1, "TypeError: x", 1.0)
    ], {}, "FAILED"),
    "a fault of the program on one, told after its peer lost it": (1, [
        rank(0, 1, "DistBackendError: NCCL error", 1.0), rank(1, 1, "TypeError: x", 2.0)
    ], {}, "FAILED"),
    "a fault of the program on one, the other killed": (143, [rank(0, 1, "TypeError: x"), KILLED], {}, "FAILED"),
    "too little memory on one, the other killed by srun": (
        143, [rank(0, 1, "OutOfMemoryError: CUDA out of memory"), KILLED], {}, "FAILED"
    ),
    "NCCL without an exception of its own": (
        1, [rank(n, 1, "RuntimeError: NCCL error in: x.cpp") for n in (0, 1)], {}, "REQUEUED"
    ),
    "an assertion on the device": (
        1, [rank(n, 1, "AcceleratorError: CUDA error: device-side assert triggered") for n in (0, 1)], {}, "FAILED"
    ),
    "a disk that fails on one, the other killed": (137, [rank(0, 1, "OSError: stale file"), KILLED], {}, "REQUEUED"),
    "too little memory": (1, [rank(n, 1, "OutOfMemoryError: CUDA out of memory") for n in (0, 1)], {}, "FAILED"),
    "unfit": (3, [], {}, "FAILED"),
    "cancelled, saved": (75, [SAVED, rank(1, 75)], {"ending": Ending.CANCEL}, "CANCELLED"),
    "cancelled after the warning": (75, [SAVED], {"warned": True, "ending": Ending.CANCEL}, "CANCELLED"),
    "cancelled, too late to save": (137, [rank(0), KILLED], {"ending": Ending.CANCEL}, "CANCELLED"),
    "the limit came while it saved": (75, [SAVED], {"warned": True, "ending": Ending.LIMIT}, "REQUEUED"),
    "the limit came without a warning": (137, [rank(0), KILLED], {"ending": Ending.LIMIT}, "REQUEUED"),
    "pre-empted, in its grace time": (143, [rank(0), KILLED], {"ending": Ending.PREEMPTION}, "REQUEUED"),
    "pre-empted again and again": (
        143, [rank(0), KILLED], {"ending": Ending.PREEMPTION, "fruitless": FRUITLESS_SESSIONS}, "FAILED"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_verdict(name):
    code, ranks, given, state = CASES[name]
    usual = {"warned": False, "ending": Ending.NONE, "progress": False, "fruitless": 0}
    verdict = judge(code, ranks, 2, **{**usual, **given})
    assert verdict.state == state
    assert verdict.requeue == (state == "REQUEUED")
    assert verdict.reason


@pytest.mark.parametrize(("code", "notes"), [(75, [SAVED, rank(1, 75)]), (137, [rank(0), KILLED])])
def test_what_slurm_puts_back_itself_is_left_to_it(code, notes):
    verdict = judge(code, notes, 2, warned=True, ending=Ending.REQUEUE, progress=True, fruitless=0)
    assert (verdict.requeue, verdict.state) == (False, "REQUEUED")


# As SLURM 22.05 shows a job whose script still runs, without the words that do not matter; JobName may be anything.
RUNS = (
    "JobId=7 JobName=a Restarts=9 JobState=RUNNING Reason=None Restarts=1 EndTime=2026-11-25T13:00:00 PreemptTime=None"
)
ENDS = RUNS.replace("RUNNING", "COMPLETING")


@pytest.mark.parametrize(("shown", "terminated", "ending"), [
    (RUNS, False, Ending.NONE),
    ("", False, Ending.NONE),  # slurmctld does not answer
    ("", True, Ending.CANCEL),
    (RUNS, True, Ending.CANCEL),  # scancel --batch --signal=TERM
    (ENDS, True, Ending.CANCEL),
    (ENDS, False, Ending.CANCEL),
    (ENDS.replace("Reason=None", "Reason=TimeLimit"), True, Ending.LIMIT),
    (ENDS.replace("PreemptTime=None", "PreemptTime=2026-11-25T12:42:00"), True, Ending.PREEMPTION),
    (RUNS.replace("PreemptTime=None", "PreemptTime=2026-11-25T12:42:00"), False, Ending.PREEMPTION),  # grace time
    (ENDS.replace("Restarts=1", "Restarts=2"), True, Ending.REQUEUE),
    (ENDS.replace("Restarts=1", "Restarts=2").replace("PreemptTime=None", ""), True, Ending.REQUEUE),
])  # fmt: skip
def test_what_slurm_does_to_a_job_is_read_from_its_words(shown, terminated, ending):
    assert ending_of(shown, 1, terminated=terminated) is ending


def test_the_first_error_is_told():
    ranks = [rank(0, 1, "RuntimeError: peer is gone", ended=9.0), rank(1, 1, "OSError: disk is full", ended=8.0)]
    verdict = judge(1, ranks, 2, warned=False, ending=Ending.NONE, progress=False, fruitless=0)
    assert verdict.reason.endswith("first rank 1: OSError: disk is full")

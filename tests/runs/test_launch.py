"""A rank's place, and signals that neither end a rank before it listens nor its helpers ever."""

import signal
import subprocess
import sys

import pytest

from ropewalk.runs.launch import take_place

TASK = {"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "MASTER_ADDR": "n1"}


def test_a_task_takes_its_place_from_slurm():
    environment = dict(TASK)
    take_place(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("11", "3", "16")


def test_a_place_that_a_launcher_gave_stays():
    environment = {**TASK, "RANK": "0"}
    take_place(environment)
    assert environment == {**TASK, "RANK": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # the shell of salloc
    ],
)
def test_one_process_alone_has_no_place_to_take(environment):
    before = dict(environment)
    take_place(environment)
    assert environment == before


HELD = """
import os, signal, sys
from ropewalk.runs.launch import hold_warnings, release_warnings
hold_warnings()
print("held", flush=True)
sys.stdin.readline()
signal.signal(signal.SIGUSR1, lambda *_: print("told", flush=True))
release_warnings()
"""


def test_a_warning_waits_until_somebody_listens():
    with subprocess.Popen(
        [sys.executable, "-c", HELD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        assert rank.stdout.readline() == "held\n"
        rank.send_signal(signal.SIGUSR1)
        said, _ = rank.communicate("go\n", timeout=30)
    assert (said, rank.returncode) == ("told\n", 0)

"""A rank's place, and signals that neither end a rank before it listens nor its helpers ever."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ropewalk.launch import deaf_children, take_place

TASK = {"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "MASTER_ADDR": "n1"}


def test_a_task_takes_its_place_from_slurm():
    environment = dict(TASK)
    take_place(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("11", "3", "16")


def test_a_place_that_a_launcher_gave_stays():
    environment = {**TASK, "RANK": "0"}
    take_place(environment)
    assert environment == {**TASK, "RANK": "0"}


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_one_process_alone_has_no_place_to_take(environment):
    before = dict(environment)
    take_place(environment)
    assert environment == before


HELD = """
import os, signal, sys
from ropewalk.launch import hold_warnings, release_warnings
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


def test_children_started_deaf_outlive_a_jobs_signals():
    with deaf_children():
        deaf = subprocess.Popen(["sleep", "60"])
    hearing = subprocess.Popen(["sleep", "60"])
    try:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            deaf.send_signal(number)
        hearing.send_signal(signal.SIGTERM)
        assert hearing.wait(10) == -signal.SIGTERM
        time.sleep(0.1)
        assert deaf.poll() is None
    finally:
        for child in (deaf, hearing):
            child.kill()
            child.wait()
    os.kill(os.getpid(), 0)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

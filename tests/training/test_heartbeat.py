"""A run directory has one writer: a second one is refused, and what a dead one has left behind holds nobody up."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from itertools import count

import pytest
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.training.heartbeat import Heartbeat, check_only_writer
from ropewalk.training.record import read_metrics

ELSEWHERE = "another-node"


def beat(run_dir, number=1, host=ELSEWHERE, pid=1):
    path = run_dir / "heartbeats" / "rank_00000.txt"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".partial").write_text(
        json.dumps(asdict(Heartbeat(number, 7, False, "is in x", host, pid))) + "\n"
    )
    path.with_suffix(".partial").replace(path)
    return path


@pytest.fixture
def beating(tmp_path):
    """A heartbeat that goes on, from a node that is not this one."""
    over = threading.Event()

    def go_on():
        for number in count(2):
            if over.wait(0.05):
                return
            beat(tmp_path, number)

    beat(tmp_path)
    thread = threading.Thread(target=go_on)
    thread.start()
    yield tmp_path
    over.set()
    thread.join()


def test_a_heartbeat_that_goes_on_is_a_writer(beating):
    with pytest.raises(ValueError, match=r"is written by process 1 on another-node, at step 7; wait for it or end it"):
        check_only_writer(beating, seconds=10)


def test_one_that_stands_still_is_not(tmp_path):
    beat(tmp_path)
    check_only_writer(tmp_path, seconds=0.5)


@pytest.mark.parametrize("left", ["nothing", "an ended process", "a week old", "no heartbeat"])
def test_nobody_waits_for_what_cannot_go_on(tmp_path, left):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    if left == "an ended process":
        beat(tmp_path, host=socket.gethostname(), pid=ended.pid)
    elif left == "a week old":
        os.utime(beat(tmp_path), (time.time() - 7 * 86400,) * 2)
    elif left == "no heartbeat":
        beat(tmp_path).write_text("torn {")
    waiting = threading.Thread(target=check_only_writer, args=(tmp_path, 3600), daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()


@pytest.mark.slow
def test_a_run_is_written_by_one_training_at_a_time(store_64, tmp_path):
    """The second ends with 2 and has written nothing; the first goes on. Killed, it is followed by the next at once."""
    arguments = tiny_arguments(store_64, tmp_path, "trainer.max_steps=100000", "trainer.checkpoint_every=5")
    with start_ranks(1, tmp_path / "logs", arguments) as first:
        first.wait_for(lambda: len(read_metrics(tmp_path)) >= 2)
        with start_ranks(1, tmp_path / "second", arguments) as second:
            assert second.wait() == [2]
            pid = first.processes[0].pid
            assert f"run_dir={tmp_path} is written by process {pid} on {socket.gethostname()}" in second.output()
        before = len(read_metrics(tmp_path))
        first.wait_for(lambda: len(read_metrics(tmp_path)) > before)
        first.send(signal.SIGKILL)
        first.wait()
    assert list((tmp_path / "heartbeats").iterdir())
    run_ranks(1, tmp_path / "logs", [*arguments, "trainer.stop_after=1"])

"""A step that takes too long is reported once, with the stuck rank and its place; a run directory has one writer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import tiny_run
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.config.train import GuardConfig
from ropewalk.errors import UserError
from ropewalk.files import only_writer
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import train
from ropewalk.training.hooks import Step
from ropewalk.training.watchdog import Clocks, Heartbeat, Watchdog

ELSEWHERE = "another-node"


def step(watchdog, number, seconds):
    watchdog.before_step(number)
    time.sleep(seconds)
    watchdog.after_step(Step(number, number - 1, 1, 1e-3, 1.0, 1.0))


def watchdog_of(run_dir, rank=0, world_size=1, **guards):
    return Watchdog(run_dir, rank, world_size, GuardConfig(**guards))


def test_a_late_step_is_reported_with_its_place(tmp_path, capsys):
    with watchdog_of(tmp_path, stuck_multiple=5, stuck_seconds=0.2) as watchdog:
        for number in range(1, 6):
            step(watchdog, number, 0.01)
        step(watchdog, 6, 3.0)
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 1
    place = r"rank 0 is in step \(.*test_watchdog.py:\d+\)"
    assert re.search(rf"watchdog: step 6 has taken \S+ s, the median is 0.0\d s: {place}", told)
    assert [path.name for path in (tmp_path / "stuck").iterdir()] == ["step-00000006"]
    stacks = (tmp_path / "stuck" / "step-00000006" / "rank_00000.txt").read_text()
    watched, all_threads = stacks.split("\n\n", 2)[1:]
    assert "test_a_late_step_is_reported_with_its_place" in watched
    assert "test_a_late_step_is_reported_with_its_place" in all_threads
    assert " in _watch\n" in all_threads
    assert " in _watch\n" not in watched
    assert not (tmp_path / "heartbeats").exists()


def test_steps_in_time_and_saves_between_steps_are_left_alone(tmp_path):
    with watchdog_of(tmp_path, stuck_multiple=1000, stuck_seconds=0.2) as watchdog:
        for number in range(1, 5):
            step(watchdog, number, 0.01)
        time.sleep(0.5)
    assert not (tmp_path / "stuck").exists()


def test_the_limit_is_a_multiple_of_the_median_and_at_least_so_long(tmp_path):
    watchdog = watchdog_of(tmp_path, stuck_multiple=10, stuck_seconds=60)
    watchdog._seconds.extend([2.0, 9.0])
    assert watchdog.limit is None
    watchdog._seconds.append(7.0)
    assert watchdog.limit == 70.0
    watchdog._seconds.extend([1.0, 1.0, 1.0])
    assert watchdog.limit == 60.0


def test_a_step_is_late_by_its_own_time_or_a_micro_batch_of_it(tmp_path):
    watchdog = watchdog_of(tmp_path, stuck_multiple=10, stuck_seconds=60, stuck_batch_seconds=480)
    assert watchdog.lateness(Clocks(1, since=0.0, batch_since=900.0), at=1380.0) is None  # many batches, no median
    late = "step 1 has taken 1381.0 s, one micro batch 481.0 s of it"
    assert watchdog.lateness(Clocks(1, 0.0, 900.0), 1381.0) == late
    watchdog._seconds.extend([200.0] * 3)
    assert watchdog.lateness(Clocks(4, 0.0, 100.0), 581.0) == "step 4 has taken 581.0 s, one micro batch 481.0 s of it"
    assert watchdog.lateness(Clocks(4, 0.0, 1900.0), 2000.0) is None
    assert watchdog.lateness(Clocks(4, 0.0, 1900.0), 2001.0) == "step 4 has taken 2001.0 s, the median is 200.00 s"
    assert watchdog.lateness(Clocks(4), 9999.0) is None  # between two steps


def test_the_lowest_that_is_late_and_alive_reports(tmp_path, capsys):
    """Of three ranks in one process rank 0 is between steps, and 1 and 2 are late: 1 speaks, once."""
    guards = {"stuck_seconds": 0.2, "stuck_batch_seconds": 0.2}
    with ExitStack() as stack:
        watchdogs = [stack.enter_context(watchdog_of(tmp_path, rank, 3, **guards)) for rank in range(3)]
        for watchdog in watchdogs[1:]:
            watchdog.before_step(1)
        time.sleep(3.5)
    told = capsys.readouterr().out
    assert told.count("watchdog: step 1 has taken") == 1
    assert re.search(r"one micro batch \S+ s of it: rank 0, 1, 2 is in test_the_lowest_that_is", told)


def test_ranks_are_told_by_place_and_the_fewest_first(tmp_path):
    def heard(place):
        return Heartbeat(4, 7, False, place, "node3", 4)

    places = ["waits in barrier", "is in a (x.py:1)", "is in a (x.py:1)", "is in b (y.py:2)", "waits in all_reduce"]
    told = watchdog_of(tmp_path, world_size=7)._describe([*map(heard, places), heard("is in c (z.py:3)"), None], [5])
    assert told == (
        "rank 3 is in b (y.py:2); rank 5 says nothing: stopped or dead (process 4 on node3; when last heard it is in c "
        "(z.py:3), step 7); rank 6 says nothing: stopped or dead; rank 1, 2 is in a (x.py:1); "
        "2 of 7 ranks wait in collectives"
    )


def test_a_heartbeat_that_cannot_be_written_is_told_once(tmp_path, capsys):
    (tmp_path / "heartbeats").write_text("in the way")
    with watchdog_of(tmp_path, stuck_seconds=0.2, stuck_batch_seconds=0.2) as watchdog:
        step(watchdog, 1, 3.0)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("watchdog: rank 0 could not write its heartbeat ([Errno ")
    assert [line.partition(":")[0] for line in told] == ["watchdog", "watchdog"]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_the_rank_that_is_stopped_is_named_and_the_run_goes_on(store_64, tmp_path, stopped):
    """By the other one, also where it is rank 0; where it was when last heard is told, and its stack is kept."""
    more = ["trainer.max_steps=400", "trainer.checkpoint_every=400", "guards.stuck_seconds=0.4"]
    other = 1 - stopped
    with start_ranks(2, tmp_path / "logs", tiny_arguments(store_64, tmp_path, *more)) as ranks:
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) >= 5)
        ranks.send(signal.SIGSTOP, stopped)
        ranks.wait_for(lambda: "watchdog: step" in ranks.output(other), seconds=30)
        ranks.send(signal.SIGCONT, stopped)
        rows = len(read_metrics(tmp_path))
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) > rows + 2)
        told, pid = ranks.output(other), ranks.processes[stopped].pid
    found = re.search(
        r"watchdog: step (\d+) has taken \S+ s, the median is \S+ s: "
        rf"rank {stopped} says nothing: stopped or dead \(process {pid} on \S+; when last heard it .+, step (\d+)\); "
        r"1 of 2 ranks wait in collectives; stacks in (\S+)",
        told,
    )
    assert found is not None, told
    assert 0 <= int(found.group(1)) - int(found.group(2)) < 20
    stacks = (Path(found.group(3)) / f"rank_{stopped:05d}.txt").read_text()
    assert "most recent call first" in stacks
    assert "in train" in stacks


@pytest.mark.slow
def test_the_rank_that_computes_too_long_is_named(store_64, tmp_path):
    more = ["trainer.max_steps=30", "trainer.checkpoint_every=30", "guards.stuck_seconds=0.4"]
    arguments = tiny_arguments(store_64, tmp_path, *more)
    with start_ranks(2, tmp_path / "logs", arguments, fault="sleep_in_forward_forty") as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        told = ranks.output(0)
    found = re.search(r"watchdog: step (\d+) has .*: rank 1 is in sleep \(.*faults.py:\d+\); 1 of 2 ranks wait", told)
    assert found is not None, told
    assert found.group(1) == "20"  # two micro batches a step


@pytest.mark.slow
def test_a_rank_that_is_stuck_in_the_first_step_is_named(store_64, tmp_path):
    more = ["trainer.max_steps=3", "guards.stuck_seconds=0.4", "guards.stuck_batch_seconds=2"]
    arguments = tiny_arguments(store_64, tmp_path, *more)
    with start_ranks(2, tmp_path / "logs", arguments, fault="sleep_in_forward_one") as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        told = ranks.output(0)
    assert re.search(
        r"watchdog: step 1 has taken \S+ s, one micro batch \S+ s of it: rank 1 is in sleep \(.*faults.py:\d+\); "
        r"1 of 2 ranks wait in collectives",
        told,
    ), told


def test_limits_that_make_no_sense_are_refused(store_64, tmp_path):
    with pytest.raises(ValueError, match="must exceed 1"):
        train(tiny_run(store_64, tmp_path, "guards.stuck_multiple=1"))


def test_a_run_directory_that_another_process_holds_is_refused_before_there_is_a_model(store_64, tmp_path):
    with (
        only_writer(tmp_path, "another"),
        pytest.raises(UserError, match=rf"run_dir={tmp_path} is being written by process {os.getpid()} on .*; wait"),
    ):
        train(tiny_run(store_64, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_requeued_run_takes_over_from_a_process_that_is_gone(store_64, tmp_path, capsys):
    """It asks for no manual delete; what else a dead owner may leave, see tests/test_files.py."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = {"host": socket.gethostname(), "pid": ended.pid, "started": "1", "id": "x"}
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    train(tiny_run(store_64, tmp_path, "trainer.stop_after=1"))
    line = (
        f"run_dir={tmp_path}: process {ended.pid} on {socket.gethostname()}, which was writing it, is gone; its work is"
    )
    assert capsys.readouterr().out.count(line) == 1
    assert not (tmp_path / "owner.json").exists()


@pytest.mark.slow
def test_a_run_is_written_by_one_training_at_a_time(store_64, tmp_path):
    """The second ends with 2 and has written nothing; the first goes on. Killed, it is followed by the next at once."""
    arguments = tiny_arguments(store_64, tmp_path, "trainer.max_steps=100000", "trainer.checkpoint_every=5")
    with start_ranks(1, tmp_path / "logs", arguments) as first:
        first.wait_for(lambda: len(read_metrics(tmp_path)) >= 2)
        with start_ranks(1, tmp_path / "second", arguments) as second:
            assert second.wait() == [2]
            pid = first.processes[0].pid
            assert f"run_dir={tmp_path} is being written by process {pid} on {socket.gethostname()}" in second.output()
        before = len(read_metrics(tmp_path))
        first.wait_for(lambda: len(read_metrics(tmp_path)) > before)
        first.send(signal.SIGKILL)
        first.wait()
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == pid
    run_ranks(1, tmp_path / "logs", [*arguments, "trainer.stop_after=1"])

"""A step that takes too long is reported once, with the rank that is stuck and where."""

import re
import signal
import time

import pytest
from helpers import tiny_run
from ranks import start_ranks, tiny_arguments

from ropewalk.training import train
from ropewalk.training.record import read_metrics
from ropewalk.training.watchdog import Watchdog


def step(watchdog, number, seconds):
    watchdog.step_begins(number)
    time.sleep(seconds)
    watchdog.step_ends()


def test_a_late_step_is_reported_with_its_place(tmp_path, capsys):
    with Watchdog(tmp_path, rank=0, world_size=1, multiple=5, at_least=0.2) as watchdog:
        for number in range(1, 6):
            step(watchdog, number, 0.01)
        step(watchdog, 6, 3.0)
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 1
    assert re.search(r"watchdog: step 6 has taken \S+ s, .*: rank 0 is in step \(.*test_watchdog.py:\d+\)", told)
    assert [path.name for path in (tmp_path / "stuck").iterdir()] == ["step-00000006"]
    stacks = (tmp_path / "stuck" / "step-00000006" / "rank_00000.txt").read_text()
    assert "test_a_late_step_is_reported_with_its_place" in stacks


def test_steps_in_time_and_saves_between_steps_are_left_alone(tmp_path):
    with Watchdog(tmp_path, rank=0, world_size=1, multiple=1000, at_least=0.2) as watchdog:
        for number in range(1, 5):
            step(watchdog, number, 0.01)
        time.sleep(0.5)
    assert not (tmp_path / "stuck").exists()


def test_the_limit_is_a_multiple_of_the_median_and_at_least_so_long(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, multiple=10, at_least=60)
    watchdog._seconds.extend([2.0, 9.0])
    assert watchdog.limit is None
    watchdog._seconds.append(7.0)
    assert watchdog.limit == 70.0
    watchdog._seconds.extend([1.0, 1.0, 1.0])
    assert watchdog.limit == 60.0


@pytest.mark.slow
def test_the_rank_that_is_stopped_is_named_and_the_run_goes_on(store_64, tmp_path):
    more = ["trainer.max_steps=400", "trainer.checkpoint_every=400", "guards.stuck_seconds=0.4"]
    with start_ranks(2, tmp_path / "logs", tiny_arguments(store_64, tmp_path, *more)) as ranks:
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) >= 5)
        ranks.send(signal.SIGSTOP, 1)
        ranks.wait_for(lambda: "watchdog" in ranks.output(0), seconds=30)
        ranks.send(signal.SIGCONT, 1)
        rows = len(read_metrics(tmp_path))
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) > rows + 2)
        told = ranks.output(0)
    assert re.search(r"watchdog: step \d+ has taken .*rank 1 says nothing: stopped or dead; 1 of 2 ranks wait", told)


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


def test_limits_that_make_no_sense_are_refused(store_64, tmp_path):
    with pytest.raises(ValueError, match="must exceed 1"):
        train(tiny_run(store_64, tmp_path, "guards.stuck_multiple=1"))

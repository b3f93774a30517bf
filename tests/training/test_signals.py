"""Real two-rank runs that are told to leave: saved, the documented exit code, and the same losses when they go on."""

import signal
import threading
import time

import pytest
from helpers import tiny_run
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.runs.launch import EXIT_REQUEUE, hold_warnings
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, train, verify_checkpoint
from ropewalk.training.hooks import BURST, StopFlag

STEPS = 12  # of four micro batches a rank
SIZE = [
    "trainer.max_steps=12",
    "trainer.checkpoint_every=5",
    "trainer.global_batch_size=8",
]


def losses(run_dir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def straight(store_64, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    run_ranks(2, run_dir / "logs", tiny_arguments(store_64, run_dir, *SIZE))
    assert len(losses(run_dir)) == STEPS
    return losses(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, (0, 1)), (signal.SIGUSR1, (1,))])
def test_a_signal_saves_and_asks_for_a_requeue(store_64, tmp_path, straight, number, told):
    """Also where one rank alone has been told: the others agree."""
    arguments = tiny_arguments(store_64, tmp_path, *SIZE)
    with start_ranks(2, tmp_path / "logs", arguments) as ranks:
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) >= 3)
        ranks.send(number, *told)
        assert ranks.wait() == [EXIT_REQUEUE] * 2, ranks.output()
    saved = verify_checkpoint(find_checkpoint(tmp_path))["step"]
    assert 3 <= saved < STEPS
    assert f"{number.name}: step {saved} is saved; leaving with exit code 75" in ranks.output(0)
    run_ranks(2, tmp_path / "logs", arguments)
    assert losses(tmp_path) == straight


@pytest.mark.slow
def test_the_end_that_was_announced_leaves_time_to_save(store_64, tmp_path):
    """A warning, and later two SIGTERMs at once, as SLURM ends a job whose ranks are slow to save."""
    arguments = tiny_arguments(store_64, tmp_path, *SIZE, "trainer.max_steps=100000")
    with start_ranks(2, tmp_path / "logs", arguments) as ranks:
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) >= 2)
        ranks.send(signal.SIGSTOP, 1)  # and the agreement waits
        ranks.send(signal.SIGUSR1, 0)
        time.sleep(2 * BURST)
        for _ in range(2):
            ranks.send(signal.SIGTERM, 0, 1)
            time.sleep(0.02)
        ranks.send(signal.SIGCONT, 1)
        assert ranks.wait() == [EXIT_REQUEUE] * 2, ranks.output()
    assert verify_checkpoint(find_checkpoint(tmp_path))["step"] >= 2


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(store_64, tmp_path):
    """The other rank is stopped, so the first signal's agreement never comes about; the second needs none."""
    arguments = tiny_arguments(store_64, tmp_path, *SIZE, "trainer.max_steps=100000")
    with start_ranks(2, tmp_path / "logs", arguments) as ranks:
        ranks.wait_for(lambda: len(read_metrics(tmp_path)) >= 2)
        ranks.send(signal.SIGSTOP, 1)
        ranks.send(signal.SIGUSR1, 0)
        time.sleep(2 * BURST)
        assert ranks.processes[0].is_alive()
        ranks.send(signal.SIGUSR1, 0)
        ranks.processes[0].join(20)
        assert ranks.processes[0].exitcode == 128 + signal.SIGUSR1


def test_the_time_limit_leaves_before_the_next_step_would_pass_it(store_64, tmp_path, monkeypatch):
    """An hour is left, and it is over once three steps are recorded."""
    real = time.time
    config = tiny_run(store_64, tmp_path, "trainer.max_steps=100000", "trainer.checkpoint_every=1000",
                      f"trainer.stop_before={real() + 3600}")  # fmt: skip
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * (len(read_metrics(tmp_path)) >= 3))
    with pytest.raises(SystemExit) as left:
        train(config)
    assert left.value.code == EXIT_REQUEUE
    assert verify_checkpoint(find_checkpoint(tmp_path))["step"] == len(read_metrics(tmp_path)) == 3
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # an exiting process ignores them; pytest lives on


def test_the_margin_is_the_longest_gap_between_boundaries(monkeypatch):
    flag = StopFlag(stop_before=100.0)
    due = []
    for now in (10, 12, 30, 40, 81, 82):  # 18 is the longest gap until 41 takes its place
        monkeypatch.setattr(time, "time", lambda now=now: now)
        due.append(bool(flag._out_of_time()))
    assert due == [False, False, False, False, True, True]


def _wait_for(happened, seconds=10):
    """A thread of the flag reads the signals."""
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.01)


def test_a_signal_that_came_before_is_not_lost():
    """cluster/slurm/rank.py holds warnings back from its first moment; the flag takes them when it is there."""
    hold_warnings()
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # a rank holds it in all its threads, pytest in this one
    with StopFlag(None) as flag:
        _wait_for(lambda: flag.received)
        assert flag.received == signal.SIGUSR1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_each_signal_is_taken_and_its_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopFlag(None) as flag:
        signal.raise_signal(number)
        _wait_for(lambda: flag.received)
        assert flag.received == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("value", "message"), [
    ("2001-01-01T00:00:00", "has passed already"), ("soon", "is not a time; give seconds since 1970"),
])  # fmt: skip
def test_a_limit_that_makes_no_sense_is_refused(store_64, tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(store_64, tmp_path, f"trainer.stop_before={value}"))

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import pytest

from ropewalk.data.prepare.pipeline import Processes
from ropewalk.files import _started


def work(directory, number):
    """The first finds no disk; the others say that they have begun."""
    if number == 0:
        raise OSError("no space left on device")
    (directory / str(number)).touch()
    time.sleep(0.1)  # so that the fault is met before one process has done them all


@pytest.mark.parametrize("cut", ["fault", "caller"])
def test_what_has_not_begun_is_left(tmp_path, cut):
    """Where a work fails with anything, and where the caller stops: few works are begun ahead."""
    first = 0 if cut == "fault" else 1
    with Processes(2) as processes:
        results = processes.each(work, [(tmp_path, number) for number in range(first, first + 300)])
        if cut == "fault":
            with pytest.raises(OSError, match="no space left on device"):
                list(results)
        else:
            next(results)
            results.close()
    assert len(list(tmp_path.iterdir())) < 250


def report(directory, number):
    """Say which process did it, once each has had time to begin."""
    (directory / str(number)).touch()
    time.sleep(0.2)
    return number, os.getpid()


def test_every_work_is_done_once_by_as_many_processes(tmp_path):
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    with Processes(3) as processes:
        processes.start(30, report, tmp_path, "begun")
        done = list(processes.each(report, [(tmp_path, number) for number in range(30)]))
    assert sorted(place for place, _ in done) == list(range(30))
    assert all(place == number for place, (number, _) in done)
    processes = {process for _, (_, process) in done}
    assert os.getpid() not in processes
    assert 1 < len(processes) <= 3
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def killed_elsewhere(parent):
    """End any process but the one that asks for it, as a machine without memory would."""
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)


def test_a_lost_process_is_told_of(tmp_path):
    """Not waited for: the work that it held is not done."""
    with Processes(2) as processes, pytest.raises(BrokenProcessPool):
        list(processes.each(killed_elsewhere, [(os.getpid(),)] * 100))


def test_a_process_that_cannot_be_started_is_told_of(tmp_path, monkeypatch):
    """As where a machine lets a user have no more of them; nobody waits for what it has taken."""

    def refused(self):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", refused)
    with Processes(2) as processes, pytest.raises(BlockingIOError, match="temporarily unavailable"):
        list(processes.each(report, [(tmp_path, number) for number in range(10)]))


def test_few_works_do_not_limit_the_next(tmp_path):
    with Processes(4) as processes:
        list(processes.each(report, [(tmp_path, number) for number in range(2)]))
        done = list(processes.each(report, [(tmp_path, number) for number in range(60)]))
    assert len({process for _, (_, process) in done}) > 2


def test_no_more_processes_are_started_than_there_is_work_for(tmp_path):
    with Processes(40) as processes:
        processes.start(3, report, tmp_path, "begun")
        assert len(processes._pool._processes) == 3


def test_ctrl_c_does_not_wait_for_a_shard_that_is_being_worked_on():
    processes = Processes(2)
    processes.start(2, time.sleep, 15)
    workers = list(processes._pool._processes.values())
    with pytest.raises(KeyboardInterrupt), processes:
        raise KeyboardInterrupt
    assert [worker.exitcode for worker in workers] == [-signal.SIGTERM] * 2


KILLED = """
import os, signal, sys, time
from ropewalk.data.prepare.pipeline import Processes
if __name__ == "__main__":
    processes = Processes(2)
    list(processes.each(os.getpid, [(), ()]))
    print(*(worker.pid for worker in processes._pool._processes.values()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    workers = {int(word) for word in done.stdout.split()}
    assert workers
    for _ in range(150):
        workers = {worker for worker in workers if _started(worker) is not None}
        if not workers:
            break
        time.sleep(0.1)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert not workers

"""A dashboard's failures and a job's signals cost a run nothing."""

import subprocess
import sys

import pytest

from ropewalk.training.tracker import ForgivingTracker

ROW = {"step": 1, "tokens": 64, "loss": 2.0}


class Broken:
    run_id = "abc"
    calls = 0

    def log(self, metrics):
        self.calls += 1
        raise ConnectionError("service went away")

    def finish(self):
        self.calls += 1
        raise ConnectionError("service went away")


def test_a_tracker_that_fails_is_told_once(capsys):
    broken = Broken()
    tracker = ForgivingTracker(broken)
    assert tracker.run_id == "abc"
    tracker.log(ROW)
    tracker.log(ROW)
    tracker.finish()
    assert broken.calls == 1
    assert capsys.readouterr().out == "warning: the tracker failed (service went away); metrics.jsonl goes on\n"


LEAVING = """
import os, signal, sys, time
from pathlib import Path
from ropewalk.config import TrackerConfig
from ropewalk.training.tracker import open_tracker

def parent(entry):
    return int(entry.read_text().rpartition(")")[2].split()[1])

tracker = open_tracker(TrackerConfig(name="wandb"), "run", Path(sys.argv[1]), {}, None)
services = [int(one.parent.name) for one in Path("/proc").glob("[0-9]*/stat") if parent(one) == os.getpid()]
for service in services:
    os.kill(service, signal.SIGTERM)
time.sleep(1)
tracker.log({"step": 1, "tokens": 64, "loss": 2.0})
tracker.finish()
print(len(services), "services", tracker.failed, flush=True)
raise SystemExit(75)
"""


@pytest.mark.slow
def test_a_run_leaves_in_order_after_wandbs_service_is_gone(tmp_path):
    """As SLURM does it: SIGTERM to every process of a task, W&B's service among them."""
    done = subprocess.run([sys.executable, "-c", LEAVING, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "warning: the tracker failed" in done.stdout, done.stderr[-2000:]
    assert done.stdout.endswith("1 services True\n")
    assert done.returncode == 75

"""One run in W&B however often it was requeued, its axis the tokens; read back with W&B's own inspector."""

import json
import subprocess
import sys

import pytest
from helpers import tiny_run

from ropewalk.config import TrackerConfig
from ropewalk.training import find_checkpoint, train
from ropewalk.training.record import read_metrics
from ropewalk.training.tracker import NoTracker, open_tracker


def records(run_dir):
    """The records of every offline session, oldest first, as W&B's own reader prints them."""
    sessions = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sessions.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    return sessions


@pytest.mark.parametrize("lost", [False, True])
def test_a_requeued_run_is_one_wandb_run(store_64, tmp_path, lost):
    """Also where the run directory's note of it is lost: the checkpoint has it, too."""
    more = ["tracker=wandb", "tracker.group=arms", "tracker.tags=[cope]"]
    train(tiny_run(store_64, tmp_path, *more, "trainer.stop_after=2"))
    note = tmp_path / "tracker.json"
    if lost:
        note.unlink()
    train(tiny_run(store_64, tmp_path, *more))
    run_id = json.loads(note.read_text())["wandb_id"]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    manifest = json.loads((find_checkpoint(tmp_path) / "manifest.json").read_text())
    assert manifest["state"]["tracker_id"] == run_id
    if lost:
        return
    steps = [rows_of(session) for session in records(tmp_path)]
    assert [[row["_step"] for row in rows] for rows in steps] == [[1, 2], [3, 4]]
    rows = [row for session in steps for row in session]
    assert [row["train/loss"] for row in rows] == [row["loss"] for row in read_metrics(tmp_path)]
    assert [row["tokens"] for row in rows] == [256, 512, 768, 1024]


def rows_of(session):
    """The logged rows among a session's records, as {key: value}."""
    return [record["history"]["item"] for record in session if record["type"] == "history"]


def test_none_is_nothing(tmp_path):
    tracker = open_tracker(TrackerConfig(name="none"), "run", tmp_path, {}, None)
    assert isinstance(tracker, NoTracker)
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []

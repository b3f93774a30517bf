"""A requeued run is one run in W&B; a dashboard's failures and a job's signals cost a run nothing."""

import json
import secrets
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from helpers import alone_environment, tiny_run
from wandb_server import wandb_server

from ropewalk.config.train import TrackerConfig
from ropewalk.errors import UserError
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, train
from ropewalk.training.tracker import (
    REACHABLE_WITHIN,
    ForgivingTracker,
    NoTracker,
    check_tracker,
    open_tracker,
    wandb_mode,
)


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
    assert [[row["_step"] for row in rows] for rows in steps] == [[0, 1], [0, 1]]
    rows = [row for session in steps for row in session]
    assert [row["train/loss"] for row in rows] == [row["loss"] for row in read_metrics(tmp_path)]
    assert [row["tokens"] for row in rows] == [256, 512, 768, 1024]


def test_no_row_is_lost_where_a_run_goes_on_from_an_earlier_step(store_64, tmp_path):
    """Killed after step 3, on from the checkpoint of step 2: both offline sessions have their rows, over tokens, and
    what W&B's own `sync` uploads to a server that resumes the run is all of them, in order.
    """
    train(tiny_run(store_64, tmp_path, "tracker=wandb", "trainer.stop_after=3"))
    (RunDirectory(tmp_path).checkpoint(3) / "manifest.json").unlink()
    train(tiny_run(store_64, tmp_path, "tracker=wandb"))
    sessions = records(tmp_path)
    assert [[row["tokens"] for row in rows_of(session)] for session in sessions] == [[256, 512, 768], [768, 1024]]
    for session in sessions:
        globs = [record["metric"] for record in session if "glob_name" in record.get("metric", {})]
        assert {one["glob_name"]: one["step_metric"] for one in globs} == {"train/*": "tokens", "eval/*": "tokens"}
    with wandb_server() as server:
        command = [
            sys.executable,
            "-m",
            "wandb",
            "sync",
            "--yes",
            *sorted(map(str, tmp_path.glob("wandb/offline-run-*"))),
        ]
        environment = alone_environment() | server.environment()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    assert [(row["_step"], row["tokens"]) for row in server.history] == [
        (0, 256), (1, 512), (2, 768), (3, 768), (4, 1024)
    ]  # fmt: skip
    rows = {row["tokens"]: row["loss"] for row in read_metrics(tmp_path)}
    assert [row["train/loss"] for row in server.history] == [rows[row["tokens"]] for row in server.history]


ONLINE = """
import sys
from pathlib import Path
from ropewalk.config.train import TrackerConfig
from ropewalk.training.tracker import open_tracker

first, last = map(int, sys.argv[2:])
tracker = open_tracker(TrackerConfig(name="wandb"), "run", Path(sys.argv[1]), {}, None)
for step in range(first, last + 1):
    tracker.log({"step": step, "tokens": step * 64, "loss": 1.0 / step})
tracker.log({"step": last, "tokens": last * 64, "loss/64": 3.0}, group="eval")
tracker.finish()
"""


@pytest.mark.slow
def test_no_row_is_lost_online(tmp_path):
    """Steps 3 and 4 are taken again by a second session, after the evaluation of step 4 was logged."""
    with wandb_server() as server:
        for steps in (("1", "4"), ("3", "5")):
            done = subprocess.run(
                [sys.executable, "-c", ONLINE, str(tmp_path), *steps],
                capture_output=True, text=True, check=False, env=alone_environment() | server.environment(),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stdout.lower() + done.stderr.lower()
    assert [row["_step"] for row in server.history] == list(range(9))
    assert [row["tokens"] for row in server.history] == [64, 128, 192, 256, 256, 192, 256, 320, 320]
    assert [row.get("train/loss") for row in server.history] == [
        1,
        1 / 2,
        1 / 3,
        1 / 4,
        None,
        1 / 3,
        1 / 4,
        1 / 5,
        None,
    ]
    assert [row.get("eval/loss/64") for row in server.history if "eval/loss/64" in row] == [3, 3]


def rows_of(session):
    """The logged rows among a session's records, as {key: value}."""
    return [record["history"]["item"] for record in session if record["type"] == "history"]


def test_none_is_nothing(tmp_path):
    tracker = open_tracker(TrackerConfig(name="none"), "run", tmp_path, {}, None)
    assert isinstance(tracker, NoTracker)
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


ROW = {"step": 1, "tokens": 64, "loss": 2.0}


class Broken:
    place = "nowhere"
    run_id = "abc"
    calls = 0

    def log(self, metrics, group="train"):
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
from ropewalk.config.train import TrackerConfig
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
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path)],
        capture_output=True, text=True, check=False, env=alone_environment(),
    )  # fmt: skip
    assert "warning: the tracker failed" in done.stdout, done.stderr[-2000:]
    assert done.stdout.endswith("1 services True\n")
    assert done.returncode == 75


def test_a_tracker_that_cannot_start_costs_nothing_and_keeps_its_run(tmp_path, monkeypatch, capsys):
    def unreachable(**settings):
        raise ConnectionError("no network on this node")

    monkeypatch.setattr("wandb.init", unreachable)
    tracker = open_tracker(TrackerConfig(name="wandb"), "run", tmp_path, {}, "abc")
    assert isinstance(tracker, NoTracker)
    assert tracker.run_id == "abc"
    assert "the tracker could not start (no network on this node)" in capsys.readouterr().out


def test_a_key_on_the_command_line_reaches_no_tracker(store_64, tmp_path, monkeypatch):
    """W&B keeps the command line; a run of it is uploaded."""
    import wandb

    wandb.teardown()  # it reads the command line once a process
    key = f"a1{secrets.token_hex(16)}"
    monkeypatch.setattr(sys, "argv", ["train.py", f"+cluster.slurm.environment.WANDB_API_KEY={key}", "plain_word=kept"])
    train(tiny_run(store_64, tmp_path, "tracker=wandb", "trainer.max_steps=1"))
    assert sys.argv[1].endswith(key)  # the run itself needs it
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"plain_word=kept" in written
    assert key.encode() not in written


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.urls.append(self.path)
        self.send_error(404)

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    """A server on this machine that knows no page; ``urls`` are those that it was asked for."""
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.urls = []
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def with_key(monkeypatch):
    """``with_key(url)``: a key, and W&B's server at a URL; nothing else of the environment's."""

    def set_variables(url):
        import wandb

        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        for name in ("WANDB_MODE", "http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        wandb.teardown()  # it keeps the settings of its first use

    yield set_variables
    import wandb

    wandb.teardown()


def test_a_server_that_answers_is_used(server, with_key):
    """Whatever it answers, at WANDB_BASE_URL."""
    with_key(f"http://127.0.0.1:{server.server_port}")
    assert wandb_mode() is None
    assert len(server.urls) == 1


def test_without_a_network_wandb_writes_offline_at_once(with_key, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with_key(url)
        start = time.monotonic()
        assert wandb_mode() == "offline"
        assert time.monotonic() - start < REACHABLE_WITHIN + 2
    assert capsys.readouterr().out == f"warning: {url} does not answer in 5 s, so W&B writes offline\n"


def test_the_way_to_the_server_may_be_a_proxy(server, with_key, monkeypatch):
    with_key("http://wandb.invalid")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    assert wandb_mode() is None
    assert server.urls == ["http://wandb.invalid"]


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"tracker=trackio needs .*; pip install 'ropewalk\[trackio\]', or set"):
        check_tracker(TrackerConfig(name="trackio"))
    check_tracker(TrackerConfig(name="none"))


def test_a_note_of_the_run_that_is_empty_costs_nothing(tmp_path, monkeypatch, capsys):
    """A crash has left tracker.json without its content; the checkpoint has the id, too."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    RunDirectory(tmp_path).tracker.touch()
    tracker = open_tracker(TrackerConfig(name="wandb"), "run", tmp_path, {}, "abcd1234")
    tracker.finish()
    assert tracker.run_id == "abcd1234"
    assert json.loads(RunDirectory(tmp_path).tracker.read_text()) == {"wandb_id": "abcd1234"}
    assert f"warning: {tmp_path}/tracker.json is not what was written" in capsys.readouterr().out
    assert (
        tracker.place == f"W&B offline, in {tmp_path}/wandb; upload it with: wandb sync {tmp_path}/wandb/offline-run-*"
    )

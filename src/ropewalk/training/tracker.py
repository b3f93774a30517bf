"""Trackers: metrics to a dashboard, beside the run's own metrics.jsonl, which is always written."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Protocol
from urllib.error import HTTPError
from urllib.request import Request, build_opener

from ropewalk.config.train import TrackerConfig
from ropewalk.errors import UserError
from ropewalk.files import write_atomically
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.record import recorded_arguments
from ropewalk.training.distributed import log

REACHABLE_WITHIN = 5.0  # seconds


class Tracker(Protocol):
    """A dashboard that takes rows of metrics."""

    run_id: str | None  # by which a resumed run goes on in the same one
    place: str  # where one looks at it

    def log(self, metrics: dict[str, Any], group: str = "train") -> None:
        """One row, its keys put under ``group``; "step" and "tokens" are among them."""

    def finish(self) -> None:
        """Flush and close."""


class NoTracker:
    """No dashboard: metrics.jsonl alone."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id  # kept for a session that can track again
        self.place = "none"

    def log(self, metrics: dict[str, Any], group: str = "train") -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WandbTracker:
    """Weights & Biases; without an API key offline, into the run directory.

    The run's id is kept in tracker.json and in every checkpoint, so that a resumed run goes on in the same W&B run.
    """

    def __init__(
        self, config: TrackerConfig, run_name: str, run_dir: Path, details: dict[str, Any], saved_id: str | None
    ) -> None:
        import wandb

        stored = RunDirectory(run_dir).tracker
        self.run_id: str | None = _stored_id(stored) or saved_id or secrets.token_hex(4)
        write_atomically(stored, json.dumps({"wandb_id": self.run_id}) + "\n")
        self.run = wandb.init(
            project=config.project,
            name=run_name,
            group=config.group,
            tags=config.tags,
            id=self.run_id,
            resume="allow",
            dir=run_dir,
            config=details,
            mode=wandb_mode(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        offline = f"offline, in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/offline-run-*"
        self.place = f"W&B {self.run.url or offline}"
        self.run.define_metric("tokens")
        for group in ("train/*", "eval/*"):
            self.run.define_metric(group, step_metric="tokens")

    def log(self, metrics: dict[str, Any], group: str = "train") -> None:
        """Log a row; the axis of every metric is the token count.

        W&B counts rows by itself: under a step of ours it drops the rows of steps that it has seen before, which are
        those that a run killed after its last checkpoint takes again.
        """
        self.run.log(_named(metrics, group))

    def finish(self) -> None:
        """Close the run."""
        self.run.finish()


class TrackioTracker:
    """trackio, into its own local database (TRACKIO_DIR); a resumed run goes on in the run of the same name."""

    def __init__(self, config: TrackerConfig, run_name: str, details: dict[str, Any]) -> None:
        import trackio

        self.run_id: str | None = run_name
        directory = os.environ.get("TRACKIO_DIR", "~/.cache/huggingface/trackio")
        self.place = f"trackio, in {directory}; look at it with: trackio show --project {config.project}"
        self.run = trackio.init(
            config.project,
            name=run_name,
            group=config.group,
            config={**details, "tags": config.tags},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: dict[str, Any], group: str = "train") -> None:
        """Log a row at its step; trackio has no axis of its own choice, so "tokens" is a metric."""
        self.run.log(_named(metrics, group), step=metrics["step"])

    def finish(self) -> None:
        """Flush and close the run."""
        self.run.finish()


class ForgivingTracker:
    """A tracker whose failures are one warning and never end the run: metrics.jsonl has every row all the same.

    SLURM sends SIGTERM to every process of a task, and W&B's service is one; the ranks have to save and leave after it.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.run_id, self.place, self.failed = tracker, tracker.run_id, tracker.place, False

    def log(self, metrics: dict[str, Any], group: str = "train") -> None:
        """Log a row, or nothing after a failure."""
        self._attempt(lambda: self.tracker.log(metrics, group))

    def finish(self) -> None:
        """Close the run, or nothing after a failure."""
        self._attempt(self.tracker.finish)

    def _attempt(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # whatever a dashboard's client raises, the training is worth more
            self.failed = True
            log(f"warning: the tracker failed ({error}); metrics.jsonl goes on")


def _named(metrics: dict[str, Any], group: str) -> dict[str, Any]:
    named = {f"{group}/{k}": v for k, v in metrics.items() if k not in ("step", "tokens") and v is not None}
    return {**named, "tokens": metrics["tokens"]}


def _stored_id(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["wandb_id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log(f"warning: {path} is not what was written ({error}); the newest checkpoint's id is taken, or a new one")
        return None


def check_tracker(config: TrackerConfig) -> None:
    """Check that the tracker's package is installed.

    Raises:
        UserError: it is not.
    """
    if config.name != "none" and find_spec(config.name) is None:
        raise UserError(
            f"tracker={config.name} needs a package that is not installed; pip install 'ropewalk[{config.name}]', or "
            "set tracker=none (metrics.jsonl is always written)"
        )


def wandb_mode() -> Literal["offline"] | None:
    """Offline without a key or a way to the server; None leaves the user's own WANDB_MODE, or online, as it is."""
    import wandb
    from wandb.sdk.lib.wbauth import read_netrc_auth

    settings = wandb.setup().settings  # WANDB_API_KEY and WANDB_MODE among them
    if settings.mode != "online":
        return None
    if not (settings.api_key or read_netrc_auth(host=settings.base_url)):
        return "offline"
    if not _answers(settings.base_url):
        log(f"warning: {settings.base_url} does not answer in {REACHABLE_WITHIN:.0f} s, so W&B writes offline")
        return "offline"
    return None


def _answers(url: str) -> bool:
    """True if a server answers, whatever it says; by the proxies of the environment. W&B itself would try for 90 s."""
    answers: list[bool] = []

    def request() -> None:
        try:
            build_opener().open(Request(url, method="HEAD"), timeout=REACHABLE_WITHIN).close()
        except HTTPError:
            pass  # an answer
        except (OSError, HTTPException, ValueError):
            return
        answers.append(True)

    thread = Thread(target=request, name="reach", daemon=True)  # a name that is not resolved has no timeout of its own
    thread.start()
    thread.join(REACHABLE_WITHIN)
    return bool(answers)


def open_tracker(
    config: TrackerConfig, run_name: str, run_dir: Path, details: dict[str, Any], saved_id: str | None
) -> Tracker:
    """The tracker that the config names; ``details`` become its config columns, ``saved_id`` is a checkpoint's."""
    arguments = list(sys.argv)
    sys.argv[1:] = recorded_arguments(arguments[1:])  # W&B keeps the command line, in which a key may stand
    try:
        if config.name == "wandb":
            return ForgivingTracker(WandbTracker(config, run_name, run_dir, details, saved_id))
        if config.name == "trackio":
            return ForgivingTracker(TrackioTracker(config, run_name, details))
    except Exception as error:  # a node without a network, say: the other ranks are waiting
        log(f"warning: the tracker could not start ({error}); metrics.jsonl goes on")
    finally:
        sys.argv[:] = arguments
    return NoTracker(saved_id)

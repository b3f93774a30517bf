"""Trackers: metrics to a dashboard, beside the run's own metrics.jsonl, which is always written."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from ropewalk.config.train import TrackerConfig
from ropewalk.files import write_atomically
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.record import recorded_arguments
from ropewalk.training.distributed import log


class Tracker(Protocol):
    """A dashboard that takes rows of metrics."""

    run_id: str | None  # by which a resumed run goes on in the same one

    def log(self, metrics: dict[str, Any], group: str = "train") -> None:
        """One row, its keys put under ``group``; "step" and "tokens" are among them."""

    def finish(self) -> None:
        """Flush and close."""


class NoTracker:
    """No dashboard: metrics.jsonl alone."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id  # kept for a session that can track again

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
        known = json.loads(stored.read_text())["wandb_id"] if stored.exists() else saved_id
        self.run_id = known or secrets.token_hex(4)
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
        self.tracker, self.run_id, self.failed = tracker, tracker.run_id, False

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


def wandb_mode() -> Literal["offline"] | None:
    """Offline without a key; None leaves the user's own WANDB_MODE, or online, as it is."""
    import wandb
    from wandb.sdk.lib.wbauth import read_netrc_auth

    settings = wandb.setup().settings  # WANDB_API_KEY and WANDB_MODE among them
    has_key = settings.api_key or read_netrc_auth(host=settings.base_url)
    return None if has_key or settings.mode != "online" else "offline"


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

"""Dashboards: ``scripts/dashboard.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ropewalk.config.groups import PathsConfig


@dataclass
class DashboardConfig:
    """``python scripts/dashboard.py``."""

    project: str = MISSING  # of W&B: tracker.project of the runs
    entity: str | None = None  # user or team; null: the account's own
    title: str = "Position methods"
    output: str = MISSING  # directory for workspace.json and report.json
    push: bool = False  # save both to W&B; --push is the same
    paths: PathsConfig = field(default_factory=PathsConfig)

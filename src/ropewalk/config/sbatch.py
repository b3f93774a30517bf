"""Submitting: ``scripts/job.py options``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ropewalk.config.cluster import ClusterConfig
from ropewalk.config.groups import PathsConfig


@dataclass
class SbatchConfig:
    """What stands for the #SBATCH lines of a training script."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int | None = None  # null: as the script says
    lead_seconds: int | None = None  # of the warning before the time limit; null: as the script says
    paths: PathsConfig = field(default_factory=PathsConfig)

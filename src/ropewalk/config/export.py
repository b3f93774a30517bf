"""Export: ``scripts/export.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ropewalk.config.groups import PathsConfig


@dataclass
class ExportConfig:
    """``python scripts/export.py``."""

    checkpoint: str = MISSING  # training checkpoint, or run directory for its newest
    output: str | None = None  # null: <run directory>/export
    dtype: str | None = None  # of the weights; null: the dtype that was trained in
    verify: bool = True
    overwrite: bool = False  # replace an earlier export
    paths: PathsConfig = field(default_factory=PathsConfig)

"""Config groups that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelPath:
    """A model that is read as it is; ``model=X`` on the command line is ``model.path=X``."""

    path: str = MISSING


@dataclass
class RopeConfig:
    """The position method: an ordered chain of spectrum transforms."""

    name: str = MISSING
    chain: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class TestTimeConfig:
    """Spectrum transforms appended for evaluation or export.

    ``original_max_position_embeddings: trained_length`` names the length that the checkpoint was trained at, and
    ``factor: length_over_trained`` is the length under evaluation divided by it.
    """

    name: str = MISSING
    within: list[dict[str, Any]] = field(default_factory=list)  # at lengths up to the trained one
    beyond: list[dict[str, Any]] = field(default_factory=list)  # at lengths past it
    at: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # at these lengths, instead of both


@dataclass
class PathsConfig:
    """Roots of what is read and written."""

    data_dir: str = "data"
    output_dir: str = "outputs"

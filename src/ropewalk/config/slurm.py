"""How jobs are submitted to a cluster: ``cluster.slurm``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SlurmConfig:
    """What a site's SLURM wants to hear; null is left to its own configuration."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # feature that nodes must have
    nodes: int = 1  # of a job of hydra/launcher=slurm
    time: str = "48:00:00"  # of a job of hydra/launcher=slurm; quoted, as YAML makes a number of 24:00:00
    cpus_per_gpu: int = 12
    gpu_request: bool = True  # false where nodes have GPUs, or none, that SLURM does not count
    scratch: str = "/tmp"  # on each node's own disk; each job makes a directory below it and removes it
    environment: dict[str, str] = field(default_factory=dict)  # exported before the ranks start: NCCL and the like

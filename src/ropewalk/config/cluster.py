"""The machines that a run is planned for and submitted to: the ``cluster`` group."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ropewalk.config.slurm import SlurmConfig


@dataclass
class ClusterConfig:
    """One kind of node. Numbers are of one GPU where the name says no more; edit them for your site."""

    name: str = MISSING
    device: str = "cuda"  # cuda, or cpu: a "GPU" is then a process, and its memory the host's
    gpus_per_node: int = MISSING
    gpu_memory_gib: float = MISSING  # that torch can allocate, as its out-of-memory message names it
    peak_tflops: float = MISSING  # dense, in the dtype that is trained in (bf16)
    nvlink_gb_s: float = MISSING  # to the other GPUs of its node, each way
    network_gb_s: float = MISSING  # to other nodes, each way, for each GPU
    host_memory_gib: float = MISSING  # of a node
    disk_write_gb_s: float = MISSING  # that a node writes to where checkpoints go
    price_per_gpu_hour: float = MISSING  # in whatever currency you count
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

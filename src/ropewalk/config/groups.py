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


@dataclass
class SlurmConfig:
    """Settings of a site's SLURM; null is left to its own configuration."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # feature that nodes must have
    nodes: int = 1  # of a job of hydra/launcher=slurm
    time: str = "48:00:00"  # of a job of hydra/launcher=slurm; quoted, as YAML makes a number of 24:00:00
    cpus_per_gpu: int = 12
    mem: str | None = None  # of a node, as sbatch takes it; null: as the script says (0: all that the node has)
    gpu_request: bool = True  # false where nodes have GPUs, or none, that SLURM does not count
    scratch: str = "/tmp"  # on each node's own disk; each job makes a directory below it and removes it
    environment: dict[str, str] = field(default_factory=dict)  # exported before the ranks start: NCCL and the like


@dataclass
class ClusterConfig:
    """One kind of node. Numbers are of one GPU where the name says no more; edit them for your site."""

    name: str = MISSING
    device: str = "cuda"  # cuda, or cpu: a "GPU" is then a process, and its memory the host's
    gpus_per_node: int = MISSING
    gpu_memory_gib: float = MISSING  # that torch can allocate, as its out-of-memory message names it
    peak_tflops: float = MISSING  # dense, in the dtype that is trained in (bf16)
    memory_tb_s: float = 3.35  # that a GPU reads and writes of its own memory; an H100's
    nvlink_gb_s: float = MISSING  # to the other GPUs of its node, each way
    network_gb_s: float = MISSING  # to other nodes, each way, for each GPU
    host_memory_gib: float = MISSING  # of a node
    disk_write_gb_s: float = MISSING  # that a node writes to where checkpoints go
    price_per_gpu_hour: float = MISSING  # in whatever currency you count
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class NeedleConfig:
    """The passkey grid."""

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # share of the context
    samples: int = 4  # prompts per cell; 0: no grid
    names: bool = True  # facts have names, keys are numbers; false: one key, a word (corpus.retrieval_names=false)
    digits: int = 5  # of the key; with names
    distractors: int = 0  # other facts in the haystack; with names


@dataclass
class AnswersConfig:
    """Questions about facts in long text, many a sequence: answer NLL with its recovery, and the order probe."""

    count: int = 0  # answers of a context length, at least, for each of the two; 0: none
    per_sequence: int = 32  # at most; fewer where they do not fit half of the length
    values: int = 3  # of a marker in the order probe, 2 or more

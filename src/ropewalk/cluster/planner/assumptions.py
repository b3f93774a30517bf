"""Rules for the machines and assumptions of a plan: a zero or a negative one makes every sum meaningless."""

from __future__ import annotations

import math

from ropewalk.config.groups import ClusterConfig
from ropewalk.config.train import AssumptionConfig, PlanConfig
from ropewalk.errors import UserError

POSITIVE_OF_CLUSTER = (
    "gpus_per_node",
    "gpu_memory_gib",
    "peak_tflops",
    "nvlink_gb_s",
    "network_gb_s",
    "host_memory_gib",
    "disk_write_gb_s",
)
NOT_NEGATIVE_OF_ASSUME = ("step_overhead", "context_gib", "nccl_gib", "fragmentation")


def check_inputs(config: PlanConfig) -> None:
    """Check what the planner alone reads; of the training itself validate_train does.

    Raises:
        UserError: naming the value, the rule and the fix.
    """
    _positive("nodes", config.nodes)
    _positive("data.sequence_length", config.data.sequence_length)
    for length in config.kv_lengths:
        _positive("kv_lengths: a length", length)
    _check_cluster(config.cluster)
    _check_assumptions(config.assume)
    device = config.cluster.device
    if config.trainer.device != device:
        raise UserError(
            f"trainer.device={config.trainer.device} on cluster={config.cluster.name}, whose device is {device}; set "
            f"trainer.device={device} or choose another cluster"
        )


def _check_cluster(cluster: ClusterConfig) -> None:
    for name in POSITIVE_OF_CLUSTER:
        _positive(f"cluster.{name}", getattr(cluster, name))
    _not_negative("cluster.price_per_gpu_hour", cluster.price_per_gpu_hour)


def _check_assumptions(assume: AssumptionConfig) -> None:
    if not 0 < assume.utilisation <= 1:
        raise UserError(f"assume.utilisation={assume.utilisation} is a share of the peak; 0.28 is usual at 64k")
    _positive("assume.hash_gb_s", assume.hash_gb_s)
    for name in NOT_NEGATIVE_OF_ASSUME:
        _not_negative(f"assume.{name}", getattr(assume, name))


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:  # nor nan
        raise UserError(f"{name}={value} must be positive and finite")


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value} must be 0 or more, and finite")

"""All checks for one training configuration, on every rank that it was started with."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ropewalk.config import TrainConfig
from ropewalk.doctor.disk import check_file_system, check_space, writable_parent
from ropewalk.doctor.findings import Finding, guarded, screen, warn
from ropewalk.doctor.machine import check_data, check_device, check_kernels, check_model
from ropewalk.doctor.network import check_all_reduce, check_clocks, check_shared, join
from ropewalk.launch import take_place
from ropewalk.model import count_parameters, training_config
from ropewalk.planner.cost import checkpoints_kept


def examine(config: TrainConfig) -> int:
    """Make every check and print one screen; returns how many things must be mended before training. Collective."""
    take_place()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = config.trainer.device == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    findings = guarded("device", lambda: check_device(config.trainer.device, config.cluster, local_rank))
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        join(device)
    findings += _of_this_rank(config, device)
    findings += _together(config, device) if together else list(_alone(device))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    of_ranks: list[tuple[str, list[Finding]]] = [(node, findings)] * (dist.get_world_size() if together else 1)
    if together:
        dist.all_gather_object(of_ranks, (node, findings))
    nodes = len({name for name, _ in of_ranks})
    text, failed = screen(f"doctor: {config.run_name}, {len(of_ranks)} ranks on {nodes} nodes", of_ranks)
    if not together or dist.get_rank() == 0:
        print(text, flush=True)
    if together:
        dist.barrier()
        dist.destroy_process_group()
    return failed


def _of_this_rank(config: TrainConfig, device: torch.device) -> list[Finding]:
    trainer = config.trainer
    run_dir = Path(config.run_dir)
    dtype = getattr(torch, trainer.dtype)
    findings = guarded("kernels", lambda: check_kernels(device, dtype, trainer.loss_chunk_size))
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return findings  # the rest is the node's, and once is enough
    findings += guarded("data", lambda: check_data(config))
    findings += guarded("file system", lambda: check_file_system(writable_parent(run_dir)))
    return findings + guarded("model", lambda: _model_and_space(config, run_dir))


def _model_and_space(config: TrainConfig, run_dir: Path) -> Iterator[Finding]:
    rope = config.rope
    model_config = training_config(config.model, rope.name, rope.chain, config.data.sequence_length)
    parameters = count_parameters(model_config)
    yield from check_model(model_config, parameters, config.model.path)
    yield from check_space(run_dir, parameters, checkpoints_kept(config.trainer))


def _together(config: TrainConfig, device: torch.device) -> list[Finding]:
    findings = guarded("all-reduce", lambda: check_all_reduce(device, config.cluster))
    findings += guarded("clock", check_clocks)
    return findings + guarded("shared", lambda: check_shared(writable_parent(Path(config.run_dir))))


def _alone(device: torch.device) -> Iterator[Finding]:
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        start = f"torchrun --nproc-per-node {torch.cuda.device_count()} scripts/doctor.py ..."
        yield warn("all-reduce", f"not measured by one process; {start}")

"""The ranks' way to each other: collectives, clocks, and files that one writes and all read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ropewalk.config import ClusterConfig
from ropewalk.doctor.disk import SKEW
from ropewalk.doctor.findings import Finding, fail, ok, warn
from ropewalk.files import write_atomically
from ropewalk.training.distributed import by_rank_zero, gather

PATIENCE = timedelta(minutes=3)  # of a collective; a dead link then ends the doctor, not a run hours later
SIZE = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}  # bytes that are added up
ROUNDS = 5
SLOW_SHARE = 0.3  # of what the cluster group says of its links
VISIBLE_WITHIN = 60.0  # seconds; NFS may remember for so long that a file is not there
GB = 1e9


def links(device: torch.device) -> dist.ProcessGroup:
    """The ranks as the run joins them: NCCL on GPUs, gloo on CPUs; a collective in it gives up soon. Collective."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def check_all_reduce(
    device: torch.device, cluster: ClusterConfig, group: dist.ProcessGroup | None = None
) -> Iterator[Finding]:
    """Bandwidth of the links, and whether what arrives is the sum. Collective.

    The bus bandwidth is nccl-tests' figure, bytes x 2 (n - 1) / n / seconds, the same for any number of ranks.
    """
    ranks, backend = dist.get_world_size(), dist.get_backend(group)
    elements = SIZE[device.type] // 4
    values = torch.ones(elements, device=device)
    dist.all_reduce(values, group=group)
    if not bool((values == ranks).all()):
        yield fail(
            "all-reduce", f"{backend}: ones of {ranks} ranks did not add up to {ranks}; a link or a GPU is broken"
        )
        return
    values.fill_(1)
    _settle(device, group)
    before = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(values, group=group)
    _settle(device, group)
    seconds = torch.tensor([(time.monotonic() - before) / ROUNDS], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)  # one number on all ranks
    speed = SIZE[device.type] * 2 * (ranks - 1) / ranks / float(seconds) / GB
    said = f"{backend}, {ranks} ranks: {speed:.3g} GB/s bus bandwidth for {SIZE[device.type] >> 20} MiB"
    expected = _expected(ranks, cluster)
    if device.type == "cuda" and speed < SLOW_SHARE * expected:
        yield warn(
            "all-reduce", f"{said}, of {expected:.0f} that cluster={cluster.name} says; see NCCL_DEBUG=INFO's lines"
        )
    else:
        yield ok("all-reduce", said)


def _expected(ranks: int, cluster: ClusterConfig) -> float:
    """GB/s: inside a node its NVLink, between nodes all ports of a node together, if that is less."""
    between = cluster.network_gb_s * cluster.gpus_per_node
    return cluster.nvlink_gb_s if ranks <= cluster.gpus_per_node else min(cluster.nvlink_gb_s, between)


def _settle(device: torch.device, group: dist.ProcessGroup | None) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(group)


def check_clocks() -> Iterator[Finding]:
    """The nodes' clocks against each other. Collective."""
    dist.barrier()
    clocks = gather(time.time())
    spread = max(clocks) - min(clocks)
    if spread > SKEW:
        yield warn("clock", f"the nodes' clocks are {spread:.0f} s apart; have them follow one NTP server")
    else:
        yield ok("clock", "the nodes agree")


def check_shared(directory: Path) -> Iterator[Finding]:
    """A file that rank 0 writes into the run's directory, every rank must see. Collective."""
    words = [f"{os.getpid()} {time.time_ns()}"]
    dist.broadcast_object_list(words)
    file = directory / ".doctor-shared"
    by_rank_zero(write_atomically, file, words[0])  # a failure is every rank's finding
    before = time.monotonic()
    while not _holds(file, words[0]) and time.monotonic() < before + VISIBLE_WITHIN:
        time.sleep(0.5)
    seen, waited = _holds(file, words[0]), time.monotonic() - before
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink()
    if not seen:
        yield fail(
            "shared", f"{directory} is another directory on this node; set run_dir on a file system of all nodes"
        )
    elif waited > 1:
        yield warn(
            "shared", f"{directory}: a new file was seen after {waited:.0f} s; training waits so long at each save"
        )
    else:
        yield ok("shared", "what one rank writes, all see")


def _holds(file: Path, words: str) -> bool:
    try:
        return file.read_text() == words
    except OSError:
        return False

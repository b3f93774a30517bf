"""Which checkpoint a run goes on from: the newest committed one that is whole, and that is this run's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ropewalk.config import ResumeConfig
from ropewalk.files import fsync_path
from ropewalk.training.checkpoint import MANIFEST, first_problem, read_manifest, verify_checkpoint
from ropewalk.training.contract import check_contract


@dataclass(frozen=True)
class Origin:
    """Where a session begins.

    Attributes:
        checkpoint: to load; None: the beginning.
        step: steps taken.
        world_size: ranks that saved it.
        zero_stage: of ZeRO, that saved it.
        state: what was saved beside the tensors.
    """

    checkpoint: Path | None = None
    step: int = 0
    world_size: int = 0
    zero_stage: int = 3
    state: Mapping[str, Any] = field(default_factory=dict)


def find_origin(run_dir: Path, contract: Mapping[str, Any], resume: ResumeConfig) -> Origin:
    """The checkpoint that this run goes on from, before a model is built. Collective.

    Rank 0 looks, so that all ranks mean the same ones; the ranks share the reading. A damaged checkpoint is renamed to
    damaged-step-N, so that its step can be saved again, and the one before it is used.

    Raises:
        ValueError: on every rank, for a contract that differs in an entry that ``resume.accept`` does not name, a run
            whose only checkpoint is damaged, or one that has checkpoints and was told not to resume.
    """
    found = [sorted(path.parent for path in run_dir.glob(f"checkpoints/step-*/{MANIFEST}"))]
    dist.broadcast_object_list(found)
    checkpoints = found[0]
    if checkpoints and not resume.enabled:
        raise ValueError(
            f"resume.enabled=false, but {run_dir} holds {checkpoints[-1].name}, which is never overwritten; choose "
            "another run_name or remove that directory"
        )
    while checkpoints:
        checkpoint = checkpoints.pop()
        damage = first_problem(_damage(checkpoint, contract, resume.accept))
        if damage is None:
            manifest = read_manifest(checkpoint)
            stage = manifest.get("zero_stage", 3)
            return Origin(checkpoint, manifest["step"], manifest["world_size"], stage, manifest.get("state", {}))
        if not checkpoints:
            raise ValueError(
                f"{damage}, and there is no checkpoint before it; mend the file, or to begin anew rename {checkpoint}"
            )
        _set_aside(checkpoint, damage, checkpoints[-1])
    return Origin()


def _damage(checkpoint: Path, contract: Mapping[str, Any], accept: list[str]) -> str | None:
    """What is wrong with this rank's share of the files; a contract of another run is an error, not damage."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    check_contract(manifest["contract"], contract, accept)
    try:
        verify_checkpoint(checkpoint, dist.get_rank(), dist.get_world_size())
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _set_aside(checkpoint: Path, damage: str, before: Path) -> None:
    if dist.get_rank() == 0:
        target = checkpoint.with_name(f"damaged-{checkpoint.name}")
        number = 1
        while target.exists():
            number += 1
            target = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
        checkpoint.rename(target)
        fsync_path(checkpoint.parent)
        print(f"warning: {damage}; it is kept as {target.name}, and the run goes on from {before.name}", flush=True)
    dist.barrier()


def require_writable(run_dir: Path) -> None:
    """Raise ValueError on every rank where rank 0 cannot write into the run's directory. Collective."""
    problem = None
    if dist.get_rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            probe = run_dir / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            problem = f"run_dir={run_dir} cannot be written ({error}); choose another run_dir or paths.output_dir"
    problem = first_problem(problem)
    if problem is not None:
        raise ValueError(problem)

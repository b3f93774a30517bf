"""Which checkpoint a run goes on from: the newest committed one that is whole, and that is this run's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ropewalk.config import ResumeConfig
from ropewalk.errors import UserError
from ropewalk.files import fsync_path
from ropewalk.training.checkpoint import MANIFEST, read_manifest, verify_checkpoint
from ropewalk.training.contract import check_contract
from ropewalk.training.distributed import by_rank_zero, first_problem, together, writing
from ropewalk.training.terminal import tell


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
        UserError: on every rank, for a contract that differs in an entry that ``resume.accept`` does not name, a run
            whose only checkpoint is damaged, or one that has checkpoints and was told not to resume.
    """
    checkpoints = by_rank_zero(lambda: sorted(path.parent for path in run_dir.glob(f"checkpoints/step-*/{MANIFEST}")))
    if checkpoints and not resume.enabled:
        raise UserError(
            f"resume.enabled=false, but {run_dir} holds {checkpoints[-1].name}, which is never overwritten; choose "
            "another run_name or remove that directory"
        )
    while checkpoints:
        checkpoint = checkpoints.pop()
        damage = first_problem(_problem_of(read_manifest, checkpoint))
        if damage is None:
            manifest = read_manifest(checkpoint)
            together(check_contract, manifest["contract"], contract, resume.accept)
            damage = first_problem(_problem_of(verify_checkpoint, checkpoint, dist.get_rank(), dist.get_world_size()))
        if damage is None:
            stage = manifest.get("zero_stage", 3)
            return Origin(checkpoint, manifest["step"], manifest["world_size"], stage, manifest.get("state", {}))
        if not checkpoints:
            raise UserError(
                f"{damage}, and there is no checkpoint before it; mend the file, or to begin anew rename {checkpoint}"
            )
        told = by_rank_zero(_set_aside, checkpoint, damage, checkpoints[-1])
        if dist.get_rank() == 0:
            tell(told)
    return Origin()


def _problem_of(reading: Callable[..., object], *arguments: Any) -> str | None:
    try:
        reading(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _set_aside(checkpoint: Path, damage: str, before: Path) -> str:
    """Rename a damaged checkpoint, so that its step can be saved again; returns what there is to tell."""
    target = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    try:
        checkpoint.rename(target)
        fsync_path(checkpoint.parent)
    except OSError as error:
        raise UserError(
            f"{damage}; it could not be renamed ({error}): rename it to what does not begin with step-, and the run "
            f"goes on from {before.name}"
        ) from error
    return f"warning: {damage}; it is kept as {target.name}, and the run goes on from {before.name}"


def require_writable(run_dir: Path) -> None:
    """Raise UserError on every rank where rank 0 cannot write into the run's directory. Collective."""

    def probe() -> None:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            file = run_dir / f".writable-{os.getpid()}"
            file.write_bytes(b"")
            file.unlink()

    by_rank_zero(probe)

"""The resume point: the newest checkpoint of a run that is whole and agrees with its contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ropewalk.config.train import ResumeConfig
from ropewalk.errors import UserError
from ropewalk.files import fsync_path
from ropewalk.runs.directory import RunDirectory, damaged_name, read_manifest
from ropewalk.runs.record import check_contract
from ropewalk.training.checkpoint.restore import load_checkpoint
from ropewalk.training.checkpoint.save import verify_checkpoint
from ropewalk.training.distributed import by_rank_zero, first_problem, log_once, together


@dataclass(frozen=True)
class ResumePoint:
    """The point at which a session of a run begins.

    Attributes:
        checkpoint: of this run, to load; None: the beginning.
        step: steps taken.
        world_size: ranks that saved it.
        zero_stage: of ZeRO, that saved it.
        state: of the run, saved beside the tensors.
        accepted: changes of the contract that ``resume.accept`` let pass, in words, by entry.
    """

    checkpoint: Path | None = None
    step: int = 0
    world_size: int = 0
    zero_stage: int = 3
    state: Mapping[str, Any] = field(default_factory=dict)
    accepted: Mapping[str, list[str]] = field(default_factory=dict)


def find_resume_point(run_dir: Path, contract: Mapping[str, Any], resume: ResumeConfig) -> ResumePoint:
    """The checkpoint that this run goes on from, before a model is built. Collective.

    Rank 0 looks, so that all ranks mean the same ones; the ranks share the reading. A damaged checkpoint is renamed to
    damaged-step-N, so that its step can be saved again, and the one before it is used.

    Raises:
        UserError: on every rank, for a contract that differs in an entry that ``resume.accept`` does not name, a run
            whose only checkpoint is damaged, or one that has checkpoints under ``resume.enabled=false``.
    """
    checkpoints = by_rank_zero(RunDirectory(run_dir).committed_checkpoints)
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
            accepted = together(check_contract, manifest["contract"], contract, resume.accept)
            damage = first_problem(_problem_of(verify_checkpoint, checkpoint, dist.get_rank(), dist.get_world_size()))
        if damage is None:
            for entry, changes in accepted.items():
                log_once(f"resume.accept={entry}, from step {manifest['step']} on: {'; '.join(changes)}")
            return ResumePoint(
                checkpoint,
                step=manifest["step"],
                world_size=manifest["world_size"],
                zero_stage=manifest.get("zero_stage", 3),
                state=manifest.get("state", {}),
                accepted=accepted,
            )
        if not checkpoints:
            raise UserError(
                f"{damage}, and there is no checkpoint before it; fix the file, or to begin anew rename {checkpoint}"
            )
        log_once(by_rank_zero(_set_aside, checkpoint, damage, checkpoints[-1]))
    return ResumePoint()


def prepare_resume(point: ResumePoint, stage: int) -> Callable[[Any], None] | None:
    """The function that brings a new engine to the resume point; None at the beginning. Collective.

    Args:
        point: where the session begins.
        stage: of ZeRO, of this session.
    """
    checkpoint = point.checkpoint
    if checkpoint is None:
        return None
    log_resharding(checkpoint, point.world_size, point.zero_stage, stage)
    as_many = point.world_size == dist.get_world_size()
    return lambda engine: load_checkpoint(engine, checkpoint, random_state=as_many)


def log_resharding(checkpoint: Path, world_size: int, saved_stage: int, stage: int) -> None:
    """Log that other ranks, or another stage of ZeRO, saved a checkpoint; it is read all the same. Collective."""
    saved, own = (world_size, saved_stage), (dist.get_world_size(), stage)
    if saved != own:
        log_once(
            f"{checkpoint.name} was saved by {saved[0]} rank{'s' if saved[0] > 1 else ''} with ZeRO-{saved[1]}; "
            f"{own[0]} read{'s' if own[0] == 1 else ''} it with ZeRO-{own[1]}"
        )


def _problem_of(reading: Callable[..., object], *arguments: Any) -> str | None:
    try:
        reading(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _set_aside(checkpoint: Path, damage: str, previous: Path) -> str:
    """Rename a damaged checkpoint, so that its step can be saved again; returns a warning."""
    target = damaged_name(checkpoint)
    try:
        checkpoint.rename(target)
        fsync_path(checkpoint.parent)
    except OSError as error:
        raise UserError(
            f"{damage}; it could not be renamed ({error}): rename it to what does not begin with step-, and the run "
            f"goes on from {previous.name}"
        ) from error
    return f"warning: {damage}; it is kept as {target.name}, and the run goes on from {previous.name}"

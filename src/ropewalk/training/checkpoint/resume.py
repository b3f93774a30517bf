"""The resume point: the newest checkpoint of a run that is whole and agrees with its contract.

If another number of ranks saved it, it is converted once to DeepSpeed's universal form, which is kept beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ropewalk.config.train import ResumeConfig
from ropewalk.errors import UserError
from ropewalk.files import blake3_of, fsync_path, inside, sha256_of, write_atomically, writing
from ropewalk.runs.directory import MANIFEST, ZERO, RunDirectory, damaged_name, read_manifest, universal_form
from ropewalk.runs.record import check_contract
from ropewalk.training.checkpoint.save import Deferred, load_checkpoint, verify_checkpoint
from ropewalk.training.distributed import by_rank_zero, first_problem, log_once, together

SOURCE = "source.json"


@dataclass(frozen=True)
class ResumePoint:
    """The point at which a session of a run begins.

    Attributes:
        checkpoint: of this run, to load; None: the beginning.
        step: steps taken.
        world_size: ranks that saved it.
        zero_stage: of ZeRO, that saved it.
        state: of the run, saved beside the tensors.
    """

    checkpoint: Path | None = None
    step: int = 0
    world_size: int = 0
    zero_stage: int = 3
    state: Mapping[str, Any] = field(default_factory=dict)


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
            together(check_contract, manifest["contract"], contract, resume.accept)
            damage = first_problem(_problem_of(verify_checkpoint, checkpoint, dist.get_rank(), dist.get_world_size()))
        if damage is None:
            stage = manifest.get("zero_stage", 3)
            return ResumePoint(checkpoint, manifest["step"], manifest["world_size"], stage, manifest.get("state", {}))
        if not checkpoints:
            raise UserError(
                f"{damage}, and there is no checkpoint before it; fix the file, or to begin anew rename {checkpoint}"
            )
        log_once(by_rank_zero(_set_aside, checkpoint, damage, checkpoints[-1]))
    return ResumePoint()


def prepare_resume(point: ResumePoint, stage: int) -> Callable[[Any], None] | None:
    """Make the function that brings a new engine to the resume point; None at the beginning. Collective.

    A checkpoint of another number of ranks is converted here, while there is no engine yet.

    Raises:
        UserError: on every rank, for a checkpoint of another ZeRO stage, or one that cannot be converted.
    """
    if point.checkpoint is None:
        return None
    checkpoint, universal = point.checkpoint, None
    check_stage(point.zero_stage, stage, checkpoint)
    if point.world_size != dist.get_world_size():
        universal = make_universal(checkpoint, stage)
    return lambda engine: load_checkpoint(engine, checkpoint, universal)


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


def check_stage(saved: int, present: int, checkpoint: Path) -> None:
    """Raise UserError if a checkpoint was saved by another ZeRO stage: its shards are cut otherwise."""
    if saved != present:
        raise UserError(
            f"{checkpoint} was saved with deepspeed.stage={saved}, this run has deepspeed.stage={present}; set it to "
            f"{saved}"
        )


def make_universal(checkpoint: Path, stage: int, target: Path | None = None) -> Path:
    """The universal form of a verified checkpoint: verified if it is there, else converted by rank 0. Collective.

    It costs as much disk as the checkpoint. retention deletes it with the checkpoints that ``trainer.keep_last`` ends.

    Args:
        checkpoint: verified.
        stage: of ZeRO.
        target: directory of it; None: beside the checkpoint.

    Raises:
        UserError: on every rank, if the conversion fails, and for ZeRO-1 and -2, whose shards cannot be converted.
    """
    if stage != 3:
        raise UserError(
            f"{checkpoint} was saved by another number of ranks; that needs deepspeed.stage=3, this run has "
            f"deepspeed.stage={stage}: resume with as many ranks as saved it"
        )
    target = target or universal_form(checkpoint)
    source = by_rank_zero(sha256_of, checkpoint / MANIFEST)
    files = by_rank_zero(_files_of, target, source)
    if files is not None:
        damage = first_problem(_damage(target, files))
        if damage is None:
            return target
        log_once(f"warning: {damage}; the universal form of {checkpoint.name} is made again")
    conversion = together(lambda: _Conversion(checkpoint, target, source) if dist.get_rank() == 0 else None)
    while True:  # a barrier would meet the process group's timeout with a large model
        status = [conversion.status() if conversion else ""]
        dist.broadcast_object_list(status)
        if status[0] == "done":
            return target
        if status[0] != "running":
            raise UserError(
                f"{checkpoint} could not be converted for another number of ranks ({status[0]}); {target.parent} must "
                "be writable and have room for as much again, or resume with as many ranks as saved it"
            )


def _files_of(target: Path, source: str) -> dict[str, Any] | None:
    """Size and checksum of each file of a universal form; None if there is none of the manifest ``source``."""
    try:
        record = json.loads((target / SOURCE).read_text())
    except (OSError, ValueError):
        return None
    return record.get("files") if record.get("manifest_sha256") == source else None


def _damage(target: Path, files: Mapping[str, Any]) -> str | None:
    """The first fault of this rank's share of the files; None if there is none."""
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        path, expected = inside(target, name), files[name]
        try:
            if path.stat().st_size != expected["bytes"] or blake3_of(path) != expected["blake3"]:
                return f"{path} is not the file that was written (its size or checksum differs)"
        except OSError as error:
            return str(error)
    return None


class _Conversion:
    """The conversion as a process of its own, looked at once a second; then a thread that commits what it has made."""

    def __init__(self, checkpoint: Path, target: Path, source: str) -> None:
        self.target, self.source = target, source
        self.partial = target.with_name(target.name + ".partial")
        with writing(f"run_dir={target.parent.parent}", target.parent.parent):
            target.parent.mkdir(exist_ok=True)
        for left_over in (self.target, self.partial):
            shutil.rmtree(left_over, ignore_errors=True)
        log_once(f"{checkpoint.name} was saved by another number of ranks: converting it")
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        folders = ["--input_folder", str(checkpoint / ZERO), "--output_folder", str(self.partial / ZERO)]
        workers = str(max(1, (os.cpu_count() or 2) // 2))
        self.process = subprocess.Popen(
            [*command, *folders, "--num_extract_workers", workers, "--num_merge_workers", workers],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        self.commit: Deferred[None] | None = None

    def status(self) -> str:
        """ "running", "done", or what went wrong."""
        if self.commit is None:
            try:
                _, errors = self.process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:
                return "running"
            if self.process.returncode != 0:
                return " | ".join(errors.strip().splitlines()[-3:]) or f"exit code {self.process.returncode}"
            self.commit = Deferred(self._commit, in_background=True)
        if not self.commit.done(within=1.0):
            return "running"
        try:
            self.commit.result()
        except OSError as error:
            return str(error)
        return "done"

    def _commit(self) -> None:
        files = {}
        for path in sorted(self.partial.rglob("*")):
            fsync_path(path)
            if path.is_file():
                files[str(path.relative_to(self.partial))] = {"bytes": path.stat().st_size, "blake3": blake3_of(path)}
        write_atomically(
            self.partial / SOURCE, json.dumps({"manifest_sha256": self.source, "files": files}, indent=1) + "\n"
        )
        self.partial.rename(self.target)
        fsync_path(self.target.parent)

"""Going on with another number of ranks: DeepSpeed's universal form of a checkpoint, made once and kept beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ropewalk.errors import UserError
from ropewalk.files import blake3_of, fsync_path, inside, sha256_of, write_atomically
from ropewalk.training.background import Work
from ropewalk.training.checkpoint import MANIFEST, ZERO
from ropewalk.training.distributed import by_rank_zero, first_problem, together, writing
from ropewalk.training.terminal import tell

SOURCE = "source.json"


def universal_directory(checkpoint: Path) -> Path:
    """Where the universal form of a checkpoint is kept."""
    return checkpoint.with_name(f"universal-{checkpoint.name}")


def require_stage(saved: int, present: int, checkpoint: Path) -> None:
    """Raise UserError where a checkpoint was saved by another ZeRO stage: its shards are cut otherwise."""
    if saved != present:
        raise UserError(
            f"{checkpoint} was saved with deepspeed.stage={saved}, this run has deepspeed.stage={present}; set it to "
            f"{saved}"
        )


def make_universal(checkpoint: Path, stage: int, target: Path | None = None) -> Path:
    """The universal form of a verified checkpoint: verified where it is there, else converted by rank 0. Collective.

    It costs as much disk as the checkpoint. retention deletes it with the checkpoints that ``trainer.keep_last`` ends.

    Args:
        checkpoint: verified.
        stage: of ZeRO.
        target: directory of it; None: beside the checkpoint.

    Raises:
        UserError: on every rank, where the conversion fails, and for ZeRO-1 and -2, whose shards say too little.
    """
    if stage != 3:
        raise UserError(
            f"{checkpoint} was saved by another number of ranks; that needs deepspeed.stage=3, this run has "
            f"deepspeed.stage={stage}: resume with as many ranks as saved it"
        )
    target = target or universal_directory(checkpoint)
    source = by_rank_zero(sha256_of, checkpoint / MANIFEST)
    files = by_rank_zero(_files_of, target, source)
    if files is not None:
        damage = first_problem(_damage(target, files))
        if damage is None:
            return target
        if dist.get_rank() == 0:
            tell(f"warning: {damage}; the universal form of {checkpoint.name} is made again")
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
    """Size and checksum of each file of a universal form; None where there is none of the manifest ``source``."""
    try:
        record = json.loads((target / SOURCE).read_text())
    except (OSError, ValueError):
        return None
    return record.get("files") if record.get("manifest_sha256") == source else None


def _damage(target: Path, files: Mapping[str, Any]) -> str | None:
    """What is wrong with this rank's share of the files."""
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
        with writing(target.parent.parent):
            target.parent.mkdir(exist_ok=True)
        for left_over in (self.target, self.partial):
            shutil.rmtree(left_over, ignore_errors=True)
        tell(f"{checkpoint.name} was saved by another number of ranks: converting it")
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
        self.commit: Work[None] | None = None

    def status(self) -> str:
        """ "running", "done", or what went wrong."""
        if self.commit is None:
            try:
                _, errors = self.process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:
                return "running"
            if self.process.returncode != 0:
                return " | ".join(errors.strip().splitlines()[-3:]) or f"exit code {self.process.returncode}"
            self.commit = Work(self._commit, in_background=True)
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

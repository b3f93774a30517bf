"""Going on with another number of ranks: DeepSpeed's universal form of a checkpoint, made once and kept beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from ropewalk.files import fsync_path, sha256_of, write_atomically
from ropewalk.training.agreement import together, writing
from ropewalk.training.checkpoint import MANIFEST, ZERO
from ropewalk.training.terminal import tell

SOURCE = "source.json"


def universal_directory(checkpoint: Path) -> Path:
    """Where the universal form of a checkpoint is kept."""
    return checkpoint.with_name(f"universal-{checkpoint.name}")


def require_stage(saved: int, present: int, checkpoint: Path) -> None:
    """Raise ValueError where a checkpoint was saved by another ZeRO stage: its shards are cut otherwise."""
    if saved != present:
        raise ValueError(
            f"{checkpoint} was saved with deepspeed.stage={saved}, this run has deepspeed.stage={present}; set it to "
            f"{saved}"
        )


def make_universal(checkpoint: Path, stage: int, target: Path | None = None) -> Path:
    """The universal form of a verified checkpoint, converted by rank 0 where it is not there yet. Collective.

    It costs as much disk as the checkpoint. retention deletes it with the checkpoints that ``trainer.keep_last`` ends.

    Args:
        checkpoint: verified.
        stage: of ZeRO.
        target: directory of it; None: beside the checkpoint.

    Raises:
        ValueError: for ZeRO-1 and -2, whose shards say too little for the conversion.
        ValueError: on every rank, where the conversion fails, too.
    """
    if stage != 3:
        raise ValueError(
            f"{checkpoint} was saved by another number of ranks; that needs deepspeed.stage=3, this run has "
            f"deepspeed.stage={stage}: resume with as many ranks as saved it"
        )
    target = target or universal_directory(checkpoint)
    conversion = together(lambda: _Conversion(checkpoint, target) if dist.get_rank() == 0 else None)
    while True:  # a barrier would meet the process group's timeout with a large model
        status = [conversion.status() if conversion else ""]
        dist.broadcast_object_list(status)
        if status[0] == "done":
            return target
        if status[0] != "running":
            raise ValueError(
                f"{checkpoint} could not be converted for another number of ranks ({status[0]}); {target.parent} must "
                "be writable and have room for as much again, or resume with as many ranks as saved it"
            )


class _Conversion:
    """The conversion as a process of its own, looked at once a second."""

    def __init__(self, checkpoint: Path, target: Path) -> None:
        self.target, self.source = target, sha256_of(checkpoint / MANIFEST)
        self.partial = target.with_name(target.name + ".partial")
        self.process: subprocess.Popen[str] | None = None
        if self._is_there():
            return
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

    def _is_there(self) -> bool:
        path = self.target / SOURCE
        try:
            return path.is_file() and json.loads(path.read_text())["manifest_sha256"] == self.source
        except (ValueError, KeyError):
            return False  # damaged: it is made again

    def status(self) -> str:
        """ "running", "done", or what went wrong."""
        if self.process is None:
            return "done"
        try:
            _, errors = self.process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "running"
        if self.process.returncode != 0:
            return " | ".join(errors.strip().splitlines()[-3:]) or f"exit code {self.process.returncode}"
        try:
            self._commit()
        except OSError as error:
            return str(error)
        return "done"

    def _commit(self) -> None:
        for path in sorted(self.partial.rglob("*")):
            fsync_path(path)
        write_atomically(self.partial / SOURCE, json.dumps({"manifest_sha256": self.source}) + "\n")
        self.partial.rename(self.target)
        fsync_path(self.target.parent)
        self.process = None

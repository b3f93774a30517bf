"""What a run writes about itself: resolved config, provenance, metrics, one line a step."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ropewalk.config.train import TrainConfig
from ropewalk.data import PackedStore
from ropewalk.errors import UserError
from ropewalk.files import fsync_path, write_atomically
from ropewalk.provenance import git_commit, recorded_config, versions
from ropewalk.rope.position import Position
from ropewalk.training.terminal import tell

METRICS = "metrics.jsonl"  # a row for each logged step
EVALUATIONS = "evaluations.jsonl"  # a row for each evaluation while training


def write_record(
    config: TrainConfig, position: Position, store: PackedStore, model: dict[str, Any], world_size: int
) -> dict[str, Any]:
    """Write config.yaml and run.json into the run directory; returns what run.json holds.

    Args:
        config: resolved.
        position: what the model rotates with.
        store: what it is trained on.
        model: further facts about it (parameters, attention kernel).
        world_size: ranks.
    """
    spectrum = position.spectrum()
    record = {
        "run_name": config.run_name,
        "method": position.name,
        "chain": str(position.chain),
        "chain_sha256": position.chain.sha256,
        "spectrum_sha256": position.sha256,
        "theta": position.theta,
        "head_dim": position.head_dim,
        "pretrained_length": position.pretrained_length,
        "trained_length": position.trained_length,
        "inv_freq": spectrum.inv_freq.tolist(),
        "attention_scaling": spectrum.attention_scaling,
        **model,
        "store_fingerprint": store.fingerprint,
        "git_commit": git_commit(),
        "versions": versions(),
        "world_size": world_size,
    }
    run_dir = Path(config.run_dir)
    write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(recorded_config(config))))
    write_atomically(run_dir / "run.json", json.dumps(record, indent=2) + "\n")
    return record


def copy_tokenizer(source: Path | None, run_dir: Path) -> None:
    """Keep the tokenizer beside the run, so that an export needs nothing else."""
    if source is not None and source.is_dir():
        shutil.copytree(source, run_dir / "tokenizer", dirs_exist_ok=True)


class MetricsFile:
    """metrics.jsonl: one object a logged step; on resume, rows past the checkpoint are taken off."""

    def __init__(self, run_dir: Path, first_step: int, name: str = METRICS) -> None:
        self.path = run_dir / name
        kept = [row for row in read_metrics(run_dir, name) if row["step"] <= first_step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.unwritten = ""

    def append(self, row: dict[str, Any]) -> None:
        """Add one row. Where the disk is full it waits for the next: a lost row is no reason to lose a run."""
        self.unwritten += json.dumps(row) + "\n"
        self._flush()

    def _flush(self) -> None:
        size: int | None = None
        try:
            size = self.path.stat().st_size
            with self.path.open("a") as file:
                file.write(self.unwritten)
        except OSError as error:
            tell(f"warning: {self.path} could not be written ({error}); its rows are kept for later")
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # half a row would spoil the next
        else:
            self.unwritten = ""

    def settle(self) -> None:
        """Have all rows on the disk, or say that they are not."""
        if self.unwritten:
            self._flush()
        try:
            fsync_path(self.path)
        except OSError as error:
            tell(f"warning: {self.path} could not be written ({error})")


def read_metrics(run_dir: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, or evaluations.jsonl; a last line cut off by a crash is left out.

    Raises:
        UserError: naming a line that is no JSON.
    """
    path = run_dir / name
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.endswith("\n") else []
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not what was written ({error}); remove it") from error
    return rows


class Progress:
    """The line a person watches: step, loss, tokens per second, time left."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self.first_step, self.max_steps, self.start = first_step, max_steps, time.monotonic()

    def line(self, row: dict[str, Any]) -> str:
        """Format a metrics row; the remaining time is the mean of this session's steps times those left."""
        done = row["step"] - self.first_step
        left = (time.monotonic() - self.start) / done * (self.max_steps - row["step"])
        minutes, seconds = divmod(round(left), 60)
        return (
            f"step {row['step']:>5}/{self.max_steps}  loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:>7,.0f} tok/s  ETA {minutes}:{seconds:02d}"
        )

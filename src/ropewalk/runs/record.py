"""The record of a run: its resolved configuration, what it is made of, and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ropewalk.config import TrainConfig
from ropewalk.data import PackedStore
from ropewalk.files import write_atomically
from ropewalk.rope.position import Position
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.provenance import git_commit, recorded_config, versions


def write_record(
    config: TrainConfig, position: Position, store: PackedStore, model: dict[str, Any], world_size: int
) -> dict[str, Any]:
    """Write config.yaml and run.json into the run directory; return the content of run.json.

    Args:
        config: resolved.
        position: position encoding of the model.
        store: packed sequences that it is trained on.
        model: further facts about the model (parameters, attention kernel).
        world_size: number of ranks.
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
    run = RunDirectory(Path(config.run_dir))
    write_atomically(run.config, OmegaConf.to_yaml(OmegaConf.create(recorded_config(config))))
    write_atomically(run.record, json.dumps(record, indent=2) + "\n")
    return record


def copy_tokenizer(source: Path | None, run_dir: Path) -> None:
    """Keep the tokenizer beside the run, so that an export needs nothing else."""
    if source is not None and source.is_dir():
        shutil.copytree(source, RunDirectory(run_dir).tokenizer, dirs_exist_ok=True)

"""The start checkpoint: a run that begins with the weights of another run, and with or without its optimizer's state.

The checkpoint is chosen once and written down in the run directory, its config.json included. From then on it does not
matter that the other run goes on or prunes: until the first checkpoint of its own, this run starts from that one, and
after it the other run is not read any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ropewalk.config.train import TrainConfig
from ropewalk.errors import UserError
from ropewalk.files import read_object, sha256_of, write_atomically, writing
from ropewalk.rope.hf_config import read_config_json
from ropewalk.runs.directory import MANIFEST, RunDirectory, checkpoint_at, read_manifest
from ropewalk.training.checkpoint.restore import load_checkpoint
from ropewalk.training.checkpoint.resume import log_resharding
from ropewalk.training.checkpoint.save import verify_checkpoint
from ropewalk.training.distributed import by_rank_zero, first_problem, log_once


@dataclass(frozen=True)
class StartCheckpoint:
    """The checkpoint that a run starts from.

    Attributes:
        run: ``start_from.run``, as it was written.
        checkpoint: absolute path of the checkpoint.
        manifest_sha256: of its manifest, so of every byte in it.
        step: steps that it has seen.
        world_size: ranks that saved it.
        zero_stage: of the run that saved it.
        config: its config.json.
        contract: of its run.
    """

    run: str
    checkpoint: str
    manifest_sha256: str
    step: int
    world_size: int
    zero_stage: int
    config: Mapping[str, Any]
    contract: Mapping[str, Any]

    @property
    def order_step(self) -> int:
        """Steps of the data order that it has seen, before its own first one those of the order that it continued."""
        return self.step + int((self.contract.get("start_from") or {}).get("order_step", 0))

    @property
    def tokenizer(self) -> str:
        """The directory of the tokenizer that the other run keeps."""
        return str(RunDirectory.of(Path(self.checkpoint)).tokenizer)

    def identity(self) -> dict[str, Any]:
        """For the contract: what identifies the weights, in whatever directory."""
        return {"manifest_sha256": self.manifest_sha256, "step": self.step}


def find_start(config: TrainConfig) -> StartCheckpoint | None:
    """The checkpoint of ``start_from.run``, chosen by rank 0; None if none is named. Collective.

    Raises:
        UserError: on every rank, if nothing is committed there.
    """
    if config.start_from.run is None:
        return None
    run, run_dir = config.start_from.run, Path(config.run_dir)
    return StartCheckpoint(**by_rank_zero(lambda: asdict(_choose(run, run_dir))))


def _choose(run: str, run_dir: Path) -> StartCheckpoint:
    record = RunDirectory(run_dir).start_record
    if record.is_file():
        start = StartCheckpoint(**{"contract": {}, **read_object(record)})  # the first ones had none
        if start.run == run:
            return start
    checkpoint = checkpoint_at(run)
    if checkpoint is None:
        raise UserError(
            f"start_from.run={run} holds no committed checkpoint; name a run directory that does, or one of its "
            "checkpoints (weights in a Hugging Face directory are model.path's)"
        )
    if checkpoint.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"start_from.run={run} is this run itself, which goes on by itself; to begin a new stage choose another "
            "run_name"
        )
    manifest = read_manifest(checkpoint)
    return StartCheckpoint(
        run=run,
        checkpoint=str(checkpoint.resolve()),
        manifest_sha256=sha256_of(checkpoint / MANIFEST),
        step=manifest["step"],
        world_size=manifest["world_size"],
        zero_stage=manifest.get("zero_stage", 3),
        config=read_config_json(checkpoint, "start_from.run"),
        contract=manifest["contract"],
    )


def first_order_step(start: StartCheckpoint | None, order: str, data: Mapping[str, Any]) -> int:
    """The step of the data order that a run begins with, from 0.

    Args:
        start: checkpoint that it starts from.
        order: ``start_from.order``.
        data: contract of its data order.

    Raises:
        UserError: the order is to be continued, and is not that of the other run.
    """
    if start is None or order == "restart":
        return 0
    different = [name for name, value in data.items() if start.contract.get(name) != value]
    if different:
        name = different[0]
        raise UserError(
            f"start_from.order=continue, but {', '.join(different)} differ from {start.run}'s ({name} "
            f"{start.contract.get(name)!r}, here {data[name]!r}), so the order is another; set the data, batch and "
            "seed as they were there, or start_from.order=restart"
        )
    return start.order_step


def write_start(start: StartCheckpoint, run_dir: Path) -> None:
    """Write down which checkpoint was chosen, once the contract of an earlier session is kept. Collective.

    Raises:
        UserError: on every rank, if it cannot be written.
    """

    def write() -> None:
        with writing(f"run_dir={run_dir}", run_dir):
            RunDirectory(run_dir).start.mkdir(parents=True, exist_ok=True)
            write_atomically(RunDirectory(run_dir).start_record, json.dumps(asdict(start), indent=1) + "\n")

    by_rank_zero(write)


def prepare_start(start: StartCheckpoint, config: TrainConfig) -> Callable[[Any], None]:
    """Verify the checkpoint, and make the function that loads it. Collective.

    Weights come along, and the optimizer's state unless it is dropped; random state stays the new run's own.

    Raises:
        UserError: on every rank, if a file is not what the manifest says.
    """
    problem = first_problem(_problem(start))
    if problem is not None:
        raise UserError(f"start_from.run={start.run} cannot be started from: {problem}")
    checkpoint, is_kept = Path(start.checkpoint), config.start_from.optimizer == "keep"
    optimizer = "with its optimizer's state" if is_kept else "without its optimizer's state"
    log_once(f"starting from {checkpoint} (step {start.step}), {optimizer}")
    log_resharding(checkpoint, start.world_size, start.zero_stage, config.deepspeed.stage)
    return lambda engine: load_checkpoint(engine, checkpoint, moments=is_kept, random_state=False)


def _problem(start: StartCheckpoint) -> str | None:
    """The first fault of the checkpoint, or of this rank's share of its files; None if there is none."""
    checkpoint = Path(start.checkpoint)
    try:
        if sha256_of(checkpoint / MANIFEST) != start.manifest_sha256:
            return f"{checkpoint / MANIFEST} is not the one that this run was to start from"
        verify_checkpoint(checkpoint, dist.get_rank(), dist.get_world_size())
    except (ValueError, OSError) as error:
        return str(error)
    return None

"""The layout of a run directory: every file in it, who writes it, and its committed checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError, in_one_line
from ropewalk.files import read_object

# Inside checkpoints/step-N, beside config.json (with the position in it) and rng_rank_R.safetensors:
MANIFEST = "manifest.json"  # step, contract, state, and size and checksum of every file; written last, by a rename
ZERO = "zero"  # DeepSpeed's shards of weights and optimizer; its tag
MANIFEST_FORMAT = 1
_STEP, _DAMAGED = "step-", "damaged-"


class _Entry:
    """A path below ``root``, as an attribute."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, directory: Any, owner: type) -> Path:
        return directory.root / self.name


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one training run, as ``run_dir`` names it.

    Nothing in it must exist. Paths are joined to ``root``, so they are relative where it is.
    """

    root: Path

    # Training, rank 0, at the start of every session:
    config = _Entry("config.yaml")  # the resolved TrainConfig, secrets masked
    record = _Entry("run.json")  # position, model, store, git commit, package versions, world size (runs.record)
    tokenizer = _Entry("tokenizer")  # the store's, so that an export needs nothing else
    tracker = _Entry("tracker.json")  # id of the W&B run, in which a resumed run goes on; W&B's own files: wandb/
    start = _Entry("start")  # of a run with start_from
    start_record = _Entry("start/start.json")  # the checkpoint that was chosen, with its config.json
    # Training, while it runs, beside the file of files.only_writer that names its process:
    metrics = _Entry("metrics.jsonl")  # a row for each logged step (runs.metrics_file)
    visuals = _Entry("visuals.jsonl")  # the temporal scale that each video of each step has drawn
    evaluation_metrics = _Entry("evaluations.jsonl")  # a row for each evaluation inside training
    evaluations = _Entry("evaluations")  # step-N/ with the tables of that evaluation
    checkpoints = _Entry("checkpoints")  # step-N/; also damaged-step-N/, see below
    heartbeats = _Entry("heartbeats")  # rank_R.txt, rewritten by every rank every few seconds; gone after a clean end
    stuck = _Entry("stuck")  # step-N/ with the stacks of all ranks, where the watchdog found that step too slow
    refused = _Entry("refused")  # step-N.json with the sequences of a step that a guard kept from the weights
    profile = _Entry("profile")  # torch.profiler's traces, with trainer.profile_steps
    # Around training:
    jobs = _Entry("jobs")  # <SLURM job>-<restart>/, a JobRecord each; slurm/common.sh
    # The newest checkpoint for Hugging Face, by scripts/export.py or an evaluation; also export-gguf, export-yarn4, ...
    export = _Entry("export")
    exports = _Entry("exports")  # step-N/, other checkpoints for Hugging Face; an evaluation that names them
    evaluation = _Entry("evaluation")  # tables of scripts/evaluate.py with output=<run>/evaluation; reports read it
    tracked = _Entry("tracked.json")  # hash of the evaluation that scripts/compare.py has logged to the tracker

    @classmethod
    def of(cls, checkpoint: Path) -> RunDirectory:
        """The run directory that a checkpoint lies in: ``<run>/checkpoints/step-N``, symbolic links resolved."""
        return cls(checkpoint.resolve().parents[1])

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` steps."""
        return self.checkpoints / _step(step)

    def evaluation_at(self, step: int) -> Path:
        """Tables of the evaluation inside training after ``step`` steps."""
        return self.evaluations / _step(step)

    def stuck_at(self, step: int) -> Path:
        """Stacks of all ranks in a step that took too long."""
        return self.stuck / _step(step)

    def refused_at(self, step: int) -> Path:
        """Record of a refused step."""
        return self.refused / f"{_step(step)}.json"

    def heartbeat(self, rank: int) -> Path:
        """Heartbeat of a rank: a line of JSON, then stacks."""
        return self.heartbeats / f"rank_{rank:05d}.txt"

    def saved_checkpoints(self) -> list[Path]:
        """Directories ``checkpoints/step-N`` from the oldest on, committed or not; copies of other names are none."""
        return sorted(path for path in self.checkpoints.glob(f"{_STEP}*") if path.name[len(_STEP) :].isdecimal())

    def committed_checkpoints(self) -> list[Path]:
        """Checkpoints with a manifest, from the oldest on; none of their files is read."""
        return [path for path in self.saved_checkpoints() if (path / MANIFEST).is_file()]

    def newest_checkpoint(self) -> Path | None:
        """The newest committed checkpoint; None before the first."""
        return next(reversed(self.committed_checkpoints()), None)

    def committed_step(self) -> int | None:
        """Steps in the newest committed checkpoint; None before the first."""
        newest = self.newest_checkpoint()
        return None if newest is None else int(newest.name.removeprefix(_STEP))

    def is_finished(self) -> bool:
        """True if the newest checkpoint has all the steps that config.yaml plans; False where there is no such file."""
        step = self.committed_step()
        if step is None or not self.config.is_file():
            return False
        planned = re.search(r"^\s+max_steps:\s*(\d+)\b", self.config.read_text(encoding="utf-8"), re.MULTILINE)
        return planned is not None and step >= int(planned[1])


@dataclass(frozen=True)
class JobRecord:
    """The record of one session of a SLURM job: in ``jobs`` of a training run, else below ``paths.output_dir``."""

    root: Path

    # Before the ranks start (scripts/job.py):
    begin = _Entry("begin.json")  # command, nodes, versions, git commit, the environment that steers a job
    config = _Entry("config.yaml")  # resolved, secrets masked
    script = _Entry("script.sh")  # what SLURM runs, secrets masked
    changes = _Entry("changes.diff")  # difference of the source tree from its commit, secrets masked
    # By each rank (slurm.rank):
    ranks = _Entry("ranks")  # rank-N.json: process, node, and how it ended
    doctor = _Entry("doctor")  # the doctor's own record, with its ranks/
    # After them (slurm.job), or for a dead node by the next session:
    end = _Entry("end.json")  # state, exit code, reason and progress, in the words of sacct

    def rank(self, rank: int) -> Path:
        """Note of one rank."""
        return self.ranks / f"rank-{rank:05d}.json"

    def rank_notes(self) -> list[Path]:
        """Notes of the ranks that left one, in the order of ranks."""
        return sorted(self.ranks.glob("rank-*.json"))


def _step(step: int) -> str:
    return f"{_STEP}{step:08d}"


def damaged_name(checkpoint: Path) -> Path:
    """A free path for a checkpoint that failed its check: ``damaged-step-N``, else ``damaged-step-N-2``, ..."""
    target, number = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}"), 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}-{number}")
    return target


def checkpoint_at(path: str | Path) -> Path | None:
    """The committed checkpoint that ``path`` is, or the newest of the run that it is; None: it is neither.

    A store of packed sequences has a manifest of the same name, so DeepSpeed's folder must be beside it.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / ZERO).is_dir():
        return path
    return RunDirectory(path).newest_checkpoint()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        UserError: there is none, it is not JSON, or it is of another format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{checkpoint} holds no {MANIFEST}, so it was never committed; name one that was, or the run")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not the manifest that was written: {in_one_line(error)}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not the manifest that was written: it is no JSON object")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')}; this version reads {MANIFEST_FORMAT}")
    return manifest


def run_of(path: str | Path) -> tuple[RunDirectory, str]:
    """The run that ``path`` belongs to, and the part of it that a name of ``path`` says, too.

    Args:
        path: a run directory or its export; a checkpoint or a scaled export of it, which is a part; any other
            directory, which is taken for one.
    """
    path = Path(path).absolute()
    run, outer, part = RunDirectory(path.parent), RunDirectory(path.parent.parent), ""
    if path.parent in (outer.checkpoints, outer.exports):
        run, part = outer, path.name
    elif run.record.is_file() and path.name.startswith(f"{run.export.name}-"):
        part = path.name.removeprefix(f"{run.export.name}-")
    elif path != run.export:
        run = RunDirectory(path)
    return run, part


def run_name(path: str | Path) -> str:
    """The one name of the run that ``path`` belongs to, with its part: its run_name, whether or not it was exported."""
    run, part = run_of(path)
    return f"{read_object(run.record).get('run_name') or run.root.name} {part}".rstrip()

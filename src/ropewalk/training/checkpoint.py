"""Committed checkpoints: a directory of files that exists once its manifest does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ropewalk.config import TrainerConfig
from ropewalk.files import fsync_path, inside, sha256_of, write_atomically
from ropewalk.model import write_config

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ZERO = "zero"  # DeepSpeed's tag inside the step's directory


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lives."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def find_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest committed checkpoint of a run, or None. What has no manifest is not looked at."""
    manifests = sorted(Path(run_dir).glob(f"checkpoints/step-*/{MANIFEST}"))
    return manifests[-1].parent if manifests else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        ValueError: where there is none, or it is of another format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"{checkpoint} holds no {MANIFEST}, so it was never committed; name one that was, or the run")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {manifest.get('format')}; this version reads {FORMAT_VERSION}")
    return manifest


def verify_checkpoint(checkpoint: str | Path, rank: int | None = None) -> dict[str, Any]:
    """Read files back and compare them with the manifest; returns the manifest.

    Args:
        checkpoint: directory of one step.
        rank: look only at the files that this rank wrote; None: at all.

    Raises:
        ValueError: naming the first file that is missing or differs. Nothing is deleted.
    """
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    mend = f"; to go on from the checkpoint before it, rename {checkpoint / MANIFEST}"
    for name, expected in manifest["files"].items():
        path = inside(checkpoint, name)
        if rank is not None and _owner(path) % manifest["world_size"] != rank:
            continue
        if not path.is_file():
            raise ValueError(f"{path} is missing, but the manifest lists it{mend}")
        if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            raise ValueError(f"{path} is not the file that was saved (its size or sha256 differs){mend}")
    return manifest


def save_checkpoint(
    engine: Any, run_dir: Path, step: int, contract: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Write files, make them durable, then commit by renaming the manifest into place. Collective.

    Args:
        engine: the DeepSpeed engine.
        run_dir: the run's directory.
        step: steps taken; the data order needs no other state.
        contract: what a resumed run must agree with.
        state: what it goes on from beside the tensors; small, JSON.
    """
    rank, directory = dist.get_rank(), checkpoint_directory(run_dir, step)
    if rank == 0:
        if (directory / MANIFEST).exists():
            raise RuntimeError(f"{directory} is committed already and is never written twice")
        shutil.rmtree(directory, ignore_errors=True)  # torn by an earlier death: no manifest
        directory.mkdir(parents=True)
        write_config(engine.module.lm.config, directory / "config.json")
    dist.barrier()
    engine.save_checkpoint(str(directory), tag=ZERO, save_latest=False)
    save_file(_rng_state(), directory / f"rng_rank_{rank}.safetensors")
    dist.barrier()
    mine = {str(path.relative_to(directory)): _settle(path) for path in _files_of(rank, directory)}
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)  # every rank's files are durable once this returns
    if rank == 0:
        manifest = {
            "format": FORMAT_VERSION,
            "step": step,
            "world_size": dist.get_world_size(),
            "contract": dict(contract),
            "state": dict(state),
            "files": {name: entry for files in gathered for name, entry in sorted(files.items())},
        }
        fsync_path(directory / ZERO)
        write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        fsync_path(directory.parent)
    dist.barrier()
    return directory


def resumable_step(run_dir: Path, contract: Mapping[str, Any], trainer: TrainerConfig) -> tuple[Path | None, int]:
    """The checkpoint that this run goes on from, or None, and its step; before a model is built. Collective.

    Rank 0 looks, so that all ranks mean the same one; each rank reads back the files that it wrote.

    Raises:
        ValueError: on every rank, for a damaged checkpoint, another world size, a contract that differs in an entry
            that ``trainer.accept`` does not name, or committed checkpoints where the run was told not to resume.
    """
    found = [find_checkpoint(run_dir)]
    dist.broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint is None:
        return None, 0
    if not trainer.resume:
        raise ValueError(
            f"trainer.resume=false, but {run_dir} holds {checkpoint.name}, which is never overwritten; choose another "
            "run_name or remove that directory"
        )
    manifest = read_manifest(checkpoint)
    check_contract(manifest["contract"], contract, trainer.accept)
    check_world_size(checkpoint, manifest, dist.get_world_size())
    _agree(_damage(checkpoint))
    return checkpoint, int(manifest["step"])


def check_world_size(checkpoint: Path, manifest: Mapping[str, Any], world_size: int) -> None:
    """Raise ValueError where another number of ranks wrote the checkpoint."""
    saved = manifest["world_size"]
    if saved != world_size:
        raise ValueError(f"{checkpoint} was saved by {saved} ranks and this run has {world_size}; resume with {saved}")


def _damage(checkpoint: Path) -> str | None:
    try:
        verify_checkpoint(checkpoint, dist.get_rank())
    except ValueError as error:
        return str(error)
    return None


def _agree(problem: str | None) -> None:
    """Raise the first rank's problem on every rank."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise ValueError(first)


def load_checkpoint(engine: Any, checkpoint: Path) -> None:
    """Bring engine and random state back to a checkpoint that was found resumable. Collective."""
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ZERO)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint / ZERO}")
    _restore_rng(load_file(checkpoint / f"rng_rank_{dist.get_rank()}.safetensors"))


def check_contract(saved: Mapping[str, Any], present: Mapping[str, Any], accept: list[str]) -> None:
    """Raise ValueError naming each entry that differs and is not accepted by name."""
    unknown = set(accept) - set(present)
    if unknown:
        raise ValueError(f"trainer.accept={sorted(unknown)} names no contract entry; there are: {', '.join(present)}")
    differing = [k for k in present if saved.get(k) != present[k] and k not in accept]
    if differing:
        told = "; ".join(line for key in differing for line in _changes(key, saved.get(key), present[key]))
        raise ValueError(
            f"this run is not the one that was saved: {told}. Restore the settings, choose another run_name, or accept "
            f"the change by name: trainer.accept=[{','.join(differing)}]"
        )


def _changes(name: str, saved: Any, present: Any) -> list[str]:
    """The leaves in which two contract entries differ, in words; a hash says nothing that its source does not."""
    if isinstance(saved, dict) and isinstance(present, dict):
        keys = [k for k in present if saved.get(k) != present[k] and not k.endswith("sha256")]
        return [line for key in keys for line in _changes(f"{name}.{key}", saved.get(key), present[key])]
    return [f"{name} was {saved!r}, is {present!r}"]


def _owner(path: Path) -> int:
    """The rank that wrote a file: the one whose number it carries, else 0."""
    numbered = re.search(r"_rank_(\d+)", path.name)
    return int(numbered.group(1)) if numbered else 0


def _files_of(rank: int, directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and _owner(path) == rank)


def _settle(path: Path) -> dict[str, Any]:
    """Flush a file to its disk and describe it."""
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

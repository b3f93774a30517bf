"""Committed checkpoints: a directory of files that exists once its manifest does.

In the background, a rank's part is written by a thread from a snapshot in host memory while training goes on. DeepSpeed
0.19.8 has engines of its own for this. FastCheckpointEngine pins its buffers and so fails without a GPU; the decoupled
one shares the tensors with a second process instead of copying them, so the next optimizer step waits for the disk, and
it gives a write five minutes. Neither hashes what it writes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ropewalk.errors import UserError
from ropewalk.files import blake3_of, fsync_path, inside, open_like_directory, sha256_of, write_atomically
from ropewalk.model.learned_rotary import saved_config
from ropewalk.model.load import write_config
from ropewalk.runs.directory import MANIFEST, MANIFEST_FORMAT, ZERO, RunDirectory, read_manifest
from ropewalk.training.distributed import gather, together

T = TypeVar("T")


def find_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest committed checkpoint of a run, or None. A directory without a manifest is not a checkpoint."""
    return RunDirectory(Path(run_dir)).newest_checkpoint()


def verify_checkpoint(checkpoint: str | Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Read files back and compare them with the manifest; returns the manifest.

    Args:
        checkpoint: directory of one step.
        rank: read only this rank's share of the files; if as many ranks saved it, those that it wrote itself.
        world_size: ranks that share the reading.

    Raises:
        UserError: naming the first file that is missing or differs. Nothing is deleted.
    """
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        path = inside(checkpoint, name)
        if _owner(path) % world_size != rank:
            continue
        if not path.is_file():
            raise UserError(f"{path} is missing, but the manifest lists it")
        if path.stat().st_size != expected["bytes"] or not _hashes_to(path, expected):
            raise UserError(f"{path} is not the file that was saved (its size or checksum differs)")
    return manifest


def _hashes_to(path: Path, expected: Mapping[str, Any]) -> bool:
    """Checkpoints have BLAKE3; those of the first weeks SHA-256, which took longer than the writing."""
    if "blake3" in expected:
        return blake3_of(path) == expected["blake3"]
    return sha256_of(path) == expected["sha256"]


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


def save_checkpoint(
    engine: Any, run_dir: Path, step: int, contract: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Save and wait for it: ``start_save`` and ``commit`` in one. Collective."""
    return start_save(engine, run_dir, step, contract, state, in_background=False).commit()


def start_save(
    engine: Any,
    run_dir: Path,
    step: int,
    contract: Mapping[str, Any],
    state: Mapping[str, Any],
    in_background: bool,
) -> StartedSave:
    """Take everything that a checkpoint holds. Collective.

    Args:
        engine: the DeepSpeed engine; from here on it may change.
        run_dir: the run's directory.
        step: steps taken; the data order needs no other state.
        contract: entries that a resumed run must agree with.
        state: of the run, beside the tensors; small, JSON; rank 0's is written.
        in_background: copy the tensors to host memory, and write and hash them in a thread.

    Raises:
        SaveFailed: on every rank, if one of them could not write. What was written of this step is removed.
    """
    directory = RunDirectory(run_dir).checkpoint(step)
    with _undone(run_dir, step):
        together(_begin, engine, directory, failure=SaveFailed)
        with _recorded_writes(engine, in_background) as (failures, later):
            engine.save_checkpoint(str(directory), tag=ZERO, save_latest=False)
    rng = _rng_state()
    facts = {"step": step, "world_size": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage()}

    def write() -> dict[str, Any]:
        for postponed in later:
            postponed()
        return _settle_share(directory, failures, rng)

    return StartedSave(run_dir, facts, dict(contract), dict(state), Deferred(write, in_background))


class StartedSave:
    """A checkpoint that is being written, and exists once ``commit`` has returned."""

    def __init__(
        self,
        run_dir: Path,
        facts: Mapping[str, int],
        contract: Mapping[str, Any],
        state: Mapping[str, Any],
        share: Deferred[dict[str, Any]],
    ) -> None:
        self.run_dir, self.facts, self.contract, self.state, self.share = run_dir, facts, contract, state, share

    @property
    def step(self) -> int:
        """Steps that it holds."""
        return self.facts["step"]

    def written(self, group: dist.ProcessGroup | None) -> bool:
        """True if every rank has written its files, so that ``commit`` would not wait. Collective."""
        done = torch.tensor([int(self.share.done())])
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=group)
        return bool(done)

    def commit(self) -> Path:
        """Wait for every rank's files, then rename the manifest into place. Collective.

        Raises:
            SaveFailed: on every rank, if one of them could not write. What was written of this step is removed.
        """
        directory = RunDirectory(self.run_dir).checkpoint(self.step)
        with _undone(self.run_dir, self.step):
            files = together(self.share.result, failure=SaveFailed)
            together(_commit, directory, self.facts, self.contract, self.state, files, failure=SaveFailed)
        return directory


@contextmanager
def _undone(run_dir: Path, step: int) -> Iterator[None]:
    """Remove what was written of a step whose save fails: a full disk gets its space back."""
    try:
        yield
    except SaveFailed as error:
        directory = RunDirectory(run_dir).checkpoint(step)
        if dist.get_rank() == 0 and not (directory / MANIFEST).exists():
            shutil.rmtree(directory, ignore_errors=True)
        dist.barrier()
        free = shutil.disk_usage(run_dir).free / 1e9
        raise SaveFailed(
            f"the checkpoint of step {step} could not be written ({error}); {_standing(run_dir)}; {run_dir} has "
            f"{free:,.1f} GB free"
        ) from None


def _begin(engine: Any, directory: Path) -> None:
    if dist.get_rank() != 0:
        return
    if (directory / MANIFEST).exists():
        raise FileExistsError(f"{directory} is committed already and is never written twice")
    shutil.rmtree(directory, ignore_errors=True)  # torn by an earlier death: no manifest
    directory.mkdir(parents=True)
    (directory / ZERO).mkdir()
    write_config(saved_config(engine.module.lm), directory / "config.json")


@contextmanager
def _recorded_writes(engine: Any, in_background: bool) -> Iterator[tuple[list[str], list[Callable[[], None]]]]:
    """Have DeepSpeed's writes note a failure instead of raising it: the other ranks wait in its barriers.

    Yields the failures, and, in the background, the writes of copied tensors that are still to be made.
    """
    failures: list[str] = []
    later: list[Callable[[], None]] = []

    def recorded(write: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
                failures.append(str(error))

        return attempt

    writes = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    for owner, name in writes:
        setattr(owner, name, recorded(getattr(owner, name)))
    if in_background:
        write = engine.checkpoint_engine.save

        def postpone(state_dict: Any, path: str) -> None:
            later.append(partial(write, snapshot(state_dict), path))

        engine.checkpoint_engine.save = postpone
    try:
        yield failures, later
    finally:
        for owner, name in writes:
            delattr(owner, name)


def _settle_share(directory: Path, failures: list[str], rng: dict[str, torch.Tensor]) -> dict[str, Any]:
    """This rank's files, on the disk, with size and checksum."""
    if failures:
        raise OSError(failures[0])
    rank = dist.get_rank()
    save_file(rng, directory / f"rng_rank_{rank}.safetensors")
    open_like_directory(directory / f"rng_rank_{rank}.safetensors")
    with ThreadPoolExecutor(1) as disk:  # which flushes while this thread hashes
        paths = _files_of(rank, directory)
        flushed = [disk.submit(fsync_path, path) for path in paths]
        described = {str(path.relative_to(directory)): _describe(path) for path in paths}
        for flush in flushed:
            flush.result()
    return described


def _commit(
    directory: Path,
    facts: Mapping[str, int],
    contract: Mapping[str, Any],
    state: Mapping[str, Any],
    files: dict[str, Any],
) -> None:
    shares = gather(files)  # every rank's files are durable by now
    if dist.get_rank() != 0:
        return
    manifest = {
        "format": MANIFEST_FORMAT,
        **facts,
        "contract": dict(contract),
        "state": dict(state),
        "files": {name: entry for share in shares for name, entry in sorted(share.items())},
    }
    fsync_path(directory / ZERO)
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    fsync_path(directory.parent)


def _standing(run_dir: Path) -> str:
    newest = find_checkpoint(run_dir)
    return f"{newest.name} stands" if newest else "there is none before it"


def _owner(path: Path) -> int:
    """The rank that wrote a file: the one whose number it carries, else 0."""
    numbered = re.search(r"_rank_(\d+)", path.name)
    return int(numbered.group(1)) if numbered else 0


def _files_of(rank: int, directory: Path) -> list[Path]:
    # A hidden one is what another rank's safetensors is just writing, and is gone a moment later.
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if _owner(path) == rank)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "blake3": blake3_of(path)}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def snapshot(content: Any) -> Any:
    """A copy that no training step changes: every tensor in host memory, with a storage no larger than it shows."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        copied = copy(content)
        copied.update((key, snapshot(value)) for key, value in content.items())
        return copied
    if type(content) in (list, tuple):
        return type(content)(snapshot(value) for value in content)
    return deepcopy(content)


class Deferred(Generic[T]):
    """A function whose result is taken later: run then, or in a thread from now on."""

    def __init__(self, function: Callable[[], T], in_background: bool) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: Exception | None = None
        # No daemon: a process that ends otherwise first finishes the file that it is writing.
        self._thread = Thread(target=self._run, name="checkpoint") if in_background else None
        if self._thread:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:  # raised where the result is taken
            self._error = error

    def done(self, within: float = 0.0) -> bool:
        """True if ``result`` would not wait; a thread gets ``within`` seconds first."""
        if self._thread is None:
            return True
        self._thread.join(within)
        return not self._thread.is_alive()

    def result(self) -> T:
        """The function's result, or the exception that it raised."""
        if self._thread is None:
            return self._function()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

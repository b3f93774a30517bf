"""Saver: when a checkpoint is written, what happens if it cannot be, and which older ones are deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ropewalk.config.train import TrainConfig
from ropewalk.files import fsync_path, inside
from ropewalk.runs.directory import MANIFEST, RunDirectory, read_manifest
from ropewalk.runs.launch import EXIT_REQUEUE
from ropewalk.runs.record import recorded_config
from ropewalk.training.checkpoint.save import SaveFailed, StartedSave, start_save
from ropewalk.training.distributed import control_group, log_once
from ropewalk.training.guards import TrainingStopped
from ropewalk.training.hooks import Hook, Step
from ropewalk.training.run_logger import RunLogger


class Saver(Hook):
    """Saves every ``checkpoint_every`` steps, after the last one, and before leaving early.

    A save that fails on the way (a full disk) is a warning, and the next one tries again: the checkpoint before it
    stands, and training on loses less than stopping. One that fails at the end is an error.

    With ``trainer.save_in_background`` the saves on the way are copied and written by a thread. They are committed at
    the end of the first step by which every rank has written, or before the next save, which waits for them.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        *,
        contract: Mapping[str, Any],
        state: Callable[[], Mapping[str, Any]],
        logger: RunLogger,
        saved_step: int,
        last_step: int,
    ) -> None:
        """Save nothing yet.

        Args:
            engine: the DeepSpeed engine.
            config: of the run.
            contract: entries that a resumed run must agree with.
            state: gives, at each save, what a resumed run goes on from beside the tensors; small, JSON.
            logger: brings its rows to the disk before a save, and leaves saves out of the steps' speed.
            saved_step: steps in the checkpoint that the session began with.
            last_step: the session ends after so many.
        """
        self.engine, self.trainer, self.contract, self.state = engine, config.trainer, contract, state
        self.config = recorded_config(config)
        self.run_dir, self.logger = Path(config.run_dir), logger
        self.saved_step, self.last_step = saved_step, last_step
        self.started: StartedSave | None = None
        self.group = control_group(self.trainer.device) if self.trainer.save_in_background else None

    def after_step(self, step: Step) -> None:
        """Save if it is time to, and delete the checkpoints that are not kept. Collective."""
        every = self.trainer.checkpoint_every
        if self.started is not None and self.started.written(self.group):
            self.settle()
        if every and step.number == self.last_step:
            self._save(step.number)
        elif every and step.number % every == 0:
            with self._failure_is_a_warning():
                self._start(step.number)

    def before_exit(self, steps: int, reason: str) -> None:
        """Save the finished steps, unless that is done or nothing is ever saved. Collective."""
        self.settle()
        if self.trainer.checkpoint_every and steps > self.saved_step:
            self._save(steps)
        outcome = "saved" if self.trainer.checkpoint_every else "not saved, as trainer.checkpoint_every=null says"
        log_once(f"{reason}: step {steps} is {outcome}; leaving with exit code {EXIT_REQUEUE}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TrainingStopped):  # by all ranks, so they can still commit what is being written
            self.settle()

    def settle(self) -> None:
        """Commit what is being written in the background, if anything is; a failure is a warning. Collective."""
        if self.started is None:
            return
        started, self.started = self.started, None
        with self._failure_is_a_warning(), self.logger.clock_stopped("checkpoint"):
            self._commit(started)

    def _save(self, step: int) -> None:
        self.settle()
        with self.logger.clock_stopped("checkpoint"):
            self._commit(self._begin(step, in_background=False))

    def _start(self, step: int) -> None:
        if not self.trainer.save_in_background:
            self._save(step)
            return
        self.settle()
        with self.logger.clock_stopped("checkpoint"):
            self.started = self._begin(step, in_background=True)

    def _begin(self, step: int, in_background: bool) -> StartedSave:
        self.logger.settle()
        state = {**self.state(), "config": self.config}  # resolved, for whoever finds the checkpoint alone
        return start_save(self.engine, self.run_dir, step, self.contract, state, in_background)

    def _commit(self, started: StartedSave) -> None:
        started.commit()
        self.saved_step = started.step
        if self.logger.ranks.is_main:
            try:
                prune_checkpoints(self.run_dir, self.trainer.keep_last, self.trainer.keep_every)
            except OSError as error:  # the other ranks would wait for this one in vain
                log_once(f"warning: old checkpoints could not be deleted ({error}); the next save tries again")

    @contextmanager
    def _failure_is_a_warning(self) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            every = self.trainer.checkpoint_every
            log_once(f"warning: {error}; training goes on, the next save is due in {every} steps")


def prune_checkpoints(run_dir: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete the checkpoints that are not kept; call it on one rank, after a save.

    Kept are the newest ``keep_last`` (at least 1), and those whose step is a multiple of ``keep_every``. A checkpoint
    with a file missing or of another size is left for a person to look at and does not count. The manifest goes first,
    so a death in between leaves a directory that nothing takes for a checkpoint; such directories before the newest
    checkpoint are removed too.

    Args:
        run_dir: the run's directory.
        keep_last: None: nothing is deleted.
        keep_every: steps; None: none but the last.

    Returns:
        The directories that are gone.
    """
    if keep_last is None:
        return []
    run = RunDirectory(run_dir)
    steps = run.saved_checkpoints()
    whole = [path for path in steps if _is_whole(path)]
    kept = set(whole[-max(keep_last, 1) :])
    if keep_every is not None:
        kept |= {path for path in whole if int(read_manifest(path)["step"]) % keep_every == 0}
    torn = [path for path in steps if not (path / MANIFEST).exists() and whole and path < whole[-1]]
    expendable = sorted([*(path for path in whole if path not in kept), *torn])
    for path in expendable:
        (path / MANIFEST).unlink(missing_ok=True)
        fsync_path(path)
        shutil.rmtree(path)
    return expendable


def _is_whole(checkpoint: Path) -> bool:
    """Committed, and every file there with its size; hashing all of it at every save would take too long."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (ValueError, KeyError, OSError):  # none, or damaged
        return False
    paths = {inside(checkpoint, name): entry["bytes"] for name, entry in files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

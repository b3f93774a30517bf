"""Saver: when a checkpoint is written, and what happens if it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ropewalk.config.train import TrainConfig
from ropewalk.runs.provenance import recorded_config
from ropewalk.training.checkpoint.retention import prune_checkpoints
from ropewalk.training.checkpoint.save import SaveFailed, StartedSave, start_save
from ropewalk.training.distributed import control_group, log_once
from ropewalk.training.guards import TrainingStopped
from ropewalk.training.hooks import Hook, Step
from ropewalk.training.run_logger import RunLogger
from ropewalk.training.signals import EXIT_REQUEUE


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

"""When a checkpoint is written, and what happens where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ropewalk.config import TrainConfig
from ropewalk.provenance import recorded_config
from ropewalk.training.checkpoint import SaveFailed, StartedSave, start_save
from ropewalk.training.distributed import control_group
from ropewalk.training.observer import Observer
from ropewalk.training.retention import prune_checkpoints
from ropewalk.training.signals import EXIT_REQUEUE


class Saver:
    """Saves every ``checkpoint_every`` steps, after the last one, and before leaving early.

    A save that fails on the way (a full disk) is told and tried again at the next one: the checkpoint before it stands,
    and training on loses less than stopping. One that fails at the end is an error.

    With ``trainer.save_in_background`` the saves on the way are copied and written by a thread. They are committed at
    the end of the first step by which every rank has written, or before the next save, which waits for them.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainConfig,
        contract: Mapping[str, Any],
        state: Callable[[], Mapping[str, Any]],
        observer: Observer,
        start: int,
        last: int,
    ) -> None:
        """Args as of save_checkpoint; ``state`` is asked at each save; the session goes from ``start`` to ``last``."""
        self.engine, self.trainer, self.contract, self.state = engine, config.trainer, contract, state
        self.config = recorded_config(config)
        self.run_dir, self.observer = Path(config.run_dir), observer
        self.saved, self.last = start, last
        self.started: StartedSave | None = None
        self.group = control_group(self.trainer.device) if self.trainer.save_in_background else None

    def after(self, step: int) -> None:
        """Save if it is time to, and delete what is not kept. Collective."""
        every = self.trainer.checkpoint_every
        if self.started is not None and self.started.written(self.group):
            self.settle()
        if every and step == self.last:
            self._save(step)
        elif every and step % every == 0:
            with self._told():
                self._start(step)

    def before_leaving(self, step: int, reason: str) -> None:
        """Save the ``step`` steps that were finished, unless that is done or nothing is ever saved. Collective."""
        self.settle()
        if self.trainer.checkpoint_every and step > self.saved:
            self._save(step)
        kept = "saved" if self.trainer.checkpoint_every else "not saved, as trainer.checkpoint_every=null says"
        self.observer.say(f"{reason}: step {step} is {kept}; leaving with exit code {EXIT_REQUEUE}")

    def settle(self) -> None:
        """Commit what is being written in the background, if anything is; a failure is told. Collective."""
        if self.started is None:
            return
        started, self.started = self.started, None
        with self._told(), self.observer.clock_stopped("checkpoint"):
            self._commit(started)

    def _save(self, step: int) -> None:
        self.settle()
        with self.observer.clock_stopped("checkpoint"):
            self._commit(self._begin(step, in_background=False))

    def _start(self, step: int) -> None:
        if not self.trainer.save_in_background:
            self._save(step)
            return
        self.settle()
        with self.observer.clock_stopped("checkpoint"):
            self.started = self._begin(step, in_background=True)

    def _begin(self, step: int, in_background: bool) -> StartedSave:
        self.observer.settle()
        state = {**self.state(), "config": self.config}  # resolved, for whoever finds the checkpoint alone
        return start_save(self.engine, self.run_dir, step, self.contract, state, in_background)

    def _commit(self, started: StartedSave) -> None:
        started.commit()
        self.saved = started.step
        if self.observer.ranks.is_main:
            try:
                prune_checkpoints(self.run_dir, self.trainer.keep_last, self.trainer.keep_every)
            except OSError as error:  # the other ranks would wait for this one in vain
                self.observer.say(f"warning: old checkpoints could not be deleted ({error}); the next save tries again")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            every = self.trainer.checkpoint_every
            self.observer.say(f"warning: {error}; training goes on, the next save is due in {every} steps")

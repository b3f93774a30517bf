"""When a checkpoint is written, and what happens where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ropewalk.config import TrainConfig
from ropewalk.training.checkpoint import SaveFailed, save_checkpoint
from ropewalk.training.observer import Observer
from ropewalk.training.retention import prune_checkpoints
from ropewalk.training.signals import EXIT_REQUEUE


class Saver:
    """Saves every ``checkpoint_every`` steps, after the last one, and before leaving early.

    A save that fails on the way (a full disk) is told and tried again at the next one: the checkpoint before it stands,
    and training on loses less than stopping. One that fails at the end is an error.
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
        self.run_dir, self.observer = Path(config.run_dir), observer
        self.saved, self.last = start, last

    def after(self, step: int) -> None:
        """Save if it is time to, and delete what is not kept. Collective."""
        every = self.trainer.checkpoint_every
        if every and step == self.last:
            self._save(step)
        elif every and step % every == 0:
            try:
                self._save(step)
            except SaveFailed as error:
                self.observer.say(f"warning: {error}; training goes on, the next save is due in {every} steps")

    def before_leaving(self, step: int, reason: str) -> None:
        """Save the ``step`` steps that were finished, unless that is done or nothing is ever saved. Collective."""
        if self.trainer.checkpoint_every and step > self.saved:
            self._save(step)
        kept = "saved" if self.trainer.checkpoint_every else "not saved, as trainer.checkpoint_every=null says"
        self.observer.say(f"{reason}: step {step} is {kept}; leaving with exit code {EXIT_REQUEUE}")

    def _save(self, step: int) -> None:
        with self.observer.clock_stopped("checkpoint"):
            self.observer.settle()
            save_checkpoint(self.engine, self.run_dir, step, self.contract, self.state())
            if self.observer.ranks.is_main:
                prune_checkpoints(self.run_dir, self.trainer.keep_last, self.trainer.keep_every)
        self.saved = step

"""Hooks: the moments of the training loop at which logging, saving, guards and the others act."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Step:
    """One step of the optimizer, as it went; equal on all ranks.

    Attributes:
        number: from 1.
        order_step: step of the data order whose global batch it took, from 0.
        trained_tokens: of the global batch.
        learning_rate: of the step.
        loss: of the global batch, nats per trained token.
        grad_norm: of the whole gradient before clipping; not finite if the step was refused for that.
        refused: why the weights were left as they were; None: they were updated.
        is_spike: refused for a loss that is finite, and too high.
        refused_steps: refused so far, this one included.
    """

    number: int
    order_step: int
    trained_tokens: int
    learning_rate: float
    loss: float
    grad_norm: float
    refused: str | None = None
    is_spike: bool = False
    refused_steps: int = 0


class Hook:
    """Base class of what acts at moments of the loop; each method does nothing unless a subclass says otherwise.

    A hook is entered before the first step and left after the last one, whatever ended the run. All ranks call the
    same hooks in the same order, so a method may be collective.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def before_step(self, number: int) -> None:
        """Act before the batch of step ``number`` (from 1) is taken."""

    def before_micro_batch(self) -> None:
        """Act before each micro batch; StopRequested, raised on all ranks, gives the step up and leaves the run."""

    def after_step(self, step: Step) -> None:
        """Act on a finished step."""

    def before_exit(self, steps: int, reason: str) -> None:
        """Act before the run is left on request, after ``steps`` finished steps."""

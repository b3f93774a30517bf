"""The learning-rate schedule: warm-up, plateau and decay, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from ropewalk.config.train import TrainerConfig

# Shape of the decay: share of it that is done, 0 to 1 -> share of the way from floor to peak that is left, 1 to 0.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def learning_rate(step: int, trainer: TrainerConfig) -> float:
    """Linear warm-up to the peak, the peak, then the decay to the floor: nothing to save, nothing to restore.

    ``decay_ratio=1`` has no plateau, ``decay_ratio=0`` no decay. With one between it is the warm-up-stable-decay of
    MiniCPM (arXiv 2404.06395, section 4).

    Args:
        step: 0-based index of the step about to be taken.
        trainer: peak ``learning_rate``, ``warmup_ratio``, ``decay_ratio`` and ``max_steps``. The decay begins with a
            step at the peak, and the last step is at the floor, ``min_lr_ratio`` x peak.
    """
    warmup, decay = phases(trainer)
    if step < warmup:
        return trainer.learning_rate * (step + 1) / warmup
    if step < decay:
        return trainer.learning_rate
    done = (step - decay) / max(1, trainer.max_steps - 1 - decay)
    left = DECAYS[trainer.schedule](min(1.0, done))
    return trainer.learning_rate * (trainer.min_lr_ratio + (1 - trainer.min_lr_ratio) * left)


def phases(trainer: TrainerConfig) -> tuple[int, int]:
    """The first step after the warm-up, and the first of the decay; the latter is max_steps where there is none."""
    warmup, decay = (_steps(share, trainer.max_steps) for share in (trainer.warmup_ratio, trainer.decay_ratio))
    return warmup, max(warmup, trainer.max_steps - decay)


def _steps(share: float, steps: int) -> int:
    """A share of the steps, as its decimals say, rounded up: 0.07 of 100 is 7, where floats make 7.000000000000001."""
    return math.ceil(Fraction(repr(float(share))) * steps)


def describe_schedule(trainer: TrainerConfig) -> str:
    """The phases in words, without those of no steps."""
    warmup, decay = phases(trainer)
    spans = {
        f"of warm-up to {trainer.learning_rate:g}": warmup,
        f"at {trainer.learning_rate:g}": decay - warmup,
        f"of {trainer.schedule} decay to {trainer.learning_rate * trainer.min_lr_ratio:g}": trainer.max_steps - decay,
    }
    return ", ".join(f"{steps:,} {words}" for words, steps in spans.items() if steps)

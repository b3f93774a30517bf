"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ropewalk.config.train import TrainerConfig


def learning_rate(step: int, trainer: TrainerConfig) -> float:
    """Linear warm-up to the peak, then a half cosine down to the floor.

    Args:
        step: 0-based index of the step about to be taken.
        trainer: peak ``learning_rate``, ``warmup_ratio`` and ``max_steps``; the floor is ``min_lr_ratio`` x peak,
            reached at the last step.
    """
    warmup = math.ceil(trainer.warmup_ratio * trainer.max_steps)
    if step < warmup:
        return trainer.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, trainer.max_steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return trainer.learning_rate * (trainer.min_lr_ratio + (1 - trainer.min_lr_ratio) * cosine)

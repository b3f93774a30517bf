"""Lines on the terminal."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any


def tell(line: str) -> None:
    """Print a line. That the log's disk is full, or its reader gone, is no reason for a rank to leave the others."""
    with suppress(OSError):  # nowhere to say so; what was not printed is still in Python's buffer
        print(line, flush=True)


class Progress:
    """The line a person watches: step, loss, tokens per second, time left."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self.first_step, self.max_steps, self.start = first_step, max_steps, time.monotonic()

    def line(self, row: dict[str, Any]) -> str:
        """Format a metrics row; the remaining time is the mean of this session's steps times those left."""
        done = row["step"] - self.first_step
        left = (time.monotonic() - self.start) / done * (self.max_steps - row["step"])
        minutes, seconds = divmod(round(left), 60)
        return (
            f"step {row['step']:>5}/{self.max_steps}  loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:>7,.0f} tok/s  ETA {minutes}:{seconds:02d}"
        )

"""A printed line for each finished piece of work, with the time that is left."""

from __future__ import annotations

import time
from datetime import timedelta


class Progress:
    """Share of the work done and the time left, judged by tokens.

    Args:
        total: tokens of all forward passes to come.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.started = time.perf_counter()

    def advance(self, tokens: int, what: str) -> None:
        """Count ``tokens`` as done and print the line."""
        self.done += tokens
        elapsed = time.perf_counter() - self.started
        left = timedelta(seconds=round(elapsed * (self.total - self.done) / self.done))
        print(f"evaluate {self.done / self.total:4.0%}  ETA {left}  {what}", flush=True)

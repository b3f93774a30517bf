"""A printed line for each finished piece of work, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")
TOLD_EVERY = 30.0  # seconds


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


def told(items: Sequence[Item], what: str, every: float = TOLD_EVERY) -> Iterator[Item]:
    """The items one by one; after ``every`` seconds at the earliest, a line says how many are done and what is left.

    Args:
        items: pieces of work of about one size.
        what: they are, e.g. "prompts".
        every: seconds between two lines.
    """
    started = said = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - said >= every and done < len(items):
            said, left = now, timedelta(seconds=round((now - started) * (len(items) - done) / done))
            print(f"  {done:,} of {len(items):,} {what}, ETA {left}", flush=True)

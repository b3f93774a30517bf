"""Background saves: a rank's part is written from a snapshot in host memory, by a thread, while training goes on.

DeepSpeed 0.19.8 has engines of its own for this. FastCheckpointEngine pins its buffers and so fails without a GPU; the
decoupled one shares the tensors with a second process instead of copying them, so the next optimizer step waits for the
disk, and it gives a write five minutes. Neither hashes what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from threading import Thread
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def snapshot(content: Any) -> Any:
    """A copy that no training step changes: every tensor in host memory, with a storage no larger than it shows."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        copied = copy(content)
        copied.update((key, snapshot(value)) for key, value in content.items())
        return copied
    if type(content) in (list, tuple):
        return type(content)(snapshot(value) for value in content)
    return deepcopy(content)


class Deferred(Generic[T]):
    """A function whose result is taken later: run then, or in a thread from now on."""

    def __init__(self, function: Callable[[], T], in_background: bool) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: Exception | None = None
        # No daemon: a process that ends otherwise first finishes the file that it is writing.
        self._thread = Thread(target=self._run, name="checkpoint") if in_background else None
        if self._thread:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:  # raised where the result is taken
            self._error = error

    def done(self, within: float = 0.0) -> bool:
        """True if ``result`` would not wait; a thread gets ``within`` seconds first."""
        if self._thread is None:
            return True
        self._thread.join(within)
        return not self._thread.is_alive()

    def result(self) -> T:
        """The function's result, or the exception that it raised."""
        if self._thread is None:
            return self._function()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

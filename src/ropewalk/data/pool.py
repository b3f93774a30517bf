"""Independent pieces of work in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_processes(
    function: Callable[..., Result], works: Sequence[tuple[Any, ...]], workers: int | None
) -> Iterator[tuple[int, Result]]:
    """``function(*work)`` of each work, with its place in ``works``, in the order in which they finish.

    Args:
        function: of a module, so that a process finds it.
        works: arguments, begun in this order.
        workers: processes; 1: none but this one; None: one for each core that this process may use.

    Raises:
        ValueError: the first one that a work raised.

    Whatever is raised, in a work or while the caller holds a result, what has not begun is left.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(works))
    if workers <= 1:
        yield from ((place, function(*work)) for place, work in enumerate(works))
        return
    started_anew = multiprocessing.get_context("spawn")  # a fork would inherit the locks that other threads hold
    with ProcessPoolExecutor(workers, started_anew, initializer=_alone) as pool:
        running = {pool.submit(function, *work): place for place, work in enumerate(works)}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException as error:  # also an interrupt, and GeneratorExit where the caller stops
            pool.shutdown(cancel_futures=True)
            if isinstance(error, ValueError):
                raise ValueError(str(error)) from error
            raise


def _alone() -> None:
    """One thread a process: the processes are as many as the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

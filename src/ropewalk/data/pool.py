"""Independent pieces of work in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_processes(
    function: Callable[..., Result], works: Sequence[tuple[Any, ...]], workers: int | None
) -> Iterator[tuple[int, Result]]:
    """``function(*work)`` of each work, with its place in ``works``, in the order in which they finish.

    Args:
        function: of a module, so that a process finds it.
        works: arguments, begun in this order.
        workers: processes, this one among them, which works too; None: one for each core that this process may use.

    Raises:
        ValueError: the first one that a work raised.

    Whatever is raised, in a work or while the caller holds a result, what has not begun is left.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(works))
    if workers <= 1:
        yield from ((place, function(*work)) for place, work in enumerate(works))
        return
    waiting = deque(enumerate(works))
    finished: SimpleQueue[tuple[int, Future[Result]]] = SimpleQueue()
    started_anew = multiprocessing.get_context("spawn")  # a fork would inherit the locks that other threads hold

    def feed() -> None:
        """Keep one process at work."""
        while (mine := _taken(waiting)) is not None:
            place, work = mine
            try:
                outcome = pool.submit(function, *work)
            except RuntimeError as error:  # a pool that lost a process takes no more
                outcome = Future()
                outcome.set_exception(error)
            wait([outcome])
            finished.put((place, outcome))

    others = workers - 1
    with (
        ProcessPoolExecutor(others, started_anew, initializer=_alone) as pool,
        ThreadPoolExecutor(others) as feeders,
        _restored("TOKENIZERS_PARALLELISM"),
    ):
        _alone()
        for _ in range(others):
            feeders.submit(feed)
        try:
            for _ in works:
                if finished.empty() and (mine := _taken(waiting)) is not None:
                    yield mine[0], function(*mine[1])
                else:
                    place, outcome = finished.get()
                    yield place, outcome.result()
        except BaseException as error:  # also an interrupt, and GeneratorExit where the caller stops
            waiting.clear()
            if isinstance(error, ValueError):
                raise ValueError(str(error)) from error
            raise


def _taken(waiting: deque[tuple[int, Any]]) -> tuple[int, Any] | None:
    """The next work, for the one that asks first; None where all are taken."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


@contextmanager
def _restored(name: str) -> Iterator[None]:
    """Give a variable of the environment back the value that it has now."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _alone() -> None:
    """One thread a process: the processes are as many as the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

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

from ropewalk.errors import UserError

Result = TypeVar("Result")


class Processes:
    """This process and others of this machine, which are started when they are first needed and end with the context.

    Args:
        workers: all of them together, this one among them; None: one for each core that this process may use.
    """

    def __init__(self, workers: int | None) -> None:
        self._others = (workers or len(os.sched_getaffinity(0))) - 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _opened(self, works: int) -> tuple[ProcessPoolExecutor | None, int]:
        """The other processes, which start as they get work, and how many of them ``works`` keep busy beside this."""
        others = min(self._others, works - 1)
        if self._pool is None and others > 0:
            started_anew = multiprocessing.get_context("spawn")  # a fork would inherit the locks of other threads
            self._pool = ProcessPoolExecutor(self._others, started_anew, initializer=_alone)
        return self._pool, others

    def start(self, works: int, function: Callable[..., object], *arguments: Any) -> None:
        """Start the others, as many as ``works`` pieces of work will need, with a call that prepares them.

        A fault of that call is theirs to meet again when they work.
        """
        pool, others = self._opened(works)
        for _ in range(others):
            assert pool is not None
            pool.submit(_call, function, *arguments)

    def each(self, function: Callable[..., Result], works: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Result]]:
        """``function(*work)`` of each work, with its place in ``works``, in the order in which they finish.

        Args:
            function: of a module, so that a process finds it.
            works: arguments, begun in this order.

        Raises:
            UserError: the first one that a work raised.

        Whatever is raised, in a work or while the caller holds a result, what has not begun is left.
        """
        pool, others = self._opened(len(works))
        if pool is None or others <= 0:
            yield from ((place, function(*work)) for place, work in enumerate(works))
            return
        waiting = deque(enumerate(works))
        finished: SimpleQueue[tuple[int, Future[Result]]] = SimpleQueue()

        def feed() -> None:
            """Keep one process at work."""
            while (mine := _taken(waiting)) is not None:
                place, work = mine
                try:
                    outcome = pool.submit(function, *work)
                except BaseException as error:  # one cannot be started, or the pool has lost one and takes no more
                    outcome = Future()
                    outcome.set_exception(error)
                wait([outcome])
                finished.put((place, outcome))

        with ThreadPoolExecutor(others) as feeders, _restored("TOKENIZERS_PARALLELISM"):
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
                if isinstance(error, UserError):
                    raise UserError(str(error)) from error
                raise


def _call(function: Callable[..., object], *arguments: Any) -> None:
    """Without the result, which would be sent back."""
    function(*arguments)


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

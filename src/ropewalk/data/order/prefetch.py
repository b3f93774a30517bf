"""Work done ahead in a background thread, so that a training step finds its data ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ropewalk.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetched(load: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Generator[Result, None, None]:
    """``load(item)`` for every item, in order, made up to ``depth`` items ahead of what has been taken.

    One thread loads, one item after the other; at most ``depth`` results wait. An error of ``load`` is raised where
    its result would have been taken, and nothing is loaded after it is seen. The thread is gone when the iterator is
    exhausted, closed or dropped, at the latest when the process ends, which waits for the load in progress.

    Args:
        load: called in the thread.
        items: consumed in the caller's thread.
        depth: results ahead, 1 or more.

    Raises:
        UserError: for a depth below 1.
    """
    if depth < 1:
        raise UserError(f"depth={depth} must be 1 or more; 2 keeps one result ready while another is loaded")
    return _prefetched(load, iter(items), depth)


def _prefetched(load: Callable[[Item], Result], items: Iterator[Item], depth: int) -> Generator[Result, None, None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead: deque[Future[Result]] = deque(pool.submit(load, item) for item in islice(items, depth))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(load, item) for item in islice(items, 1))
            yield result
            del result  # the caller's to free while the next is loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

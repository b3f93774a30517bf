"""What one rank fails at, all ranks fail at: none waits in a collective for another that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from safetensors import SafetensorError

T = TypeVar("T")


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem, on every rank; None where no rank has one. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p is not None), None)


def together(work: Callable[..., T], *arguments: Any, failure: type[Exception] = ValueError) -> T:
    """Do this rank's part of something, and return what it gave. Collective.

    Raises:
        failure: on every rank, with the same words, where any rank's part raised OSError or ValueError.
    """
    problem, result, cause = None, None, None
    try:
        result = work(*arguments)
    except (OSError, ValueError, SafetensorError) as error:
        problem = str(error) if isinstance(error, ValueError) else f"rank {dist.get_rank()}: {error}"
        cause = error
    problem = first_problem(problem)
    if problem is not None:
        raise failure(problem) from cause
    return cast(T, result)


def by_rank_zero(work: Callable[..., T], *arguments: Any) -> T:
    """Have rank 0 do something; what it gave, on every rank. Collective.

    Raises:
        ValueError: on every rank, where it raised OSError or ValueError.
    """
    found = [together(lambda: work(*arguments) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(found)
    return cast(T, found[0])


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Make an OSError of what writes into a run's directory a ValueError that says where, and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"run_dir={run_dir} cannot be written ({error}); free space there, or choose another run_dir or "
            "paths.output_dir"
        ) from error

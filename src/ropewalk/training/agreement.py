"""What one rank fails at, all ranks fail at: none waits in a collective for another that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from safetensors import SafetensorError

from ropewalk.errors import UserError

T = TypeVar("T")


def first_problem(problem: T | None) -> T | None:
    """The first rank's problem, on every rank; None where no rank has one. Collective."""
    problems: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p is not None), None)


def together(work: Callable[..., T], *arguments: Any, failure: type[Exception] = UserError) -> T:
    """Do this rank's part of something, and return what it gave. Collective.

    Raises:
        failure: on every rank, with the same words, where any rank's part raised OSError or UserError.
        Exception: where it raised another ValueError, which is a fault of the program: itself on its own rank, as
            RuntimeError on the others.
    """
    problem, result, cause = None, None, None
    try:
        result = work(*arguments)
    except (OSError, ValueError, SafetensorError) as error:
        words = str(error) if isinstance(error, UserError) else f"rank {dist.get_rank()}: {error}"
        is_fault = isinstance(error, ValueError) and not isinstance(error, UserError)
        problem, cause = (words, is_fault), error
    problem = first_problem(problem)
    if problem is not None:
        words, is_fault = problem
        if is_fault and failure is UserError:
            raise cause or RuntimeError(words)
        raise failure(words) from cause
    return cast(T, result)


def by_rank_zero(work: Callable[..., T], *arguments: Any) -> T:
    """Have rank 0 do something; what it gave, on every rank. Collective.

    Raises:
        UserError: on every rank, where it raised OSError or UserError.
    """
    found = [together(lambda: work(*arguments) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(found)
    return cast(T, found[0])


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Make an OSError of what writes into a run's directory a UserError that says where, and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir} cannot be written ({error}); free space there, or choose another run_dir or "
            "paths.output_dir"
        ) from error

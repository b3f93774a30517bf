"""Processes that share the samples of an evaluation (data parallel), as torchrun or srun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ropewalk.errors import UserError

T = TypeVar("T")


class Ranks:
    """This process among those that share the work.

    Args:
        is_shared: whether there are others; joins their group, which they must do as well.
    """

    def __init__(self, is_shared: bool) -> None:
        self.is_shared = is_shared
        if self.is_shared and not dist.is_initialized():
            # only scores are exchanged, on the CPU; one rank's long prompts may keep the others waiting for hours
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        self.rank = dist.get_rank() if self.is_shared else 0
        self.size = dist.get_world_size() if self.is_shared else 1

    @classmethod
    def launched(cls) -> Ranks:
        """The ranks that torchrun or srun started, or this process alone."""
        return cls(int(os.environ.get("WORLD_SIZE", "1")) > 1)

    @classmethod
    def alone(cls) -> Ranks:
        """This process alone, whatever else runs."""
        return cls(is_shared=False)

    def device(self, kind: str) -> str:
        """This process's own device: ``cuda`` becomes ``cuda:<local rank>``.

        Raises:
            UserError: for ``auto`` among several processes, each of which would take all GPUs.
        """
        if kind == "auto" and self.is_shared:
            raise UserError("device=auto spreads one model over all GPUs; start one process, without torchrun")
        if kind != "cuda" or not self.is_shared:
            return kind
        return f"cuda:{self.rank % torch.cuda.device_count()}"

    def gather(self, item: Any) -> list[Any]:
        """The item of every rank, in their order, on every rank. Collective."""
        if not self.is_shared:
            return [item]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, item)
        return gathered

    def first_alone(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, on rank 0 before the others: it may write what they then read. Collective.

        Raises:
            UserError: on the other ranks, where it raised on rank 0; there, what it raised.
        """
        if not self.is_shared:
            return work()
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as raised:  # the others must hear of it, whatever it is
                error = raised
        problem = self.gather(error and f"rank 0: {error}")[0]
        if problem is not None:
            self.close()
            raise error or UserError(problem)
        return cast(T, result) if self.rank == 0 else work()

    def close(self) -> None:
        """Leave the group."""
        if self.is_shared and dist.is_initialized():
            dist.destroy_process_group()

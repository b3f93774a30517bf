"""What a step is measured by: loss by domain and by position, where the time goes, memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ropewalk.data.order.batches import IGNORE_INDEX, Batch
from ropewalk.training.inputs import queued

FIRST_EDGE = 16  # tokens of context in the first bucket of positions
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation")
BETWEEN_STEPS = ("data", "checkpoint", "evaluation")  # waits of the CPU, timed by its clock
T = TypeVar("T")


def position_edges(sequence_length: int) -> list[int]:
    """Upper ends of the buckets of positions, in tokens of context: 16, 32, 64, ... and the sequence length."""
    edges = [FIRST_EDGE]
    while edges[-1] < sequence_length:
        edges.append(min(2 * edges[-1], sequence_length))
    return edges


class Meter:
    """Adds up what the steps since the last row of metrics did. Every rank holds one."""

    def __init__(self, device: torch.device, domains: Sequence[str] = (), sequence_length: int = FIRST_EDGE) -> None:
        """Start at zero.

        Args:
            device: of the losses.
            domains: names in sorted order, as Batch.domain_ids counts them; none: no loss is told apart.
            sequence_length: tokens, for the buckets of positions.
        """
        self.device, self.domains = device, tuple(domains)
        self.edges = position_edges(sequence_length)
        self._edges_on_device = torch.tensor(self.edges, device=device)
        self._cells = len(self.domains) * len(self.edges)
        self._tally = torch.zeros(2, self._cells, dtype=torch.float64, device=device)  # nats, tokens: this step, here
        self._sum = torch.zeros(2, self._cells, dtype=torch.float64)  # all ranks, since the last row
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self.peak_memory = 0.0  # bytes, of the rank that has most

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Count what happens inside to a phase; on a GPU by events in its queue, so that nothing waits for it."""
        if self.device.type != "cuda" or phase in BETWEEN_STEPS:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((phase, begin, end))

    def waited(self, items: Iterable[T]) -> Iterator[T]:
        """The items, the wait for each counted as data."""
        iterator = iter(items)
        while True:
            with self.time("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def token_losses(self, batch: Batch) -> Tensor | None:
        """Where the loss is to leave each token's: fp32 (tokens,); None where nobody asks."""
        return torch.zeros(batch.labels.shape[1], device=self.device) if self.domains else None

    def add(self, batch: Batch, token_losses: Tensor | None) -> None:
        """Sort a micro batch's losses by domain and position; no wait for the device."""
        if token_losses is None:
            return
        trained = batch.labels[0] != IGNORE_INDEX
        domains = self._domain_of_tokens(batch)
        contexts = queued(batch.position_ids[0] + 1, self.device)
        cells = queued(domains, self.device).clamp(min=0) * len(self.edges)
        cells += torch.bucketize(contexts, self._edges_on_device).clamp(max=len(self.edges) - 1)
        counted = queued(trained, self.device).double()
        self._tally[0].index_add_(0, cells, token_losses.double() * counted)
        self._tally[1].index_add_(0, cells, counted)

    @staticmethod
    def _domain_of_tokens(batch: Batch) -> Tensor:
        """int64 (tokens,); where ranks share a row, of this rank's stretch of it."""
        lengths = batch.cu_seqlens.diff().long()
        domains = batch.domain_ids.long().repeat_interleave(lengths)
        here = batch.labels.shape[1]
        stretches = len(domains) // here
        start = (dist.get_rank() % stretches) * here if stretches > 1 else 0
        return domains[start : start + here]

    def reduce(self, total: Tensor) -> float:
        """Sum the loss over all ranks, and everything else in the same message. Collective; waits for the device.

        Args:
            total: float64 scalar, the loss that this rank has summed, nats.
        """
        memory = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        memory[dist.get_rank()] = self._memory()
        message = torch.cat([total[None], self._tally.flatten(), memory.to(self.device)])
        dist.all_reduce(message)
        message = message.cpu()
        if torch.isfinite(message[0]):  # one nan would hide all other steps
            self._sum += message[1 : 1 + 2 * self._cells].view(2, self._cells)
        self._tally.zero_()
        self.peak_memory = float(message[1 + 2 * self._cells :].max())
        return float(message[0])

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def row(self, steps: int) -> dict[str, float]:
        """What was counted since the last row, as entries of the metrics; begins anew.

        ``loss/domain/NAME`` and ``loss/position/N`` (contexts of up to N tokens, from the next smaller N on) are nats
        per trained token, ``tokens/domain/NAME`` trained tokens, ``seconds/PHASE`` a step's; what saw no token, and
        steps whose loss is not finite, are left out.
        """
        for phase, begin, end in self._events:
            end.synchronize()
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        nats, tokens = self._sum.view(2, len(self.domains), len(self.edges))
        row = {f"seconds/{phase}": self._seconds[phase] / steps for phase in PHASES}
        for name, loss, count in zip(self.domains, nats.sum(1).tolist(), tokens.sum(1).tolist(), strict=True):
            row |= {f"loss/domain/{name}": loss / count, f"tokens/domain/{name}": count} if count else {}
        for edge, loss, count in zip(self.edges, nats.sum(0).tolist(), tokens.sum(0).tolist(), strict=True):
            row |= {f"loss/position/{edge}": loss / count} if count else {}
        row["peak_memory_bytes"] = self.peak_memory
        self._sum.zero_()
        self._seconds.clear()
        self._events.clear()
        return row

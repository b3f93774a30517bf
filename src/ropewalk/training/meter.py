"""The measures of a step: loss by domain and by position, where the time goes, memory, and floating-point work."""

from __future__ import annotations

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ropewalk.data import Mixture, SequenceRef
from ropewalk.data.order.batches import IGNORE_INDEX, Batch, micro_batch_slots
from ropewalk.flops import all_pairs, causal_pairs, mean_pairs, sequence_flops
from ropewalk.model.hf_directory import auto_class
from ropewalk.model.load import head_dim, layer_windows
from ropewalk.training.inputs import queued

# Since the session began; on the CPU the first alone. Reserved: what the allocator holds, so what runs out; a retry
# frees what is cached and allocates again.
MEMORY = ("peak_memory_bytes", "peak_reserved_bytes", "allocation_retries")
FIRST_EDGE = 16  # tokens of context in the first bucket of positions
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation")
BETWEEN_STEPS = ("data", "checkpoint", "evaluation")  # waits of the CPU, timed by its clock
# Dense bf16 peak of one device, FLOP/s, from NVIDIA's data sheets, by the name that CUDA gives it.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}
CONVENTIONS = ("documents", "dense_causal", "full_attention")


def position_edges(sequence_length: int) -> list[int]:
    """Upper ends of the buckets of positions, in tokens of context: 16, 32, 64, ... and the sequence length."""
    edges = [FIRST_EDGE]
    while edges[-1] < sequence_length:
        edges.append(min(2 * edges[-1], sequence_length))
    return edges


class Meter:
    """Adds up the measures of the steps since the last row of metrics. Every rank holds one."""

    def __init__(self, device: torch.device, domains: Sequence[str] = (), sequence_length: int = FIRST_EDGE) -> None:
        """Start at zero.

        Args:
            device: of the losses.
            domains: names in sorted order, as Batch.domain_ids counts them; none: no breakdown of the loss.
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
        self.memory: dict[str, float] = {}  # by MEMORY, of the rank that has most

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

    def token_losses(self, batch: Batch) -> Tensor | None:
        """Buffer for per-token losses, fp32 (tokens,); None if no breakdown is logged."""
        return torch.zeros(batch.labels.shape[1], device=self.device) if self.domains else None

    def add(self, batch: Batch, token_losses: Tensor | None) -> None:
        """Add a micro batch's losses up by domain and position, without waiting for the device."""
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
        """Domain of each token, int64 (tokens,); of this rank's stretch if ranks share the row."""
        lengths = batch.cu_seqlens.diff().long()
        domains = batch.domain_ids.long().repeat_interleave(lengths)
        tokens = batch.labels.shape[1]
        stretches = len(domains) // tokens
        start = (dist.get_rank() % stretches) * tokens if stretches > 1 else 0
        return domains[start : start + tokens]

    def reduce(self, total: Tensor) -> float:
        """Sum the loss over all ranks, and everything else in the same message. Collective; waits for the device.

        Args:
            total: float64 scalar, the loss that this rank has summed, nats.
        """
        memory = torch.zeros(dist.get_world_size(), len(MEMORY), dtype=torch.float64)
        memory[dist.get_rank()] = torch.tensor(self._memory())
        message = torch.cat([total[None], self._tally.flatten(), memory.to(self.device).flatten()])
        dist.all_reduce(message)
        message = message.cpu()
        if torch.isfinite(message[0]):  # one nan would hide all other steps
            self._sum += message[1 : 1 + 2 * self._cells].view(2, self._cells)
        self._tally.zero_()
        largest = message[1 + 2 * self._cells :].view(-1, len(MEMORY)).max(0).values.tolist()
        self.memory = dict(zip(MEMORY if self.device.type == "cuda" else MEMORY[:1], largest, strict=False))
        return float(message[0])

    def _memory(self) -> list[float]:
        if self.device.type != "cuda":
            return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, 0.0, 0.0]
        stats = torch.cuda.memory_stats(self.device)
        names = ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries")
        return [float(stats[name]) for name in names]

    def row(self, steps: int) -> dict[str, float]:
        """Entries of a row of metrics, from everything since the last row; begins anew.

        ``loss/domain/NAME`` and ``loss/position/N`` (contexts of up to N tokens, from the next smaller N on) are nats
        per trained token, ``tokens/domain/NAME`` trained tokens, ``seconds/PHASE`` a step's. Entries without a token,
        and steps whose loss is not finite, are left out.
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
        row |= self.memory
        self._sum.zero_()
        self._seconds.clear()
        self._events.clear()
        return row


def known_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU in the table; None for any other device."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class StepWork:
    """Work of one global batch, forward and backward.

    Attributes:
        flops: by convention. Matrix products count 2 FLOPs a multiply-add, backward twice the forward; recomputation
            does not count. Attention counts the pairs of query and key: "documents": causal inside the documents that
            were packed; "dense_causal": causal over the whole row, as if it were one document; "full_attention": all
            pairs of the row (PaLM, arXiv 2204.02311, appendix B).
        imbalance: work of the slowest rank over the mean, micro batch by micro batch, since ZeRO-3 synchronises at
            each; 1: even.
    """

    flops: dict[str, float]
    imbalance: float


class WorkCounter:
    """Counts the work of any step from the store's index, without reading a token."""

    def __init__(self, config: PreTrainedConfig, mixture: Mixture, data_size: int, micro_batch_size: int) -> None:
        """Take the model's shape.

        Args:
            config: of the model.
            mixture: the order.
            data_size: ranks that read different data.
            micro_batch_size: sequences.
        """
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
        counted = (*model.get_decoder().modules(), model.get_output_embeddings())  # a vision tower's work is left out
        self.linear = sum(m.weight.numel() for m in counted if isinstance(m, nn.Linear))
        text = config.get_text_config()
        self.attention_width = text.num_hidden_layers * text.num_attention_heads * head_dim(text)
        self.layers_by_window = Counter(layer_windows(text))
        self.mixture, self.data_size, self.micro_batch_size = mixture, data_size, micro_batch_size
        self.length = mixture.store.sequence_length

    def step(self, step: int) -> StepWork:
        """The work of the global batch of ``step``."""
        slots = micro_batch_slots(self.mixture, step, self.data_size, self.micro_batch_size)
        work = [[sum(self._sequence_flops(ref) for ref in micro) for micro in slot] for slot in slots]
        total, in_slot = sum(map(sum, work)), self.data_size * self.micro_batch_size  # sequences
        flops = {
            "documents": total,
            "dense_causal": len(slots) * (in_slot * self._flops(partial(causal_pairs, self.length))),
            "full_attention": len(slots) * (in_slot * self._flops(partial(all_pairs, self.length))),
        }
        return StepWork(flops, sum(map(max, work)) / (total / self.data_size))

    def _sequence_flops(self, ref: SequenceRef) -> float:
        """FLOPs of one sequence: a document of n tokens has n(n + 1)/2 pairs, or those within a layer's window."""
        store = self.mixture.store

        def pairs(window: int | None) -> float:
            if window is None:
                return (sum(store.attention_cost(ref.domain, row) for row in ref.rows) + self.length) / 2
            lengths = (length for row in ref.rows for length in store.document_lengths(ref.domain, row).tolist())
            return sum(causal_pairs(length, window) for length in lengths)

        return self._flops(pairs)

    def _flops(self, pairs: Callable[[int | None], float]) -> float:
        """FLOPs of one sequence with so many pairs of query and key in a layer with a window."""
        mean = mean_pairs(self.layers_by_window, pairs)
        return sequence_flops(self.linear, self.attention_width, self.length, mean)

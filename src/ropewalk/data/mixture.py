"""The data order: which sequences step k sees, as a pure function of seed, weights, store and k."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.hashing import permutation, stable_unit
from ropewalk.data.store import PackedStore

Heap: TypeAlias = "list[tuple[float, int]]"  # (ideal time, domain position)


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """One sequence of a packed store."""

    domain: str
    index: int


class Mixture:
    """Interleaves the domains of a store in fixed proportions; it holds no state but a cache.

    Draw k of a domain with weight w and offset u has the ideal time (k + u) / w, and the order is the merge
    of all domains by (time, domain). After any N draws a domain has had N * w of them, to within 1 + D * w
    for D domains (seldom more than one). Within a domain of n sequences, draw k is in epoch k // n, and each
    epoch is a permutation of its own.
    """

    def __init__(self, store: PackedStore, weights: Mapping[str, float], seed: int, global_batch_size: int) -> None:
        """Check and normalise the weights.

        Args:
            store: the packed store.
            weights: domain -> share of sequences, in any unit; empty: in proportion to what each has.
            seed: of the order.
            global_batch_size: sequences a step, over all ranks.

        Raises:
            ValueError: for an unknown or empty domain, a weight that is negative or not finite, weights that
                are all zero, or a global batch of no sequences.
        """
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} must be positive; set it to 1 or more")
        self.store = store
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.weights = _normalised(store, weights)
        self.unused = tuple(name for name in sorted(store.domains) if name not in self.weights)
        self._names = tuple(self.weights)
        self._offsets = tuple(stable_unit("offset", seed, name) for name in self._names)
        self._permutations: dict[str, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, step: int) -> list[SequenceRef]:
        """The global batch of ``step`` (from 0), in order: ``global_batch_size`` sequences."""
        counts, heap = self._draws_before(step)
        return [self._sequence(*self._draw(counts, heap)) for _ in range(self.global_batch_size)]

    def trained_tokens(self, step: int) -> int:
        """Tokens that ``step`` predicts, over the whole global batch; read from the store's index alone."""
        return sum(self.store.trained_tokens(ref.domain, ref.index) for ref in self.batch(step))

    def epochs(self, step: int) -> dict[str, float]:
        """How often each domain has been gone through before ``step``."""
        counts, _ = self._draws_before(step)
        return {name: counts[d] / self._size(name) for d, name in enumerate(self._names)}

    def contract(self) -> dict[str, object]:
        """Everything that the order depends on, for a checkpoint to compare on resume."""
        return {
            "weights": dict(self.weights),
            "seed": self.seed,
            "store": self.store.fingerprint,
            "global_batch_size": self.global_batch_size,
            "sequence_length": self.store.sequence_length,
        }

    def _draws_before(self, step: int) -> tuple[list[int], Heap]:
        """Draws that each domain has had before ``step``, and the heap of their next ones."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative; steps count from 0")
        rank = step * self.global_batch_size
        # At most D draws separate the clock from the rank, so these counts never exceed the true ones.
        behind = rank - len(self._names)
        counts = [max(0, math.floor(behind * weight) - 1) for weight in self.weights.values()]
        heap = [(self._time(d, count), d) for d, count in enumerate(counts)]
        heapq.heapify(heap)
        for _ in range(rank - sum(counts)):
            self._draw(counts, heap)
        return counts, heap

    def _draw(self, counts: list[int], heap: Heap) -> tuple[str, int]:
        """Take the earliest draw: its domain and its number in that domain."""
        _, d = heap[0]
        k = counts[d]
        counts[d] += 1
        heapq.heapreplace(heap, (self._time(d, k + 1), d))
        return self._names[d], k

    def _time(self, d: int, k: int) -> float:
        return (k + self._offsets[d]) / self.weights[self._names[d]]

    def _sequence(self, domain: str, k: int) -> SequenceRef:
        epoch, position = divmod(k, self._size(domain))
        cached = self._permutations.get(domain)
        if cached is None or cached[0] != epoch:
            cached = (epoch, permutation(self._size(domain), "order", self.seed, domain, epoch))
            self._permutations[domain] = cached
        return SequenceRef(domain, int(cached[1][position]))

    def _size(self, domain: str) -> int:
        return self.store.domains[domain].sequences


def _normalised(store: PackedStore, weights: Mapping[str, float]) -> dict[str, float]:
    """Positive shares that sum to 1, in the order of the domains' names."""
    domains = store.domains
    known = ", ".join(sorted(domains))
    if not weights:
        weights = {name: domain.sequences for name, domain in domains.items()}
    for name, weight in weights.items():
        if name not in domains:
            raise ValueError(f"mixture names the domain {name!r}, which the store does not have; use some of: {known}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"mixture gives {name} the weight {weight}; weights are finite and at least 0 (0: unused)")
        if weight > 0 and domains[name].sequences == 0:
            raise ValueError(f"mixture gives {name} the weight {weight}, but it has no sequences; set it to 0")
    total = math.fsum(weights.values())
    if total <= 0:
        raise ValueError(f"mixture {dict(weights)} has no positive weight; give one to at least one of: {known}")
    return {name: float(weights[name]) / total for name in sorted(weights) if weights[name] > 0}

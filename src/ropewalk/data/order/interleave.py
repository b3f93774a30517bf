"""An endless row of slots, each given to one domain: exact shares in every period, a shuffled order inside it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.hashing import permutation

PERIOD = 1024  # slots of a period, at most


class Slots:
    """Slots in fixed shares.

    A period holds an integer number of slots for each domain, shuffled by a key of its own. Where the shares have a
    common denominator of at most 1,024, a period is a multiple of it and every period holds the same numbers; else
    the numbers differ by one or so from period to period, such that the periods so far are always as near to the
    shares as whole slots allow (the Webster apportionment).
    """

    def __init__(self, shares: Sequence[Fraction], *key: str | int) -> None:
        """Fix the shares.

        Args:
            shares: positive, of each domain, in any unit.
            key: what shuffles; a period's number is added to it.
        """
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        self._shares = tuple(number // math.gcd(*whole) for number in whole)
        total = sum(self._shares)
        self.period = PERIOD - PERIOD % total if total <= PERIOD else PERIOD
        self._key = key
        self._shuffled: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def before(self, slot: int) -> NDArray[np.int64]:
        """Slots that each domain has among slots 0 .. slot - 1, int64 (domains,): full periods and a prefix."""
        number, place = divmod(slot, self.period)
        counts = np.array(apportioned(self._shares, number * self.period), dtype=np.int64)
        if place:
            counts += np.bincount(self._period(number)[:place], minlength=len(counts))
        return counts

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The domain of each of the slots start .. stop - 1, int64 (stop - start,)."""
        first, last = start // self.period, (stop - 1) // self.period
        slots = np.concatenate([self._period(number) for number in range(first, last + 1)])
        return slots[start - first * self.period : stop - first * self.period]

    def _period(self, number: int) -> NDArray[np.int64]:
        cached = self._shuffled
        if cached[0] == number:
            return cached[1]
        begin, end = (np.array(apportioned(self._shares, n * self.period)) for n in (number, number + 1))
        ordered = np.repeat(np.arange(len(self._shares)), end - begin)
        slots = ordered[permutation(self.period, *self._key, number)]
        self._shuffled = number, slots
        return slots


def apportioned(shares: Sequence[int], slots: int) -> list[int]:
    """The first ``slots`` slots divided by Webster's method (Sainte-Lague): slot k of a share s is due at (2k + 1) / s.

    Work grows with the number of shares, not with ``slots``; no count falls as ``slots`` grows, none is further than
    (1 + shares * its part of the whole) / 2 from exact, and all are exact at multiples of the sum of the shares.

    Args:
        shares: positive integers.
        slots: to divide, 0 or more.
    """
    total = sum(shares)
    # Rounded at a moment that lies before slot ``slots`` is due, so that these counts never exceed the true ones.
    reached = max(0, slots - len(shares))
    counts = [(2 * share * reached + total) // (2 * total) for share in shares] if reached else [0] * len(shares)
    due = [(Fraction(2 * count + 1, share), d) for d, (count, share) in enumerate(zip(counts, shares, strict=True))]
    heapq.heapify(due)
    for _ in range(slots - sum(counts)):
        d = due[0][1]
        counts[d] += 1
        heapq.heapreplace(due, (Fraction(2 * counts[d] + 1, shares[d]), d))
    return counts

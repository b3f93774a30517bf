"""A keyed permutation that is evaluated where it is asked for, so that an epoch of any size is never stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 64
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permuted(positions: ArrayLike, counts: ArrayLike, keys: ArrayLike) -> NDArray[np.int64]:
    """Where each position goes in the permutation of ``range(count)`` that its key picks.

    The swap-or-not shuffle of Hoang, Morris and Rogaway ("An enciphering scheme based on a card shuffle", CRYPTO 2012,
    figure 1): in each round a position x has the partner K - x mod count, and a hash of the larger of the two says
    whether they swap. It needs no power of two, so no cycle walking, and stays a good shuffle for a handful of items.
    The round function is splitmix64's, not a cipher: the order must look random, not keep a secret.

    Args:
        positions: int (n,), each in ``range(count)``.
        counts: int (n,) or one, items that are permuted, at least 1 and below 2**63.
        keys: uint64 (n,) or one.

    Returns:
        int64 (n,).
    """
    x = np.asarray(positions, dtype=np.uint64)
    count = np.asarray(counts, dtype=np.uint64)
    state = np.atleast_1d(np.asarray(keys, dtype=np.uint64))
    for _ in range(ROUNDS):
        state = state + _GAMMA
        partner = _mix(state) % count + count - x
        partner = np.where(partner >= count, partner - count, partner)
        swaps = _mix(_mix(state ^ _GAMMA) + np.maximum(x, partner)) >> np.uint64(63) == 1
        x = np.where(swaps, partner, x)
    return x.astype(np.int64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))

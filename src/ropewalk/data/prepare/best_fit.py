"""Best fit of a million pieces in a fraction of a second, compiled by numba, which takes a while to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled by numba, and kept on disk for the next process where there is a place that can be written."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


@compiled
def best_fit(lengths, capacity):  # type: ignore[no-untyped-def]
    """Bin of each length (int64, in decreasing order) by best fit, and the number of bins.

    Open bins hang in stacks by the room they have left; a segment tree over the capacity + 1 possible rooms
    knows which stacks are not empty, so the tightest bin is found in O(log capacity).
    """
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    occupied = np.zeros(2 * leaves, dtype=np.bool_)
    top = np.full(capacity + 1, -1, dtype=np.int64)
    below = np.full(len(lengths), -1, dtype=np.int64)
    bin_of = np.empty(len(lengths), dtype=np.int64)
    n_bins = 0
    for i in range(len(lengths)):
        room = tightest(occupied, leaves, lengths[i])
        if room < 0:
            room, chosen = capacity, n_bins
            n_bins += 1
        else:
            chosen = top[room]
            top[room] = below[chosen]
            if top[room] < 0:
                mark(occupied, leaves, room, False)
        bin_of[i] = chosen
        left = room - lengths[i]
        if left > 0:
            below[chosen] = top[left]
            top[left] = chosen
            mark(occupied, leaves, left, True)
    return bin_of, n_bins


@compiled
def tightest(occupied, leaves, need):  # type: ignore[no-untyped-def]
    """The smallest room of at least ``need`` that a bin has, or -1."""
    node = leaves + need
    if occupied[node]:
        return need
    while node > 1:
        if node % 2 == 0 and occupied[node + 1]:
            node += 1
            while node < leaves:
                node = 2 * node if occupied[2 * node] else 2 * node + 1
            return node - leaves
        node //= 2
    return -1


@compiled
def mark(occupied, leaves, room, value):  # type: ignore[no-untyped-def]
    """Record whether a bin with this room exists, from the leaf up to the root."""
    node = leaves + room
    occupied[node] = value
    node //= 2
    while node >= 1:
        occupied[node] = occupied[2 * node] or occupied[2 * node + 1]
        node //= 2

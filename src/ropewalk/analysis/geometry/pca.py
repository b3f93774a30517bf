"""Two-dimensional snapshots of queries and keys in one fixed basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

POINTS = 500  # positions of a snapshot, at most


@dataclass(frozen=True)
class Basis:
    """The two directions in which a cloud spreads most.

    Attributes:
        center: float64 (head_dim,).
        axes: float64 (2, head_dim), orthonormal.
        share: float64 (2,): share of the variance along each.
    """

    center: NDArray[np.float64]
    axes: NDArray[np.float64]
    share: NDArray[np.float64]

    def project(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Coordinates of ``points``, (n, head_dim), as (n, 2)."""
        return (points - self.center) @ self.axes.T


def fit_basis(points: NDArray[np.floating]) -> Basis:
    """The first two principal components of ``points``, (n, head_dim), by SVD in float64.

    Their signs are arbitrary; the largest entry of each is made positive, so that runs agree.
    """
    exact = points.astype(np.float64)
    center = exact.mean(axis=0)
    _, singular, axes = np.linalg.svd(exact - center, full_matrices=False)
    variance = singular**2
    axes = axes[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(2), largest])[:, None]
    return Basis(center, axes, variance[:2] / variance.sum())


def basis_table(bases: Mapping[tuple[int, int], Basis]) -> pd.DataFrame:
    """A row for each (layer, key head), ascending.

    Returns:
        layer, kv_head, share (of the variance along both directions), origin_pc1, origin_pc2 (the zero vector).
    """
    rows = []
    for (layer, kv_head), basis in sorted(bases.items()):
        origin = basis.project(np.zeros((1, basis.center.size)))[0]
        rows.append((layer, kv_head, basis.share.sum(), *origin))
    return pd.DataFrame(rows, columns=["layer", "kv_head", "share", "origin_pc1", "origin_pc2"])


def sample_positions(length: int, count: int, seed: int) -> NDArray[np.int64]:
    """At most ``count`` of the first ``length`` positions, ascending; the same for every head and checkpoint."""
    rng = np.random.default_rng([seed, length])
    return np.sort(rng.choice(length, size=min(count, length), replace=False))


def sample_heads(layers: list[int], key_heads: int, count: int, seed: int) -> list[tuple[int, int]]:
    """At most ``count`` pairs of layer and key head, ascending."""
    every = [(layer, head) for layer in layers for head in range(key_heads)]
    rng = np.random.default_rng([seed, len(every)])
    chosen = rng.choice(len(every), size=min(count, len(every)), replace=False)
    return [every[i] for i in sorted(chosen)]

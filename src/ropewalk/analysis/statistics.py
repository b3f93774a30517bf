"""Statistics of a head's queries and keys: clusters, singular values, principal components, attention weights.

Pure functions of tensors. A cloud is X, (heads, tokens, head_dim), one row a token, and every statistic is (heads,),
float64. Where queries meet keys, the heads broadcast: the query heads of a group, (group, tokens, head_dim), against
their key head, (1, tokens, head_dim). The whole attention matrix of a head never exists.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor


def intra_dot(cloud: Tensor) -> Tensor:
    """Mean dot product over all pairs of different tokens: (|sum x|^2 - sum |x|^2) / (n (n - 1))."""
    cloud = cloud.double()
    tokens = cloud.shape[-2]
    whole = cloud.sum(-2).square().sum(-1)
    return (whole - cloud.square().sum((-2, -1))) / (tokens * (tokens - 1))


def inter_dot(a: Tensor, b: Tensor) -> Tensor:
    """Mean dot product over all pairs of one token of ``a`` and one of ``b``: mean(a) . mean(b)."""
    return (a.double().mean(-2) * b.double().mean(-2)).sum(-1)


def unit(cloud: Tensor) -> Tensor:
    """Rows of length 1, float64; a row of zeros stays one, so its cosines are 0 as in scikit-learn."""
    return torch.nn.functional.normalize(cloud.double(), dim=-1, eps=1e-300)


def intra_cosine(cloud: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens: :func:`intra_dot` of the unit vectors.

    1 where all point one way, 0 where they point everywhere (about -1/(n - 1), to be exact).
    """
    return intra_dot(unit(cloud))


def inter_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine over all pairs of one token of ``a`` and one of ``b``."""
    return inter_dot(unit(a), unit(b))


def frobenius_norm(cloud: Tensor) -> Tensor:
    """|X|_F; a rotation leaves it, so RoPE multiplies it by the attention scaling alone."""
    return torch.linalg.vector_norm(cloud.double(), dim=(-2, -1))


def first_singular_value(cloud: Tensor) -> Tensor:
    """sigma_1 of X, not centred: the root of the largest eigenvalue of X^T X, (head_dim, head_dim) in float64."""
    cloud = cloud.double()
    return torch.linalg.eigvalsh(cloud.mT @ cloud)[..., -1].clamp_min(0).sqrt()


def fsv_share(cloud: Tensor) -> Tensor:
    """First singular value share, sigma_1 / |X|_F: 1 for a cloud along one line, head_dim^-0.5 for a round one.

    Of the shares in use it is the one whose ratio under RoPE is sigma_1's own, since RoPE leaves |X|_F, so that for a
    rank-one X whose pairs all turn many times it lies within [head_dim^-0.5, 2^-0.5] (arXiv 2603.18017): the rotated
    Gram is then diagonal with |v_p|^2 / 2 twice for pair p of the direction v, and sigma_1^2 goes from |v|^2 to the
    largest |v_p|^2 / 2, times the same factor. A pair that does not turn keeps |v_p|^2, and the ratio may reach 1.
    """
    return first_singular_value(cloud) / frobenius_norm(cloud)


def stable_rank(cloud: Tensor) -> Tensor:
    """|X|_F^2 / sigma_1^2, within 1..head_dim; the inverse square of :func:`fsv_share`, on the scale of a rank."""
    return fsv_share(cloud) ** -2


def silhouette(a: Tensor, b: Tensor) -> Tensor:
    """Mean silhouette of two clusters over Euclidean distances (Rousseeuw 1987), as scikit-learn's silhouette_score.

    For each point (other - own) / max(own, other), with the mean distance to the other points of its own cluster and to
    those of the other: 1 for tight clusters far apart, 0 where they overlap. It is computed here because there is one
    for each head, length and side of RoPE: scikit-learn's takes a CPU core 0.2 to 0.4 s for 2,048 points a side, this a
    quarter of that, and it runs where the model runs.

    Args:
        a: (heads, n, head_dim), n >= 2; several n x n matrices of float32 are made for each head.
        b: (heads or 1, m, head_dim), m >= 2.
    """
    center = b.float().mean(-2, keepdim=True)  # moved there, fewer digits cancel
    across = torch.cdist(a.float() - center, b.float() - center)
    of_a = _silhouettes(a, across.mean(-1, dtype=torch.float64))
    of_b = _silhouettes(b, across.mean(-2, dtype=torch.float64))
    return torch.cat([of_a, of_b], dim=-1).mean(-1)


def _silhouettes(cloud: Tensor, other: Tensor) -> Tensor:
    centered = cloud.float() - cloud.float().mean(-2, keepdim=True)
    distances = torch.cdist(centered, centered)
    distances.diagonal(dim1=-2, dim2=-1).zero_()  # the fast form of the distance leaves rounding there
    own = distances.sum(-1, dtype=torch.float64) / (cloud.shape[-2] - 1)
    return (other - own) / torch.maximum(own, other).clamp_min(1e-300)


def davies_bouldin(a: Tensor, b: Tensor) -> Tensor:
    """Davies-Bouldin index of two clusters (Davies and Bouldin 1979), as scikit-learn's davies_bouldin_score.

    (mean distance of a's points to a's centroid + likewise b's) / distance of the centroids: 0 for tight clusters far
    apart; from about 1 on they overlap.
    """
    a, b = a.double(), b.double()
    center_a, center_b = a.mean(-2, keepdim=True), b.mean(-2, keepdim=True)
    spread = (a - center_a).norm(dim=-1).mean(-1) + (b - center_b).norm(dim=-1).mean(-1)
    return spread / (center_a - center_b).norm(dim=-1)[..., 0]


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


BLOCK = 2**23  # attention weights that exist at once, float32: 32 MiB, and a few times that while they are made
GRID = 256  # cells of an attention map on each side, at most


@dataclass(frozen=True)
class Scores:
    """Causal attention of every head over prefixes of one document; float32 but for the exact maxima.

    A query sees the keys up to its own position, or the last ``window`` of them.

    Attributes:
        key_scores: length -> (heads, length): mean softmax weight of each key over the queries that see it.
        sink_weight: length -> (heads,): mean weight on position 0 over the queries 1..length-1 that see it. Query 0
            sees nothing else, so it has no say.
        max_dot: length -> (heads,): largest q.k of a query and a key that it sees, not scaled.
        maps: head -> (2, cells, cells): mean weight, and mean cosine, in each cell of the longest prefix, over the
            pairs of the cell that are seen, NaN where there are none; rows are queries. The cells are equal but for
            the last.
        sink_by_query: head -> (2, tokens): weight on position 0 of every query, and its cosine with that key, for the
            heads of ``maps``; NaN where it is out of sight.
    """

    key_scores: dict[int, Tensor]
    sink_weight: dict[int, Tensor]
    max_dot: dict[int, Tensor]
    maps: dict[int, Tensor]
    sink_by_query: dict[int, Tensor]


def attention_scores(
    queries: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    logit_scaling: float,
    map_heads: Collection[int] = (),
    *,
    window: int | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Scores:
    """Scores of the first ``length`` tokens for every length; one pass over the longest serves all.

    Args:
        queries: (heads, tokens, head_dim).
        keys: (key heads, tokens, head_dim).
        lengths: tokens, ascending, the last at most ``tokens``.
        logit_scaling: of q.k before the softmax.
        map_heads: heads whose maps are made.
        window: keys that a query sees; None: all up to its own.
        softcap: c of c tanh(x / c), which bounds the scaled logits; None: they have no bound.
        block: attention weights that exist at once.
    """
    heads, longest = queries.shape[0], lengths[-1]
    group = heads // keys.shape[0]
    reach = min(window or longest, longest)
    sink = torch.full((heads, longest), torch.nan, device=queries.device)
    summed = torch.zeros(heads, longest, device=queries.device)
    largest = torch.empty_like(summed)
    key_scores = {length: torch.empty(heads, length, device=queries.device) for length in lengths}
    maps: dict[int, Tensor] = {}
    for head in range(0, heads, group):
        query_heads = slice(head, head + group)
        key = keys[head // group, :longest].float()
        pooled = {h: _Pooled(longest, reach, queries.device) for h in map_heads if head <= h < head + group}
        for start, end in pairwise(_edges(lengths, max(1, block // (group * longest)))):
            query = queries[query_heads, start:end].float()
            hidden = _hidden(start, end, reach, query.device)
            logits = (query @ key[:end].T).masked_fill_(hidden, -torch.inf)
            largest[query_heads, start:end] = logits.amax(-1)
            logits.mul_(logit_scaling)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap).masked_fill_(hidden, -torch.inf)
            weights = logits.softmax(-1)
            seeing = slice(start, max(start, min(end, reach)))  # the queries that see position 0
            sink[query_heads, seeing] = weights[:, : seeing.stop - start, 0]
            summed[query_heads, :end] += weights.sum(-2)
            for h, grid in pooled.items():
                cosines = unit(query[h - head]).float() @ unit(key[:end]).float().T
                grid.add(weights[h - head], cosines.masked_fill_(hidden, 0.0), start)
            if end in key_scores:
                key_scores[end][query_heads] = summed[query_heads, :end] / _seen(end, reach, summed.device)
        maps |= {h: grid.mean() for h, grid in pooled.items()}
    with_first = {h: (unit(queries[h, :longest]) @ unit(keys[h // group, 0])).float() for h in maps}
    return Scores(
        key_scores=key_scores,
        sink_weight={length: sink[:, 1:length].nanmean(-1) for length in lengths},
        max_dot={length: largest[:, :length].amax(-1) for length in lengths},
        maps=maps,
        sink_by_query={h: torch.stack([sink[h], torch.where(sink[h].isnan(), torch.nan, with_first[h])]) for h in maps},
    )


def key_cosines(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Mean cosine (normalised dot product) of each key with the queries that see it, (heads, tokens), float64.

    The mean over queries is taken before the product: a key's cosines with the queries i..j sum to its unit vector
    times the sum of theirs.

    Args:
        queries: (heads, tokens, head_dim).
        keys: (key heads, tokens, head_dim).
        window: keys that a query sees; None: all up to its own.
    """
    heads, tokens, _ = queries.shape
    reach = min(window or tokens, tokens)
    sums = torch.nn.functional.pad(unit(queries).cumsum(-2), (0, 0, 1, 0))  # of the first 0..tokens
    first = torch.arange(tokens, device=queries.device)
    seeing = sums[:, (first + reach).clamp_max(tokens)] - sums[:, first]
    of_head = unit(keys).repeat_interleave(heads // keys.shape[0], dim=0)
    return (seeing * of_head).sum(-1) / _seen(tokens, reach, queries.device)


def _edges(lengths: Sequence[int], rows: int) -> list[int]:
    """Bounds of the blocks of queries: every ``rows``, and at every length."""
    return sorted({*range(0, lengths[-1], rows), *lengths})


def _hidden(start: int, end: int, reach: int, device: torch.device) -> Tensor:
    """(queries start..end, keys 0..end): True where the key is later, or ``reach`` or more before the query."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    return (distance < 0) | (distance >= reach)


def _seen(length: int, reach: int, device: torch.device) -> Tensor:
    """(length,): of as many queries, how many see each key."""
    return torch.arange(length, 0, -1, device=device).clamp_max(reach)


class _Pooled:
    """Sums of attention weights and of cosines over square cells of queries and keys.

    Args:
        tokens: of the document.
        reach: keys that a query sees.
        device: of the sums.
    """

    def __init__(self, tokens: int, reach: int, device: torch.device) -> None:
        cell = -(-tokens // GRID)
        positions = torch.arange(tokens, device=device)
        self.of = positions // cell
        cells = int(self.of[-1]) + 1
        self.sums = torch.zeros(2, cells, cells, device=device)
        # Pairs of a cell that are seen: for each query, of each cell, the keys up to its own position within reach.
        offsets = positions[:, None] + 1 - cell * torch.arange(cells, device=device)
        allowed = offsets.clamp(0, cell) - (offsets - reach).clamp(0, cell)
        self.pairs = torch.zeros(cells, cells, device=device).index_add_(0, self.of, allowed.float())

    def add(self, weights: Tensor, cosines: Tensor, start: int) -> None:
        """Count a block of queries, each (queries, keys), whose first is ``start``."""
        rows, columns = weights.shape
        cells = self.sums.shape[-1]
        for sums, values in zip(self.sums, (weights, cosines), strict=True):
            by_key = torch.zeros(rows, cells, device=values.device).index_add_(1, self.of[:columns], values)
            sums.index_add_(0, self.of[start : start + rows], by_key)

    def mean(self) -> Tensor:
        return self.sums / torch.where(self.pairs > 0, self.pairs, torch.nan)

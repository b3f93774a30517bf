"""Attention weights from queries and keys, a block of queries at a time: the whole matrix of a head never exists."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 2**23  # attention weights that exist at once, float32: 32 MiB, and a few times that while they are made
GRID = 256  # cells of an attention map on each side, at most


@dataclass(frozen=True)
class Scores:
    """Causal attention of every head over prefixes of one document; float32 but for the exact maxima.

    Attributes:
        key_scores: length -> (heads, length): mean softmax weight of each key over the queries that see it.
        sink_weight: length -> (heads,): mean weight on position 0 over queries 1..length-1. Query 0 sees nothing
            else, so it has no say.
        max_dot: length -> (heads,): largest q.k of a query and a key that it sees, not scaled.
        maps: head -> (cells, cells): mean weight in each cell of the longest prefix, over the pairs of the cell that
            causality allows, NaN where there are none; rows are queries. The cells are equal but for the last.
        sink_by_query: head -> (tokens,): weight on position 0 of every query, for the heads of ``maps``.
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
    block: int = BLOCK,
) -> Scores:
    """Scores of the first ``length`` tokens for every length; one pass over the longest serves all.

    Args:
        queries: (heads, tokens, head_dim).
        keys: (key heads, tokens, head_dim).
        lengths: tokens, ascending, the last at most ``tokens``.
        logit_scaling: of q.k before the softmax.
        map_heads: heads whose map is made.
        block: attention weights that exist at once.
    """
    heads, longest = queries.shape[0], lengths[-1]
    group = heads // keys.shape[0]
    cell = -(-longest // GRID)
    sink = torch.empty(heads, longest, device=queries.device)
    summed = torch.zeros_like(sink)
    largest = torch.empty_like(sink)
    key_scores = {length: torch.empty(heads, length, device=queries.device) for length in lengths}
    maps: dict[int, Tensor] = {}
    for head in range(0, heads, group):
        mine = slice(head, head + group)
        key = keys[head // group, :longest].float()
        pooled = {h: _Pooled(longest, cell, queries.device) for h in map_heads if head <= h < head + group}
        for start, end in pairwise(_edges(lengths, max(1, block // (group * longest)))):
            logits = queries[mine, start:end].float() @ key[:end].T
            hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., start:end].masked_fill_(hidden, -torch.inf)
            largest[mine, start:end] = logits.amax(-1)
            weights = logits.mul_(logit_scaling).softmax(-1)
            sink[mine, start:end] = weights[..., 0]
            summed[mine, :end] += weights.sum(-2)
            for h, grid in pooled.items():
                grid.add(weights[h - head], start)
            if end in key_scores:
                seen_by = torch.arange(end, 0, -1, device=summed.device)
                key_scores[end][mine] = summed[mine, :end] / seen_by
        maps |= {h: grid.mean() for h, grid in pooled.items()}
    return Scores(
        key_scores=key_scores,
        sink_weight={length: sink[:, 1:length].mean(-1) for length in lengths},
        max_dot={length: largest[:, :length].amax(-1) for length in lengths},
        maps=maps,
        sink_by_query={h: sink[h] for h in maps},
    )


def _edges(lengths: Sequence[int], rows: int) -> list[int]:
    """Bounds of the blocks of queries: every ``rows``, and at every length."""
    return sorted({*range(0, lengths[-1], rows), *lengths})


class _Pooled:
    """Sums of attention weights over square cells of queries and keys."""

    def __init__(self, tokens: int, cell: int, device: torch.device) -> None:
        self.cell = cell
        positions = torch.arange(tokens, device=device)
        self.of = positions // cell
        cells = int(self.of[-1]) + 1
        self.sums = torch.zeros(cells, cells, device=device)
        # Pairs of a cell that causality allows: for each query, of each cell, the keys up to its own position.
        allowed = (positions[:, None] + 1 - cell * torch.arange(cells, device=device)).clamp(0, cell)
        self.pairs = torch.zeros(cells, cells, device=device).index_add_(0, self.of, allowed.float())

    def add(self, weights: Tensor, start: int) -> None:
        """Count a block of queries, (queries, keys), whose first is ``start``."""
        rows, columns = weights.shape
        cells = self.sums.shape[0]
        by_key = torch.zeros(rows, cells, device=weights.device).index_add_(1, self.of[:columns], weights)
        self.sums.index_add_(0, self.of[start : start + rows], by_key)

    def mean(self) -> Tensor:
        return self.sums / torch.where(self.pairs > 0, self.pairs, torch.nan)

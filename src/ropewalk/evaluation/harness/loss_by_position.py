"""Loss by position on held-out documents, with document-level confidence intervals.

A position is the 0-based index of the predicted token, so position p has p tokens of context. The bucket
[start, end) holds the predictions made from start to end - 1 tokens; nothing predicts position 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ropewalk.evaluation.bootstrap import ratio
from ropewalk.evaluation.evaluated_checkpoint import Setting

FIRST_EDGE = 64  # tokens; the buckets double from here


def bucket_edges(lengths: Sequence[int]) -> list[int]:
    """0, the powers of two from 64 below the longest length, and each length with its half, ascending."""
    edges = {0, *lengths, *(length // 2 for length in lengths)}
    edge = FIRST_EDGE
    while edge < max(lengths):
        edges.add(edge)
        edge *= 2
    return sorted(edges)


def bucket_sums(losses: ArrayLike, edges: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Summed NLL and number of predictions in each bucket that the window covers whole.

    Args:
        losses: (n - 1,) NLL of positions 1..n-1, nats.
        edges: ascending from 0; those beyond n are not used.

    Returns:
        float64 and int64, (number of edges up to n, less one).
    """
    # Position 0 is given, not predicted.
    by_position = np.concatenate([[0.0], np.asarray(losses, np.float64)])
    covered = np.array([edge for edge in edges if edge <= by_position.size])
    totals = np.concatenate([[0.0], np.cumsum(by_position)])[covered]
    tokens = np.diff(covered)
    tokens[0] -= 1
    return np.diff(totals), tokens


def document_rows(document: str, losses: ArrayLike, edges: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows of documents.parquet for one document under one setting, less run and setting."""
    for start, end, nll_sum, tokens in zip(edges, edges[1:], *bucket_sums(losses, edges), strict=False):
        yield {"document": document, "position_start": start, "position_end": end, "nll_sum": nll_sum, "tokens": tokens}


def loss_rows(sums: pd.DataFrame, setting: Setting, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the results table for one setting.

    The whole curve, one row for each bucket (``loss_by_position``), and for each context length L of the
    setting the loss of positions L/2 to L (``loss_at_length``), which have that much context.

    Args:
        sums: the rows of :func:`document_rows` of every document under this setting.
        setting: the setting.
        seed: of the bootstrap.
    """
    spans = sums[["position_start", "position_end"]].drop_duplicates().itertuples(index=False)
    ranges = [("loss_by_position", setting.longest, start, end) for start, end in spans]
    ranges += [("loss_at_length", length, length // 2, length) for length in setting.lengths]
    for task, context_length, start, end in ranges:
        documents = per_document(sums, start, end)
        yield {
            "task": task,
            "metric": "nll",
            "context_length": context_length,
            "position_start": start,
            "position_end": end,
            **ratio(documents["nll_sum"], documents["tokens"], seed).columns(),
        }


def per_document(sums: pd.DataFrame, start: int, end: int) -> pd.DataFrame:
    """NLL sum and tokens of positions [start, end), a union of buckets, for each document, sorted by name.

    A sum that is not a number stays one: left out, as pandas does by default, it would lower the loss.
    """
    inside = sums[(sums["position_start"] >= start) & (sums["position_end"] <= end)]
    return inside.groupby("document", sort=True)[["nll_sum", "tokens"]].sum(skipna=False)

"""The tidy table of statistics and what is written beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ropewalk.evaluation.results import typed_table, write_table
from ropewalk.files import replace_atomically, write_atomically

COLUMNS = {
    "model": "str",
    "chain": "str",  # printed
    "layer": "int64",
    "head": "Int64",  # query head; null for a statistic of keys alone
    "kv_head": "int64",
    "length": "int64",  # tokens: the first so many of the document
    "rope": "str",  # before or after; before, attention is what these vectors would give without rotation
    "statistic": "str",
    "value": "float64",  # mean over documents
}
# What each statistic is; those named *_keys or *_key_norm are of key heads, all others of query heads.
STATISTICS = {
    "intra_cosine_queries": "mean cosine between a head's queries",
    "intra_cosine_keys": "mean cosine between a key head's keys",
    "inter_cosine": "mean cosine between a head's queries and its keys",
    "intra_dot_queries": "mean dot product between queries",
    "intra_dot_keys": "mean dot product between keys",
    "inter_dot": "mean dot product of queries and keys, causal or not",
    "frobenius_queries": "Frobenius norm of the queries",
    "frobenius_keys": "Frobenius norm of the keys",
    "fsv_share_queries": "first singular value over Frobenius norm, queries",
    "fsv_share_keys": "first singular value over Frobenius norm, keys",
    "fsv_ratio_queries": "fsv_share_queries after RoPE over before",
    "fsv_ratio_keys": "fsv_share_keys after RoPE over before",
    "stable_rank_queries": "squared Frobenius norm over squared first singular value, queries",
    "stable_rank_keys": "squared Frobenius norm over squared first singular value, keys",
    "silhouette": "mean silhouette of queries against keys, Euclidean",
    "davies_bouldin": "Davies-Bouldin index of queries against keys",
    "sink_weight": "mean softmax weight on position 0 over queries 1 and later",
    "max_dot": "largest q.k of a query and a key it sees, before any scaling of the logits",
    "sink_key_norm": "Euclidean norm of the key at position 0",
    "other_key_norm": "mean Euclidean norm of the keys at positions 1 and later",
}
TABLE, RECORD = "geometry", "geometry.json"  # the table as .parquet and .csv
KEY_SCORES, CLOUDS = "key_scores.parquet", "pca.parquet"


class Means:
    """Means over documents, of numbers or arrays, by key; nothing of a document is kept but its part of the sums."""

    def __init__(self) -> None:
        self.sums: dict[tuple[Any, ...], Any] = {}
        self.counts: dict[tuple[Any, ...], int] = {}

    def add(self, key: tuple[Any, ...], value: Any) -> None:
        """Count one document's value."""
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0) + 1

    def items(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Each key and its mean, in the order of first arrival."""
        for key, total in self.sums.items():
            yield key, total / self.counts[key]


def is_of_keys(statistic: str) -> bool:
    """True if a statistic has one value for each key head, and none for a query head."""
    return statistic.endswith(("_keys", "_key_norm"))


def geometry_table(means: Means) -> pd.DataFrame:
    """The table; keys of ``means`` are all columns but the value, in their order."""
    return typed_table((dict(zip(COLUMNS, (*key, value), strict=True)) for key, value in means.items()), COLUMNS)


def key_score_table(means: Means) -> pd.DataFrame:
    """One row for each position: model, chain, layer, length, rope, position, value.

    The value is the mean softmax weight of a key over the queries that see it, over a layer's heads and documents.

    Args:
        means: float32 (length,) by model, chain, layer, length, rope.
    """
    names = ("model", "chain", "layer", "length", "rope")
    keys, arrays = zip(*means.items(), strict=True)
    counts = [values.size for values in arrays]
    columns: dict[str, Any] = {}
    for i, name in enumerate(names):
        column = pd.Series([key[i] for key in keys])
        column = column.astype("category") if name in ("model", "chain", "rope") else column
        columns[name] = column.repeat(counts).reset_index(drop=True)
    columns["position"] = np.concatenate([np.arange(count) for count in counts])
    columns["value"] = np.concatenate(arrays)
    return pd.DataFrame(columns)


def write_tables(
    output: Path, table: pd.DataFrame, scores: pd.DataFrame, clouds: pd.DataFrame, record: Mapping[str, Any]
) -> None:
    """Write the tables and, last, geometry.json; each file is written beside and renamed."""
    write_table(output, TABLE, table)
    replace_atomically(output / KEY_SCORES, lambda path: scores.to_parquet(path, index=False))
    replace_atomically(output / CLOUDS, lambda path: clouds.to_parquet(path, index=False))
    write_atomically(output / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")

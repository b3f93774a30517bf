"""Measurement of a layer's queries and keys, and the tidy table of the statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropewalk.analysis.capture import ROPE, LayerHeads
from ropewalk.analysis.geometry_plan import RECORD, Plan, Subject
from ropewalk.analysis.statistics import (
    POINTS,
    Basis,
    attention_scores,
    davies_bouldin,
    fit_basis,
    frobenius_norm,
    fsv_share,
    inter_dot,
    intra_dot,
    key_cosines,
    sample_positions,
    silhouette,
    stable_rank,
    unit,
)
from ropewalk.evaluation.evaluated_checkpoint import Setting
from ropewalk.evaluation.results import typed_table, write_table
from ropewalk.figures.key_clouds import AttentionMap
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
    "sink_weight": "mean softmax weight on position 0 over queries 1 and later that see it",
    "max_dot": "largest q.k of a query and a key it sees, before any scaling of the logits",
    "sink_key_norm": "Euclidean norm of the key at position 0",
    "other_key_norm": "mean Euclidean norm of the keys at positions 1 and later",
}
TABLE = "geometry"  # as .parquet and .csv
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


POSITION_COLUMNS = ("value", "cosine", "key_norm")


def key_score_table(means: Means) -> pd.DataFrame:
    """One row for each position: model, chain, layer, length, rope, position, value, cosine, key_norm.

    The value is the mean softmax weight of a key over the queries that see it, the cosine its mean normalised dot
    product with them, both over a layer's heads and documents; key_norm is its Euclidean norm, over its key heads.

    Args:
        means: float32 (3, length), in the order of ``POSITION_COLUMNS``, by model, chain, layer, length, rope.
    """
    names = ("model", "chain", "layer", "length", "rope")
    keys, arrays = zip(*means.items(), strict=True)
    counts = [values.shape[-1] for values in arrays]
    columns: dict[str, Any] = {}
    for i, name in enumerate(names):
        column = pd.Series([key[i] for key in keys])
        column = column.astype("category") if name in ("model", "chain", "rope") else column
        columns[name] = column.repeat(counts).reset_index(drop=True)
    columns["position"] = np.concatenate([np.arange(count) for count in counts])
    columns |= dict(zip(POSITION_COLUMNS, np.concatenate(arrays, axis=-1), strict=True))
    return pd.DataFrame(columns)


def write_tables(
    output: Path, table: pd.DataFrame, scores: pd.DataFrame, clouds: pd.DataFrame, record: Mapping[str, Any]
) -> None:
    """Write the tables and, last, geometry.json; each file is written beside and renamed."""
    write_table(output, TABLE, table)
    replace_atomically(output / KEY_SCORES, lambda path: scores.to_parquet(path, index=False))
    replace_atomically(output / CLOUDS, lambda path: clouds.to_parquet(path, index=False))
    write_atomically(output / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")


@dataclass
class Findings:
    """Results of the passes so far."""

    statistics: Means = field(default_factory=Means)  # as geometry_table takes them
    key_scores: Means = field(default_factory=Means)  # as key_score_table takes them
    clouds: list[pd.DataFrame] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)
    bases: dict[tuple[int, int], Basis] = field(default_factory=dict)  # by layer and key head


@dataclass(frozen=True)
class LayerMeasurement:
    """Measures the layers of one pass into ``findings``.

    Attributes:
        plan: what is asked for.
        subject: the checkpoint.
        setting: the spectrum of the pass and the lengths that it serves.
        first_document: whether snapshots and maps are taken, too.
        findings: where everything goes.
    """

    plan: Plan
    subject: Subject
    setting: Setting
    first_document: bool
    findings: Findings

    def __call__(self, heads: LayerHeads) -> None:
        """Measure one layer."""
        for rope in ROPE:
            self._attention(heads, rope)
            for kv_head, queries, keys in groups(heads, rope):
                measured = list(cluster_values(queries, keys, self.setting.lengths, self._sampled))
                self._record(measured, heads, rope, kv_head)
        self._ratios(heads)
        if self.first_document:
            self._snapshots(heads)

    def _sampled(self, length: int) -> NDArray[np.int64]:
        return sample_positions(length, self.plan.config.cluster_samples, self.plan.config.seed)

    def _where(self, heads: LayerHeads) -> tuple[str, str, int]:
        """Model, chain and layer."""
        return self.subject.name, str(self.setting.chain), heads.layer

    def _record(self, measured: list[tuple[str, int, Tensor]], heads: LayerHeads, rope: str, kv_head: int) -> None:
        """Rows of values that come as one for each query head of the group, or one for its key head."""
        group = heads.queries[rope].shape[0] // heads.keys[rope].shape[0]
        for statistic, length, values in measured:
            for i, value in enumerate(values.tolist()):
                head = None if is_of_keys(statistic) else kv_head * group + i
                key = (*self._where(heads), head, kv_head, length, rope, statistic)
                self.findings.statistics.add(key, value)

    def _attention(self, heads: LayerHeads, rope: str) -> None:
        wanted = {head for layer, head in self.plan.map_heads if layer == heads.layer}
        draws = self.first_document and self.setting.longest == self.plan.config.lengths[-1]
        # The unrotated logits get the attention scaling that RoPE brings, so that the rotation is all that differs.
        scaling = heads.logit_scaling * (heads.attention_scaling**2 if rope == "before" else 1.0)
        queries, keys = heads.queries[rope], heads.keys[rope]
        scores = attention_scores(
            queries, keys, self.setting.lengths, scaling, wanted if draws else (), window=heads.window,
            softcap=heads.softcap,
        )  # fmt: skip
        norms = torch.linalg.vector_norm(keys.double(), dim=-1).mean(0)
        for length in self.setting.lengths:
            prefixes = [(q[:, :length], k[:, :length]) for _, q, k in groups(heads, rope)]
            cosines = torch.cat([key_cosines(q, k, heads.window) for q, k in prefixes]).mean(0)
            by_position = torch.stack([scores.key_scores[length].double().mean(0), cosines, norms[:length]])
            self.findings.key_scores.add((*self._where(heads), length, rope), by_position.float().cpu().numpy())
        key_heads = keys.shape[0]
        for statistic, by_length in (("sink_weight", scores.sink_weight), ("max_dot", scores.max_dot)):
            for length, values in by_length.items():
                for kv_head, group in enumerate(values.view(key_heads, -1)):
                    self._record([(statistic, length, group)], heads, rope, kv_head)
        for head, cells in scores.maps.items():
            arrays = *cells.cpu().numpy(), *scores.sink_by_query[head].cpu().numpy()
            attention_map = AttentionMap(self.subject.name, heads.layer, head, rope, self.setting.longest, *arrays)
            self.findings.maps.append(attention_map)

    def _ratios(self, heads: LayerHeads) -> None:
        """First singular value share after RoPE over before; the attention scaling is in neither."""
        for (kv_head, *before), (_, *after) in zip(*(groups(heads, rope) for rope in ROPE), strict=True):
            for name, unrotated, rotated in zip(("queries", "keys"), before, after, strict=True):
                for length in self.setting.lengths:
                    ratio = fsv_share(rotated[:, :length]) / fsv_share(unrotated[:, :length])
                    self._record([(f"fsv_ratio_{name}", length, ratio)], heads, "after", kv_head)

    def _snapshots(self, heads: LayerHeads) -> None:
        early = self.plan.config.lengths[0]
        for kv_head, queries, keys in groups(heads, "before"):
            key_head = (heads.layer, kv_head)
            if key_head in self.plan.pca_heads and key_head not in self.findings.bases:
                points = torch.cat([queries[:, :early].flatten(0, 1), keys[0, :early]])
                self.findings.bases[key_head] = fit_basis(points.float().cpu().numpy())
        of = dict(zip(("model", "chain", "layer"), self._where(heads), strict=True))
        for rope in ROPE:
            for kv_head, queries, keys in groups(heads, rope):
                if (heads.layer, kv_head) in self.plan.pca_heads:
                    basis = self.findings.bases[heads.layer, kv_head]
                    for length in self.setting.lengths:
                        where = {**of, "kv_head": kv_head, "length": length, "rope": rope}
                        seed = self.plan.config.seed
                        self.findings.clouds.append(snapshot(basis, queries, keys, length, seed).assign(**where))


def groups(heads: LayerHeads, rope: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each key head with its queries (group, tokens, head_dim) and its keys (1, tokens, head_dim)."""
    queries, keys = heads.queries[rope], heads.keys[rope]
    group = queries.shape[0] // keys.shape[0]
    for kv_head in range(keys.shape[0]):
        yield kv_head, queries[kv_head * group : (kv_head + 1) * group], keys[kv_head : kv_head + 1]


def cluster_values(
    queries: Tensor, keys: Tensor, lengths: tuple[int, ...], sampled: Any
) -> Iterator[tuple[str, int, Tensor]]:
    """(statistic, length, values) of one group, but for those of attention and the ratio under RoPE.

    Args:
        queries: (group, tokens, head_dim).
        keys: (1, tokens, head_dim).
        lengths: tokens of each prefix.
        sampled: length -> positions that silhouette and Davies-Bouldin are computed on.
    """
    unit_queries, unit_keys = unit(queries), unit(keys)
    norms = torch.linalg.vector_norm(keys.double(), dim=-1)
    for length in lengths:
        q, k = queries[:, :length], keys[:, :length]
        places = torch.from_numpy(sampled(length)).to(q.device)
        some_q, some_k = q[:, places], k[:, places]
        clusters: dict[str, Tensor] = {
            "intra_cosine_queries": intra_dot(unit_queries[:, :length]),
            "intra_cosine_keys": intra_dot(unit_keys[:, :length]),
            "inter_cosine": inter_dot(unit_queries[:, :length], unit_keys[:, :length]),
            "intra_dot_queries": intra_dot(q),
            "intra_dot_keys": intra_dot(k),
            "inter_dot": inter_dot(q, k),
            "silhouette": silhouette(some_q, some_k),
            "davies_bouldin": davies_bouldin(some_q, some_k),
            "sink_key_norm": norms[:, 0],
            "other_key_norm": norms[:, 1:length].mean(-1),
        }
        for name, cloud in (("queries", q), ("keys", k)):
            clusters |= {
                f"frobenius_{name}": frobenius_norm(cloud),
                f"fsv_share_{name}": fsv_share(cloud),
                f"stable_rank_{name}": stable_rank(cloud),
            }
        for statistic, values in clusters.items():
            yield statistic, length, values


def snapshot(basis: Basis, queries: Tensor, keys: Tensor, length: int, seed: int) -> pd.DataFrame:
    """Coordinates of a seeded sample of positions, position 0 always among them.

    Returns:
        cloud ("query" or "key"), head of the group (0.. for queries, -1 for keys), position, pc1, pc2.
    """
    places = np.union1d([0], sample_positions(length, POINTS, seed))
    frames = []
    for cloud, vectors, first in (("query", queries, 0), ("key", keys, -1)):
        for i, points in enumerate(vectors[:, torch.from_numpy(places).to(vectors.device)].float().cpu().numpy()):
            first_two = basis.project(points)
            of = {"cloud": cloud, "head_of_group": first + i, "position": places}
            frames.append(pd.DataFrame({**of, "pc1": first_two[:, 0], "pc2": first_two[:, 1]}))
    return pd.concat(frames, ignore_index=True)
